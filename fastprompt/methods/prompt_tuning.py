"""Prompt Tuning: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691."""

import torch
from torch import nn


class PromptTuning(nn.Module):
    """N learned prompts of P virtual tokens each, in front of the text.

    Args:
        num_virtual_tokens: P, at least 1.
        token_dim: D, the width of the model's embeddings.
        num_prompts: N, at least 1; a batch may mix them row by row.
        init: ``[P, D]`` or ``[N, P, D]`` starting values, for example embeddings of a text (:meth:`from_text`) or of
            sampled vocabulary (:meth:`from_vocabulary`). None: standard normal, as PEFT's RANDOM.

    Attributes:
        prompt: ``[N, P, D]`` fp32 parameter.

    Raises:
        ValueError: a size below 1, or an ``init`` of another shape.
    """

    def __init__(self, num_virtual_tokens, token_dim, num_prompts=1, init=None):
        super().__init__()
        for name, value in dict(num_virtual_tokens=num_virtual_tokens, token_dim=token_dim, num_prompts=num_prompts).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        shape = (num_prompts, num_virtual_tokens, token_dim)
        if init is None:
            init = torch.randn(shape)
        elif tuple(init.shape) not in (shape, shape[1:]):
            raise ValueError(f"init must have shape {list(shape)} or {list(shape[1:])}, got {list(init.shape)}")
        self.prompt = nn.Parameter(init.detach().float().expand(shape).clone())

    @classmethod
    def from_text(cls, token_ids, embedding, num_virtual_tokens, num_prompts=1):
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
    def from_vocabulary(cls, embedding, num_virtual_tokens, num_prompts=1, generator=None):
        """Start from the embeddings of tokens drawn uniformly from the vocabulary, as PEFT's SAMPLE_VOCAB."""
        ids = torch.randint(0, embedding.weight.shape[0], (num_prompts, num_virtual_tokens), generator=generator)
        return cls._from_ids(ids, embedding, num_prompts)

    @classmethod
    def _from_ids(cls, ids, embedding, num_prompts):
        with torch.no_grad():
            init = embedding(ids.to(embedding.weight.device))
        return cls(ids.shape[-1], init.shape[-1], num_prompts, init)

    @property
    def num_prompts(self):
        return self.prompt.shape[0]

    @property
    def num_virtual_tokens(self):
        return self.prompt.shape[1]

    def forward(self):
        """All prompts, ``[N * P, D]``."""
        return self.prompt.flatten(0, 1)
