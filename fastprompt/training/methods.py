"""What a configuration may say of each method; neither torch nor PEFT is needed to check it."""

from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "fp16")
ENCODERS = ("lstm", "mlp")
SOURCE_INITS = ("average", "exact", "shared")


@dataclass(frozen=True)
class Method:
    """A way to make a soft prompt.

    Attributes:
        inits: the values that ``init`` may have.
        lr: the learning rate of a run that names none.
        lr_projected: the same with ``projection``.
        options: the fields of the configuration that only some methods take.
    """

    inits: tuple[str, ...]
    lr: float
    lr_projected: float | None = None
    options: tuple[str, ...] = ()


METHODS = {
    "prompt-tuning": Method(inits=("random", "vocab", "text"), lr=0.02),
    "prefix-tuning": Method(
        inits=("random", "zero", "text"), lr=0.01, lr_projected=0.001, options=("projection", "encoder_hidden_size")
    ),
    "p-tuning": Method(inits=("random",), lr=0.001, options=("encoder", "encoder_hidden_size")),
    "multitask": Method(
        inits=("random", "vocab", "text"),
        lr=0.02,
        options=("num_ranks", "source", "source_init", "source_task"),
    ),
}
