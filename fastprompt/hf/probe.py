"""What the probes of a freshly attached model share: a quiet model, a short batch, and how far results may differ."""

import inspect
from contextlib import contextmanager

import torch

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def tolerance(dtype):
    """How far two ways to the same result may lie apart in ``dtype``, relative to the largest value."""
    return _TOLERANCE.get(dtype, 1e-4)


def relative_error(result, expected):
    """The largest difference, relative to the largest expected value."""
    return float((result - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@contextmanager
def quiet(model):
    """Evaluation mode without autocast for a while; every module gets its own flag back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


class Probe:
    """Two short rows behind a prompt of three tokens, and what a model gives for them.

    Attributes:
        ids: ``[2, 5]``.
        embeds: ``[2, 5, D]``.
        prompt: ``[3, D]``.
        full, right, left: ``[2, 5]`` masks: no padding, or the second row padded.
    """

    def __init__(self, model):
        self.model, table = model, model.get_input_embeddings()
        vocabulary = min(table.weight.shape[0], model.config.get_text_config().vocab_size)
        self.ids = (torch.arange(10, device=table.weight.device).view(2, 5) * 7 + 3) % vocabulary
        self.embeds = table(self.ids)
        self.prompt = table(self.ids.flip(0)[:1, :3])[0]
        self.full = torch.ones_like(self.ids)
        self.right = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], device=self.ids.device)
        self.left = self.right.flip(1)

    def real(self, mask):
        """``[2, 8]``: where the prompt or a token stands."""
        return torch.cat([mask.new_ones(len(mask), len(self.prompt)), mask], 1).bool()

    def padded(self, mask):
        """The model's output on ``[2, 8]`` padded rows."""
        inputs = torch.cat([self.prompt.expand(len(mask), -1, -1), self.embeds], 1)
        options = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
        return primary(
            self.model(inputs_embeds=inputs, attention_mask=self.real(mask).long(), return_dict=True, **options)
        )


def primary(output):
    """The first tensor that a model's output holds beside a loss: logits, start logits, hidden states."""
    return next(x for name, x in output.items() if name != "loss" and isinstance(x, torch.Tensor))
