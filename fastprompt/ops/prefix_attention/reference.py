"""prefix_attention in plain PyTorch, one sequence at a time: the definition every other backend is measured against."""

import torch

from ...checks import accumulator
from ..sums import sum_rows


def forward(
    q, k, v, prefix_k, prefix_v, seq, *, causal, window, softcap, sinks, scale, dropout=None,
    alibi_slopes=None, position_bias=None, key_seq=None,
):  # fmt: skip
    """Softmax attention of every query over its prefix and its own visible keys. Returns ``out`` and ``lse``."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])  # [Rq, H, Dv]; rows outside every sequence stay zero
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=accumulator(q.dtype))
    for part in _parts(seq, key_seq, q, k, v, prefix_k, prefix_v):
        score, _ = part.scores(causal, window, softcap, scale, alibi_slopes, position_bias)
        denominator = torch.logsumexp(score, -1)  # [H, n]
        if sinks is not None:
            denominator = torch.logaddexp(denominator, sinks.to(score.dtype)[:, None])
        weight = torch.exp(score - denominator[..., None]).nan_to_num(0.0)  # a row that sees nothing: 0 / 0
        if dropout is not None:
            weight = weight * part.kept(dropout)
        out[part.rows] = torch.einsum("hqk,khd->qhd", weight, part.v).to(out.dtype)
        lse[:, part.rows] = denominator.to(lse.dtype)
    return out, lse


def backward(
    grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, causal, window, softcap, sinks, scale, dropout=None,
    alibi_slopes=None, position_bias=None, key_seq=None, needs=(True,) * 6,
):  # fmt: skip
    """Gradients of q, k, v, prefix_k, prefix_v, sinks, from the final out and lse; None where there is no such input.

    ``needs`` is for backends that can leave some out; here those of the prefixes, which may be a large bank. With
    weights p = exp(score - lse) and dropout's factors m: dv = (p m)^T dout, dscore = p (m dout v^T - rowsum(dout out)),
    since out is the sum of p m v; a sink takes the weight that is left over,
    dsink = -sum exp(sink - lse) rowsum(dout out).
    """
    acc = accumulator(q.dtype)
    dq, dk, dv = (torch.zeros(t.shape, dtype=acc, device=t.device) for t in (q, k, v))
    dprefix_k, dprefix_v = (
        torch.zeros(t.shape, dtype=acc, device=t.device) if t is not None and need else None
        for t, need in zip((prefix_k, prefix_v), needs[3:])
    )
    groups = q.shape[1] // k.shape[1]  # [Rk, Hkv, width] and the decode cache [B, Hkv, Lmax, width] alike
    delta = (grad.to(acc) * out.to(acc)).sum(-1).t()  # [H, Rq]
    for part in _parts(seq, key_seq, q, k, v, prefix_k, prefix_v):
        score, slope = part.scores(causal, window, softcap, scale, alibi_slopes, position_bias)
        dscore, used = part.differentiate(score, grad, delta, lse, dropout)
        if slope is not None:
            dscore = dscore * slope
        dq[part.rows] = scale * torch.einsum("hqk,khd->qhd", dscore, part.k)
        dkeys = _sum_heads(scale * torch.einsum("hqk,qhd->khd", dscore, part.q), groups)
        dvalues = _sum_heads(torch.einsum("hqk,qhd->khd", used, grad[part.rows].to(acc)), groups)
        part.own(dk).add_(dkeys[part.prefix :])
        part.own(dv).add_(dvalues[part.prefix :])
        part.add_in_front(dkeys, dk, dprefix_k)
        part.add_in_front(dvalues, dv, dprefix_v)
    dsinks = None
    if sinks is not None:
        left_over = torch.exp(sinks.to(acc)[:, None] - lse.to(acc)).masked_fill(lse == -torch.inf, 0.0)
        dsinks = -(left_over * delta).sum(-1)
    return dq, dk, dv, dprefix_k, dprefix_v, dsinks


def position_bias_gradient(
    grad, q, k, v, prefix_k, prefix_v, out, lse, seq, *, causal, window, softcap, sinks, scale, position_bias,
    dropout=None,
):  # fmt: skip
    """The gradient ``[H, 2 * M + 1]`` of the table, from whichever backend's out and lse: dscore summed by distance."""
    acc = accumulator(q.dtype)
    delta = (grad.to(acc) * out.to(acc)).sum(-1).t()  # [H, Rq]
    total = torch.zeros(position_bias.shape, dtype=acc, device=q.device).t()
    for part in _parts(seq, None, q, k, v, prefix_k, prefix_v):
        score, _ = part.scores(causal, window, softcap, scale, None, position_bias)
        dscore, _ = part.differentiate(score, grad, delta, lse, dropout)  # [H, n, keys]
        column = part.bias_columns(position_bias)  # [n, keys]
        total = total + sum_rows(dscore.permute(1, 2, 0).flatten(0, 1), column.flatten(), len(total))
    return total.t()


