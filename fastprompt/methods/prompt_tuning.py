"""Prompt Tuning: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691."""

from collections.abc import Sequence

import torch
from torch import nn

from ..checks import FLOATS, check_tensor


class PromptTuning(nn.Module):
    """N learned prompts of P virtual tokens each, in front of the text.

    Args:
        num_virtual_tokens: P, at least 1.
        token_dim: D, the width of the model's embeddings.
        num_prompts: N, at least 1; a batch may mix them row by row.
        init: ``[P, D]`` or ``[N, P, D]`` starting values, for example embeddings of a text (:meth:`from_text`), of
            class labels (:meth:`from_labels`) or of sampled vocabulary (:meth:`from_vocabulary`). None: standard
            normal, as PEFT's RANDOM.

    Attributes:
        prompt: ``[N, P, D]`` fp32 parameter.

    Raises:
        TypeError: an ``init`` that is no tensor.
        ValueError: a size below 1, or an ``init`` of another shape.
    """

    def __init__(
        self, num_virtual_tokens: int, token_dim: int, num_prompts: int = 1, init: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        check_sizes(num_virtual_tokens=num_virtual_tokens, token_dim=token_dim, num_prompts=num_prompts)
        shape = (num_prompts, num_virtual_tokens, token_dim)
        self.prompt = nn.Parameter(torch.randn(shape) if init is None else initial_values(init, shape, shape[1:]))

    @classmethod
    def from_text(
        cls, token_ids: Sequence[int], embedding: nn.Embedding, num_virtual_tokens: int, num_prompts: int = 1
    ) -> "PromptTuning":
        """Start from the embeddings of a text, repeated or cut to P tokens, as PEFT's TEXT.

        Args:
            token_ids: the tokenized text, a non-empty list of ints.
            embedding: the model's input embedding module.
        """
        if not token_ids:
            raise ValueError("token_ids must hold at least one token, got none")
        ids = [token_ids[i % len(token_ids)] for i in range(num_virtual_tokens)]
        return cls._from_ids(torch.tensor(ids), embedding, num_prompts)

    @classmethod
    def from_vocabulary(
        cls,
        embedding: nn.Embedding,
        num_virtual_tokens: int,
        num_prompts: int = 1,
        generator: torch.Generator | None = None,
    ) -> "PromptTuning":
        """Start from the embeddings of tokens drawn uniformly from the vocabulary, as PEFT's SAMPLE_VOCAB."""
        ids = torch.randint(0, embedding.weight.shape[0], (num_prompts, num_virtual_tokens), generator=generator)
        return cls._from_ids(ids, embedding, num_prompts)

    @classmethod
    def from_labels(
        cls,
        label_token_ids: Sequence[Sequence[int]],
        embedding: nn.Embedding,
        num_virtual_tokens: int,
        num_prompts: int = 1,
        generator: torch.Generator | None = None,
    ) -> "PromptTuning":
        """Start from the class labels: virtual token c is the mean embedding of label c's tokens, and those beyond the
        labels are drawn from the vocabulary, anew for every prompt.

        Args:
            label_token_ids: the tokenized label of each class, a list of at most P non-empty lists of ints.
            embedding: the model's input embedding module.
        """
        for index, ids in enumerate(label_token_ids):
            if not ids:
                raise ValueError(f"label_token_ids must hold at least one token a label, got none for label {index}")
        if not 0 < len(label_token_ids) <= num_virtual_tokens:
            limit = f"1 to num_virtual_tokens={num_virtual_tokens}"
            raise ValueError(f"label_token_ids must hold {limit} labels, got {len(label_token_ids)}")
        method = cls.from_vocabulary(embedding, num_virtual_tokens, num_prompts, generator)
        with torch.no_grad():
            for index, ids in enumerate(label_token_ids):
                rows = embedding(torch.tensor(ids, device=embedding.weight.device))
                method.prompt[:, index] = rows.float().mean(0)
        return method

    @classmethod
    def _from_ids(cls, ids: torch.Tensor, embedding: nn.Embedding, num_prompts: int) -> "PromptTuning":
        with torch.no_grad():
            init = embedding(ids.to(embedding.weight.device))
        return cls(ids.shape[-1], init.shape[-1], num_prompts, init)

    @property
    def num_prompts(self) -> int:
        return self.prompt.shape[0]

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt.shape[1]

    @property
    def token_dim(self) -> int:
        return self.prompt.shape[2]

    def forward(self) -> torch.Tensor:
        """All prompts, ``[N * P, D]``."""
        return self.prompt.flatten(0, 1)


def ensemble_vote(logits: torch.Tensor) -> torch.Tensor:
    """The class that most of N prompts predict, as in section 6 of the paper; among equals the one with the highest
    mean logit.

    N prompts trained for the same task are an ensemble in one model: run each example once with every prompt, as rows
    of one batch.

    Args:
        logits: ``[N, B, C]`` logits over the classes from each prompt, floating point.

    Returns:
        ``[B]`` int64 classes.

    Raises:
        TypeError, ValueError: no such tensor, or one without a prompt or a class.
    """
    check_tensor("logits", logits, ["N", "B", "C"], dtypes=FLOATS)
    if logits.shape[0] == 0 or logits.shape[2] == 0:
        raise ValueError(f"logits must hold at least one prompt and one class, got shape {list(logits.shape)}")
    votes = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    # A class that some prompt rules out by -inf may have been voted for by others; it must stay above the losers.
    mean = logits.double().mean(0).clamp(min=torch.finfo(torch.float64).min)
    return mean.masked_fill(votes < votes.amax(-1, keepdim=True), -torch.inf).argmax(-1)


def check_sizes(**sizes: int) -> None:
    """Check that each is an int of at least 1, else ValueError."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def initial_values(init: torch.Tensor, shape: Sequence[int], *others: Sequence[int]) -> torch.Tensor:
    """A new fp32 tensor of shape ``shape`` from ``init``, which has that shape or one of ``others`` and is broadcast.

    Raises:
        TypeError: ``init`` is no tensor.
        ValueError: it has another shape.
    """
    shapes = " or ".join(str(list(s)) for s in (shape, *others))
    if not isinstance(init, torch.Tensor):
        raise TypeError(f"init must be a torch.Tensor of shape {shapes}, got {type(init).__name__}")
    if tuple(init.shape) not in (shape, *others):
        raise ValueError(f"init must have shape {shapes}, got {list(init.shape)}")
    return init.detach().float().expand(shape).clone(memory_format=torch.contiguous_format)
