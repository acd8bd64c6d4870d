"""What an untouched model gives for a few short rows, in wide arithmetic, and how far packed rows may be from it."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layout import IGNORE
from .cache_names import CACHE_NAME, CACHE_NAMES
from .per_layer import behind_prompt, per_layer_inputs, searching_part
from .precision import WideArithmetic
from .runner import pooled_again

ITEMS = 7  # as num_items_in_batch
_CAP = 1e-4  # a larger difference between a row alone and the same row in a batch is no rounding


class Sample:
    """Three short rows behind a prompt of three tokens.

    Attributes:
        ids: ``[3, 5]``.
        embeds: ``[3, 5, D]``.
        prompt: ``[3, D]``.
        masks: ``[3, 5]`` each: no padding, or two of the rows padded on the right or on the left.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        table: Any = model.get_input_embeddings()
        vocabulary = min(table.weight.shape[0], model.config.get_text_config().vocab_size)
        self.ids = (torch.arange(15, device=table.weight.device).view(3, 5) * 7 + 3) % vocabulary
        self.embeds = table(self.ids)
        self.prompt = table(self.ids.flip(0)[:1, :3])[0]
        right = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], device=self.ids.device)
        self.masks = {"right": right, "left": right.flip(1), "full": torch.ones_like(right)}

    def real(self, mask: torch.Tensor) -> torch.Tensor:
        """``[3, 8]``: where the prompt or a token stands."""
        return torch.cat([mask.new_ones(len(mask), len(self.prompt)), mask], 1).bool()

    def labels(self) -> torch.Tensor:
        """``[3, 8]``: the text under the mask "right", some of it ignored."""
        labels = self.ids.masked_fill(self.masks["right"] == 0, IGNORE)
        labels[0, 2] = IGNORE
        return torch.cat([labels.new_full((len(labels), len(self.prompt)), IGNORE), labels], 1)

    def run(self, model: PreTrainedModel, mask: torch.Tensor, **options: Any) -> Mapping[str, Any]:
        """The model's output on padded rows, ``[3, 8]``, or as many of them as the mask has."""
        inputs = torch.cat([self.prompt.expand(len(mask), -1, -1), self.embeds[: len(mask)]], 1)
        ids = behind_prompt(self.ids[: len(mask)], len(self.prompt))
        options.update(per_layer_inputs(searching_part(model), ids))
        if "use_cache" in inspect.signature(model.forward).parameters:
            options.setdefault("use_cache", False)
        return model(inputs_embeds=inputs, attention_mask=self.real(mask).long(), return_dict=True, **options)


