"""Inputs of prefix_attention with ALiBi, a position bias, or keys of other rows than the queries."""

import itertools
import math

import torch
from budget import assert_within
from dropout_masks import InEveryDraw

from benchmarks.budget import attention_budget
from fastprompt import Sequences, prefix_attention

FEATURES = ["alibi", "bias", "short_bias"]


def biased(feature, heads, dtype=torch.float32):
    """The argument of a feature: slopes as ALiBi's, or a table for M = 6, or for M = 0."""
    if feature == "alibi":
        return dict(alibi_slopes=0.5 ** (torch.arange(1, heads + 1, dtype=dtype) * 8 / heads))
    shape, generator = (heads, 13 if feature == "bias" else 1), torch.Generator().manual_seed(3)
    return dict(position_bias=torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


class Cross:
    """Cross-attention: sequences of queries and of keys, inputs, a gradient, and dense attention for each sequence.

    Args:
        queries, keys: how many each sequence has.
        kind: "packed"; "padded", both; or "runs": the keys in the opposite order, with rows of nobody in between.
        room: keys that a prefix has room for.
    """

    def __init__(
        self, queries=(5, 0, 9, 1, 5, 2), keys=(3, 4, 12, 0, 1, 20), heads=4, kv_heads=2, widths=(8, 5), prefixes=2,
        room=7, dtype=torch.float64, kind="packed", sinks=False, seed=0,
    ):  # fmt: skip
        generator, batch = torch.Generator().manual_seed(seed), len(queries)
        ids = torch.randint(-1, prefixes, (batch,), generator=generator) if prefixes else torch.full((batch,), -1)
        used = torch.randint(0, room + 1, (prefixes,), generator=generator) if prefixes else None
        self.lengths, self.ids, self.used = (queries, keys), ids.tolist(), used
        self.query_starts, self.key_starts = ([0, *itertools.accumulate(n)] for n in self.lengths)
        options = dict(prefix_ids=ids, prefix_lens=used)
        if kind == "padded":
            widest = [max(n, default=0) + 2 for n in self.lengths]
            self.query_starts, self.key_starts = ([b * width + 1 for b in range(batch)] for width in widest)
            self.seq = Sequences.padded([1] * batch, queries, widest[0], **options)
            self.key_seq = Sequences.padded([1] * batch, keys, widest[1])
        else:
            self.seq, self.key_seq = Sequences.packed(self.query_starts, **options), Sequences.packed(self.key_starts)
        if kind == "runs":
            self.key_starts = [sum(keys[b + 1 :]) + 2 * (batch - b) for b in range(batch)]
            self.key_seq = Sequences.runs(self.key_starts, keys, sum(keys) + 2 * batch + 1)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        bank = [draw(prefixes, room, kv_heads, width) if prefixes else None for width in widths]
        k, v = (draw(self.key_seq.rows, kv_heads, width) for width in widths)
        q, self.grad = (draw(self.seq.rows, heads, width) for width in widths)
        self.inputs = [q, k, v, *bank, draw(heads) if sinks else None]

    def dense(self, q, k, v, prefix_k, prefix_v, sinks=None, dropout=None):
        """The contract spelled out with autograd; ``dropout`` is a Dropout, or None."""
        out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full((q.shape[1], q.shape[0]), -math.inf)
        for b, (queries, keys) in enumerate(zip(*self.lengths)):
            rows = slice(self.query_starts[b], self.query_starts[b] + queries)
            own, number = slice(self.key_starts[b], self.key_starts[b] + keys), self.ids[b]
            used = int(self.used[number]) if number >= 0 else 0
            if queries == 0 or keys + used == 0:
                continue
            seen = [x[own] if number < 0 else torch.cat([bank[number, :used], x[own]])
                    for x, bank in ((k, prefix_k), (v, prefix_v))]  # fmt: skip
            keys_of, values_of = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in seen)
            score = torch.einsum("qhd,khd->hqk", q[rows], keys_of) / math.sqrt(q.shape[2])
            columns = score if sinks is None else torch.cat([score, sinks[:, None, None].expand(-1, queries, 1)], -1)
            weight = torch.softmax(columns, -1)[..., : keys + used]
            if dropout is not None:
                kept = dropout.kept(torch.arange(rows.start, rows.stop), q.shape[1], torch.arange(keys + used))
                weight = weight * kept / (1 - dropout.p)
            out[rows] = torch.einsum("hqk,khd->qhd", weight, values_of)
            lse[:, rows] = torch.logsumexp(columns, -1)
        return out, lse

    def differentiate(self, attend, put=lambda x: x.clone()):
        """out, lse and the gradients of the six inputs, None where there is none, of ``attend(*inputs)``."""
        leaves = [x if x is None else put(x).requires_grad_() for x in self.inputs]
        out, lse = attend(*leaves)
        out.backward(put(self.grad))
        return [out.detach(), lse.detach(), *(x if x is None else x.grad for x in leaves)]

    def run(self, backend, function=prefix_attention, put=lambda x: x.clone(), **flags):
        flags = dict(causal=False, key_seq=self.key_seq, backend=backend) | flags
        return self.differentiate(lambda *x: function(*x[:5], self.seq, sinks=x[5], **flags), put)

    def budget(self, **flags):
        return attention_budget(self.inputs, self.grad, self.seq, causal=False, key_seq=self.key_seq, **flags)

    def check(self, backend, dropout_p=0.0, **options):
        """The results, within their budget."""
        dropout = InEveryDraw(dropout_p, 5, self.inputs[0].shape[1]) if dropout_p else None
        results = self.run(backend, dropout_p=dropout_p, dropout_seed=5, **options)
        assert_within(self.budget(dropout=dropout), results)
        return results
