"""Prefix attention of packed rows by other means, with the same inputs and gradients: what ``check`` compares with.

Every provider takes an :class:`Attention` and returns a function of its tensors that gives ``out [T, H, Dv]``. What
depends on the lengths alone (masks, indices) is made outside that function, once a batch, as a careful user would.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec

import torch
from torch.nn.functional import scaled_dot_product_attention

import fastprompt


def uneven(rows, low=10, high=64):
    """Lengths from low to high in a fixed uneven order, with this sum."""
    lengths = []
    while (left := rows - sum(lengths)) > 0:
        lengths.append(min(low + 23 * len(lengths) % (high - low + 1), left))
    return tuple(lengths)


@dataclass(eq=False)
class Attention:
    """Causal sequences of these lengths, packed, behind one shared prefix. ``value_dim`` None: that of keys."""

    heads: int
    kv_heads: int
    head_dim: int
    prefix: int
    lengths: tuple
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    value_dim: int | None = None

    @property
    def widths(self):
        """Of keys and of values."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def rows(self):
        return sum(self.lengths)

    @property
    def name(self):
        values = f", values of {self.value_dim}" if self.value_dim else ""
        return (
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}{values}, P = {self.prefix}, "
            f"{len(self.lengths)} sequences, {self.rows} rows"
        )

    @cached_property
    def cu_seqlens(self):
        return torch.tensor((0, *self.lengths), device=self.device).cumsum(0)

    @cached_property
    def sequence(self):
        """``[T]`` the sequence of each row."""
        return torch.repeat_interleave(torch.tensor(self.lengths, device=self.device))

    @cached_property
    def seq(self):
        return fastprompt.Sequences.packed(self.cu_seqlens)

    def tensors(self):
        """q, k, v, prefix_k, prefix_v that want gradients, and the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(0)
        new = partial(torch.randn, generator=generator, device=self.device, dtype=self.dtype)
        queries, own, shared = (self.rows, self.heads), (self.rows, self.kv_heads), (self.prefix, self.kv_heads)
        keys, values = self.widths
        shapes = (queries, keys), (own, keys), (own, values), (shared, keys), (shared, values), (queries, values)
        *inputs, grad = (new(*shape, width) for shape, width in shapes)
        return [x.requires_grad_() for x in inputs], grad


def ours(problem, backend="auto"):
    def run(q, k, v, prefix_k, prefix_v):
        return fastprompt.prefix_attention(q, k, v, prefix_k[None], prefix_v[None], problem.seq, backend=backend)[0]

    return run


def sdpa(problem):
    """As PEFT does it: padded rows, the prefix in front of each, one mask."""
    batch, longest, prefix = len(problem.lengths), max(problem.lengths), problem.prefix
    column = torch.arange(longest, device=problem.device)
    real = column < torch.tensor(problem.lengths, device=problem.device)[:, None]  # [B, S]
    own = (column[:, None] >= column) & real[:, None]  # [B, S, S]
    mask = torch.cat([own.new_ones(batch, longest, prefix), own], 2)[:, None]
    group = problem.heads // problem.kv_heads

    def padded(rows):  # [T, heads, Dh] -> [B, heads, S, Dh]
        return (
            rows.new_zeros(batch, longest, *rows.shape[1:]).masked_scatter(real[:, :, None, None], rows).transpose(1, 2)
        )

    def run(q, k, v, prefix_k, prefix_v):
        k, v = (
            torch.cat([shared.transpose(0, 1).expand(batch, -1, -1, -1), padded(rows)], 2).repeat_interleave(group, 1)
            for shared, rows in ((prefix_k, k), (prefix_v, v))
        )
        return scaled_dot_product_attention(padded(q), k, v, attn_mask=mask).transpose(1, 2)[real]

    return run


def flex(problem):
    """FlexAttention on one packed sequence with the prefix in front and a document mask; compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False) if problem.device != "cpu" else flex_attention
    sequence, prefix, rows = problem.sequence, problem.prefix, problem.rows

    def visible(b, h, query, key):
        own = (key - prefix).clamp(min=0)
        return (key < prefix) | ((sequence[query] == sequence[own]) & (query >= own))

    mask = create_block_mask(visible, None, None, rows, prefix + rows, device=problem.device)

    def run(q, k, v, prefix_k, prefix_v):
        k, v = (torch.cat(pair).transpose(0, 1)[None] for pair in ((prefix_k, k), (prefix_v, v)))
        return attend(q.transpose(0, 1)[None], k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run


def flash(problem):
    """FlashAttention's varlen kernel on prefix and own keys of every sequence, gathered into one tensor."""
    from flash_attn import flash_attn_varlen_func

    batch, prefix = len(problem.lengths), problem.prefix
    starts = problem.cu_seqlens[:-1].tolist()
    source = torch.cat([torch.cat([torch.arange(prefix), prefix + start + torch.arange(n)])
                        for start, n in zip(starts, problem.lengths)]).to(problem.device)  # fmt: skip
    cu_q = problem.cu_seqlens.int()
    cu_k = cu_q + prefix * torch.arange(batch + 1, device=problem.device, dtype=torch.int32)
    longest = max(problem.lengths)

    def run(q, k, v, prefix_k, prefix_v):
        k, v = (torch.cat(pair)[source] for pair in ((prefix_k, k), (prefix_v, v)))
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest, prefix + longest, causal=True)

    return run


def providers(problem):
    """Name -> function of the five tensors; flash-attn where it is installed, there is a GPU, and widths are equal."""
    found = {"fastprompt": ours(problem), "SDPA": sdpa(problem), "FlexAttention": flex(problem)}
    fits_flash = problem.dtype != torch.float32 and len(set(problem.widths)) == 1
    if problem.device != "cpu" and fits_flash and find_spec("flash_attn"):
        found["flash-attn"] = flash(problem)
    return found
