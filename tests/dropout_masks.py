"""Inputs of prefix_attention whose results are its dropout mask, and that mask as it should be."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from fastprompt import Sequences, prefix_attention
from fastprompt.ops.prefix_attention.dropout import Dropout


class InEveryDraw(Dropout):
    """For the error budget, which runs the reference on copies of all heads at once: each with the same masks."""

    def __init__(self, p, seed, heads):
        super().__init__(p, seed)
        object.__setattr__(self, "heads", heads)

    def kept(self, rows, heads, positions):
        return super().kept(rows, self.heads, positions).repeat(heads // self.heads, 1, 1)


@dataclass
class Described:
    """Sequences ``(first row or place in the cache's batch, length, prefix id, keys of the prefix, gap)`` and sizes.

    A key has a column: those of a prefix of ``room`` keys the first, own keys those behind.
    """

    seq: object
    sequences: list
    prefixes: int
    room: int
    dropout: Dropout
    causal: bool = True

    @property
    def decode(self):
        return self.seq.kind == "decode"

    @property
    def columns(self):
        """Enough to name every key of a sequence, and every row."""
        return max(self.seq.rows, self.room + max(n for _, n, _, _, _ in self.sequences))

    def expected(self, heads):
        """``[H, Rq, columns]``: which weights are seen and kept."""
        mask = torch.zeros(heads, self.seq.rows, self.columns, dtype=torch.bool)
        for start, length, _, used, gap in self.sequences:
            if length == 0:
                continue
            own = used + gap + torch.arange(length)
            queries = own[-1:] if self.decode else own
            rows = torch.arange(start, start + len(queries))
            positions = torch.cat([torch.arange(used), own])
            kept = self.dropout.kept(rows, heads, positions)
            if self.causal:
                kept &= positions <= queries[:, None]
            places = torch.cat([torch.arange(used), self.room + torch.arange(length)])
            mask[:, rows[:, None], places] = kept
        return mask

    def inputs(self, heads, kv_heads, dtype):
        """q, k, v, prefix_k, prefix_v: all weights of a row are equal and a value names its key."""
        columns = self.columns
        names = torch.eye(columns, dtype=dtype)
        room = max(n for _, n, _, _, _ in self.sequences)
        shape = (self.seq.rows, kv_heads, room) if self.decode else (self.seq.rows, kv_heads)
        v = torch.zeros(*shape, columns, dtype=dtype)
        for start, length, *_ in self.sequences:
            own = names[self.room : self.room + length]
            if self.decode:
                v[start, :, :length] = own
            else:
                v[start : start + length] = own[:, None]
        prefix_v = names[None, : self.room, None].expand(self.prefixes, -1, kv_heads, -1).clone()
        q = torch.zeros(self.seq.rows, heads, columns, dtype=dtype)
        return q, torch.zeros_like(v), v, torch.zeros_like(prefix_v), prefix_v

    def call(self, inputs, backend):
        options = dict(causal=self.causal, dropout_p=self.dropout.p, dropout_seed=self.dropout.seed, backend=backend)
        return prefix_attention(*inputs, self.seq, **options)[0]

    def of_forward(self, heads, kv_heads, dtype, backend, put=lambda x: x):
        """The mask that the output shows."""
        inputs = [put(x) for x in self.inputs(heads, kv_heads, dtype)]
        return self.call(inputs, backend).cpu().transpose(0, 1) != 0

    def of_backward(self, heads, dtype, backend, put=lambda x: x):
        """The mask that the gradients of the values show: the gradient of an output names its row."""
        inputs = [put(x).requires_grad_() for x in self.inputs(heads, heads, dtype)]
        out, columns = self.call(inputs, backend), self.columns
        grad = put(torch.eye(columns, dtype=dtype)[: self.seq.rows, None].expand(-1, heads, -1).clone())
        dv, dprefix_v = (x.cpu() != 0 for x in torch.autograd.grad(out, [inputs[2], inputs[4]], grad))
        mask = torch.zeros(heads, self.seq.rows, columns, dtype=torch.bool)
        for start, length, prefix, used, _ in self.sequences:
            if length == 0:
                continue
            queries = 1 if self.decode else length
            rows = slice(start, start + queries)
            own = dv[start, :, :length] if self.decode else dv[rows].transpose(0, 1)  # [H, keys, columns]
            mask[:, rows, self.room : self.room + length] = own[..., rows].transpose(1, 2)
            if used:
                mask[:, rows, :used] = dprefix_v[prefix, :used, :, rows].permute(1, 2, 0)
        return mask


def describe(kind, lengths, prefixes, room, dropout, causal=True):
    """Sequences that read each of the prefixes and none in turn, the prefixes of uneven lengths, with gaps."""
    batch = len(lengths)
    ids = [b % (prefixes + 1) - 1 for b in range(batch)]
    gaps = [b % 3 for b in range(batch)]
    options = dict(prefix_ids=ids, prefix_lens=[room - p for p in range(prefixes)], gaps=gaps)
    if kind == "decode":
        seq, starts = Sequences.decode(lengths, **options), list(range(batch))
    elif kind == "padded":
        width = max(lengths) + 2
        seq = Sequences.padded([b % 3 for b in range(batch)], lengths, width, **options)
        starts = [b * width + b % 3 for b in range(batch)]
    else:
        starts = [0, *accumulate(lengths)]
        seq = Sequences.packed(starts, **options)
    used = [room - i if i >= 0 else 0 for i in ids]
    return Described(seq, list(zip(starts, lengths, ids, used, gaps)), prefixes, room, dropout, causal)