class _Part:
    """One sequence with its prefix in front: queries, keys and values in the accumulator's dtype, heads repeated."""

    def __init__(self, seq, key_seq, index, q, k, v, prefix_k, prefix_v):
        start, length, prefix_id, gap = (int(x[index]) for x in seq.host[:4])
        queries, column = int(seq.host.queries[index]), int(seq.host.key_starts[index])
        self.decode, self.index = seq.kind == "decode", index
        self.rows, self.key_rows, self.length = slice(start, start + queries), slice(start, start + length), length
        self.columns = slice(column, column + length)
        self.pages = None if seq.host.pages is None else torch.from_numpy(seq.host.pages[index])
        if key_seq is not None:
            start, self.length = (int(x[index]) for x in key_seq.host[:2])
            self.key_rows = slice(start, start + self.length)
        self.prefix_id = prefix_id
        self.prefix = int(seq.prefix_lengths(0 if prefix_k is None else prefix_k.shape[1])[index])
        self.chain = seq.chains[prefix_id, : self.prefix] if self.prefix and seq.chains is not None else None
        acc = accumulator(q.dtype)
        keys, values = self.own(k), self.own(v)
        if self.prefix:
            keys = torch.cat([self.in_front(k, prefix_k), keys])
            values = torch.cat([self.in_front(v, prefix_v), values])
        groups = q.shape[1] // keys.shape[1]
        self.q = q[self.rows].to(acc)  # [n, H, Dh]
        self.k = keys.to(acc).repeat_interleave(groups, 1)  # [prefix + length, H, Dh]
        self.v = values.to(acc).repeat_interleave(groups, 1)  # [prefix + length, H, Dv]
        first = self.prefix + gap  # the position of the first own key
        own = first + torch.arange(self.length, device=q.device)
        self.key_positions = torch.cat([torch.arange(self.prefix, device=q.device), own])
        self.query_positions = first + torch.arange(length - queries, length, device=q.device)

    def own(self, tensor):
        """The view of k, v or their gradients that belongs to this sequence; of pages a copy: ``[length, Hkv, n]``."""
        if self.pages is not None:
            column = torch.arange(self.columns.start, self.columns.stop)
            size = tensor.shape[2]
            return tensor[self.pages[column // size], :, column % size]
        if self.decode:
            return tensor[self.index, :, self.columns].transpose(0, 1)
        return tensor[self.key_rows]

    def in_front(self, own, learned):
        """The keys or values of the prefix, ``[prefix, Hkv, width]``, out of k or v and of the learned ones."""
        if self.chain is None:
            return learned[self.prefix_id, : self.prefix]
        front = own.new_empty(self.prefix, *own.shape[1:])
        for place, x, index in self._places(own, learned):
            front[place] = x[index]
        return front

    def add_in_front(self, grads, own, learned):
        """Add the gradients of the prefix to those of k or v and of the learned ones, which may be None."""
        if self.chain is None:
            if self.prefix and learned is not None:
                learned[self.prefix_id, : self.prefix] += grads[: self.prefix]
            return
        for place, total, index in self._places(own, learned):
            once = index.unique()
            total[once] += sum_rows(grads[: self.prefix][place], index, len(total))[once]

    def _places(self, own, learned):
        """The places in the chain of rows of ``own`` and of learned ones, each with the tensor and where they are
        there."""
        rows = self.chain >= 0
        yield rows, own, self.chain[rows]
        if learned is not None:
            yield ~rows, learned.flatten(0, 1), -1 - self.chain[~rows]

    def bias_columns(self, position_bias):
        """``[n, keys]`` the column of the table that each score gains."""
        most = position_bias.shape[1] // 2
        return most + (self.key_positions - self.query_positions[:, None]).clamp(-most, most)

    def scores(self, causal, window, softcap, scale, alibi_slopes=None, position_bias=None):
        """Masked scores ``[H, n, keys]``, and their derivative by the plain scores where they are capped."""
        score, slope = scale * torch.einsum("qhd,khd->hqk", self.q, self.k), None
        if softcap is not None:
            capped = torch.tanh(score / softcap)
            score, slope = softcap * capped, 1 - capped.square()
        distance = self.query_positions[:, None] - self.key_positions
        if alibi_slopes is not None:
            score = score - alibi_slopes.to(score.dtype)[:, None, None] * distance
        if position_bias is not None:
            score = score + position_bias.to(score.dtype)[:, self.bias_columns(position_bias)]
        hidden = (distance < 0) & causal
        if window is not None:
            hidden = hidden | (distance.abs() >= window)
        return score.masked_fill(hidden, -torch.inf), slope

    def differentiate(self, score, grad, delta, lse, dropout):
        """The gradient of the scores ``[H, n, keys]``, and the weights as they multiply values."""
        weight = torch.exp(score - lse[:, self.rows, None].to(score.dtype)).nan_to_num(0.0)
        used, dweight = weight, torch.einsum("qhd,khd->hqk", grad[self.rows].to(score.dtype), self.v)
        if dropout is not None:
            factor = self.kept(dropout)
            used, dweight = used * factor, dweight * factor
        return weight * (dweight - delta[:, self.rows, None]), used

    def kept(self, dropout):
        """What dropout multiplies the weights ``[H, n, keys]`` by: 0 or 1 / (1 - p)."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=self.q.device)
        return dropout.kept(rows, self.q.shape[1], self.key_positions).to(self.q.dtype) * dropout.scale


def _parts(seq, key_seq, q, k, v, prefix_k, prefix_v):
    """The sequences with queries and, in cross-attention, keys."""
    for index, queries in enumerate(seq.host.queries):
        if queries:
            part = _Part(seq, key_seq, index, q, k, v, prefix_k, prefix_v)
            if len(part.key_positions):
                yield part


def _sum_heads(x, groups):
    """Sum the query heads that share a key head: ``[keys, H, width]`` -> ``[keys, Hkv, width]``."""
    return x.view(x.shape[0], -1, groups, x.shape[2]).sum(2)