@dataclass(eq=False)
class Expectations:
    """What :meth:`of` found out.

    Attributes:
        sample: the rows.
        outputs: for each mask the first output of the model.
        spread: how far the output for a row differs, alone and in a batch, relative to its largest value.
        wide: the arithmetic it was computed in; None: the model's own.
        dtype: the model's own.
        losses: for each ``num_items_in_batch`` the loss of a causal LM, or why there is none.
        cache: what it returns with ``use_cache`` and the mask "right", or None.
        cache_name: under which name.
        needs_ids, head_is_linear: see Abilities.
        changed: outputs with changed hidden states of the first and of the last column, of another head.
        parameters: the names of its forward's parameters.
        ids: the token ids that were run behind learned keys and values.
    """

    sample: Sample
    wide: WideArithmetic | None
    dtype: torch.dtype
    parameters: frozenset
    outputs: dict = field(default_factory=dict)
    spread: float = 0.0
    losses: dict = field(default_factory=dict)
    cache: Any = None
    cache_name: str = CACHE_NAME
    needs_ids: bool = False
    head_is_linear: bool = False
    changed: tuple = ()
    ids: torch.Tensor | None = None

    @classmethod
    def of(cls, base: PreTrainedModel, backbone: nn.Module, is_lm: bool) -> "Expectations":
        """Ask the untouched ``base``, in wide arithmetic if it runs in it."""
        try:
            return cls._of(base, backbone, is_lm, WideArithmetic(base))
        except Exception:  # kernels that know their own dtypes only; then the model's arithmetic has to do
            return cls._of(base, backbone, is_lm, None)

    @classmethod
    def _of(cls, base, backbone, is_lm, wide):
        with wide or nullcontext():
            sample = Sample(base)
            parameters = frozenset(inspect.signature(base.forward).parameters)
            found = cls(sample, wide, base.get_input_embeddings().weight.dtype, parameters)
            right = sample.masks["right"]
            for name, mask in sample.masks.items():
                if name != "full" or not is_lm:
                    found.outputs[name] = first_output(sample.run(base, mask))
            found.spread = found._spread(first_output(sample.run(base, right[:1])))
            if "use_cache" in inspect.signature(backbone.forward).parameters or is_lm:
                found.cache_name, found.cache = _cache(base, sample, right)
            if is_lm:
                found._ask_language_model(base, backbone)
            else:
                full = sample.masks["full"]
                found.changed = tuple(_with_change(base, backbone, sample, full, column) for column in (0, -1))
        return found

    @classmethod
    def behind_prefix(
        cls, base: PreTrainedModel, forward: Callable[..., Mapping[str, Any]], padding: int | None
    ) -> "Expectations":
        """What ``forward(input_ids=, attention_mask=)`` gives behind learned keys and values: output "right" and
        spread.

        ``padding`` is the id that stands in padded places, by which some heads find a row's last token; or None.
        """
        try:
            return cls._behind_prefix(base, forward, padding, WideArithmetic(base))
        except Exception:  # as above
            return cls._behind_prefix(base, forward, padding, None)

    @classmethod
    def _behind_prefix(cls, base, forward, padding, wide):
        with wide or nullcontext():
            sample = Sample(base)
            found = cls(sample, wide, base.get_input_embeddings().weight.dtype, frozenset())
            ids, mask = sample.ids, sample.masks["right"]
            found.ids = ids if padding is None else ids.masked_fill(mask == 0, padding)
            found.outputs["right"] = first_output(forward(input_ids=found.ids, attention_mask=mask))
            alone = first_output(forward(input_ids=found.ids[:1], attention_mask=mask[:1]))
            found.spread = found._spread(alone)
        return found

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The block in which packed rows are to be run."""
        return self.wide or nullcontext()

    @property
    def refusal(self) -> str | None:
        """Why there is nothing that packed rows could be compared with, or None."""
        if not self.spread <= max(_CAP, 8 * self._rounding):
            return f"a row's output depends on the batch it stands in (relative difference {self.spread:.1e})"
        return None

    def difference(self, got: torch.Tensor, expected: torch.Tensor, real: torch.Tensor | None) -> str | None:
        """None if two outputs agree, else what differs.

        Every token may differ by twice the model's own spread and by rounding, relative to its own largest value.

        Args:
            got, expected: ``[B, W, ...]``, or ``[B, ...]`` where the model has one output a row.
            real: ``[B, W]``, the tokens that count; None: all.
        """
        if got.shape != expected.shape:
            return f"packed rows give an output of shape {list(got.shape)}, the padded forward {list(expected.shape)}"
        if real is not None and expected.shape[:2] == real.shape:
            got, expected = got[real], expected[real]
        error = float(((got - expected).abs() / _size(expected)).max())
        if not error <= 2 * self.spread + self._rounding:
            return f"packed rows give another output than the padded forward (relative error {error:.1e})"
        return None

    def _spread(self, alone):
        together = self.outputs["right"][:1]
        return float(((together - alone).abs() / _size(together)).max())

    @property
    def _rounding(self):
        """What rounding may add up to from the first layer to the last."""
        if self.wide is not None and self.wide.exact:
            return 1e-8 if self.wide.dtype == torch.float64 else 64 * self.wide.eps
        return max(4 * torch.finfo(self.dtype).eps, 1e-5)

    def _ask_language_model(self, base, backbone):
        sample, right = self.sample, self.sample.masks["right"]
        for items in (None, ITEMS):
            extra = {} if items is None else {"num_items_in_batch": items}
            try:
                self.losses[items] = sample.run(base, right, labels=sample.labels(), **extra).loss
            except Exception as error:
                self.losses[items] = f"{type(base).__name__} with labels raises {type(error).__name__}: {error}"
        try:
            options = {"use_cache": False} if "use_cache" in self.parameters else {}
            by_id, by_embedding = (
                base(**inputs, **options, return_dict=True).logits
                for inputs in ({"input_ids": sample.ids}, {"inputs_embeds": sample.embeds.clone()})
            )
            searches = searching_part(base) is not None
            self.needs_ids = searches or self.difference(by_id, by_embedding, None) is not None
        except Exception:  # it does not take both kinds of input
            self.needs_ids = True
        self.head_is_linear = _head_is_linear(base, backbone, sample)


def _cache(base, sample, mask):
    try:
        output = sample.run(base, mask, use_cache=True)
    except Exception:  # it takes no such argument
        output = {}
    return next(((name, output[name]) for name in CACHE_NAMES if output.get(name) is not None), (CACHE_NAME, None))


def first_output(output: Mapping[str, Any]) -> torch.Tensor:
    """The first tensor that a model's output holds beside a loss: logits, start logits, hidden states."""
    return next(x for name, x in output.items() if name != "loss" and isinstance(x, torch.Tensor))


def column_read(expected: Expectations) -> int | None:
    """See ``Abilities.pooled_column``."""
    plain, read = expected.outputs["full"], []
    for column, output in zip((0, -1), expected.changed):
        differs = output != plain
        if plain.shape[:2] == expected.sample.real(expected.sample.masks["full"]).shape:
            differs[:, column] = False  # one output a token: its own does not count
        if differs.any():
            read.append(column)
    return read[0] if len(read) == 1 else None


def _size(x):
    """The largest value of each token; not much less than that of all of them."""
    size = x.abs().amax(-1, keepdim=True) if x.dim() else x.abs()
    return size.clamp(min=max(float(size.max()) * 1e-3, 1e-30))


def _with_change(base, backbone, sample, mask, column):
    """The output with the backbone's hidden states of a column changed."""

    def change(module, args, output):
        output.last_hidden_state = output.last_hidden_state.clone()
        output.last_hidden_state[:, column] += 1
        return pooled_again(module, output)

    hook = backbone.register_forward_hook(change)
    try:
        return first_output(sample.run(base, mask))
    finally:
        hook.remove()


def _head_is_linear(base, backbone, sample):
    """Are the logits those of the head alone?

    The decoder's output is replaced by large values, so that a soft cap or a scale behind the head shows.
    """
    head = base.get_output_embeddings()
    generator = torch.Generator(sample.ids.device).manual_seed(0)
    large = 1e3 * torch.randn(sample.embeds.shape, device=sample.ids.device, generator=generator).to(
        sample.embeds.dtype
    )

    def replace_output(module, inputs, output):
        output.last_hidden_state = large
        return output

    hook = backbone.register_forward_hook(replace_output)
    try:
        options = {"use_cache": False, **per_layer_inputs(searching_part(base), sample.ids)}
        logits = base(inputs_embeds=sample.embeds.clone(), return_dict=True, **options).logits
    except Exception:  # a head that does more than read hidden states
        return False
    finally:
        hook.remove()
    expected = head(large)
    close = torch.allclose(logits, expected.to(logits.dtype), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    return logits.shape == expected.shape and close
