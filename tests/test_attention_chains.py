"""prefix_attention behind chains: rows of k and v that several sequences read where they lie."""

from dataclasses import replace

import pytest
import torch
from allocations import Allocations
from attention_cases import biased
from chains import chained, drawn
from test_prefix_attention import dense, run
from test_prefix_attention_cpu import check, ours, random_grad

from fastprompt import Sequences, native, prefix_attention
from fastprompt.ops.prefix_attention.dropout import Dropout

SMALL = (3, 7, 5, (4, 1, 0, 6, 2, 3, 8))
LARGE = (33, 140, 20, (17, 2, 60, 5, 40))  # several tiles and chunks
FLAGS = [
    {},
    dict(causal=False),
    dict(window=6),
    dict(softcap=1.5, sinks=True),
    dict(alibi=True, window=9),
]


def concatenated(q, k, v, prefix_k, prefix_v, seq, **flags):
    """Dense attention behind copies of what the chains name."""
    used = torch.arange(seq.chains.shape[1]) < seq.prefix_lens[:, None]
    index = torch.where(used, seq.chains, 0)
    index = torch.where(index < 0, len(k) - 1 - index, index)
    banks = [
        (own if learned is None else torch.cat([own, learned.flatten(0, 1)]))[index]
        for own, learned in ((k, prefix_k), (v, prefix_v))
    ]
    table = zip(*(x.tolist() for x in (seq.starts, seq.lengths, seq.prefix_ids, seq.gaps)))
    described = [(start, n, i, 0 if i < 0 else int(seq.prefix_lens[i]), gap) for start, n, i, gap in table]
    return dense(q, k, v, *banks, described, **flags)


def prepared(seq, flags, dtype=torch.float64, heads=4, kv_heads=2, widths=(8, 5), learned=True):
    flags = dict(flags)
    inputs = drawn(seq, heads, kv_heads, widths, dtype, flags.pop("sinks", False), learned)
    if flags.pop("alibi", False):
        flags |= biased("alibi", heads)
    return inputs, flags


CASES = [("reference", flags) for flags in (*FLAGS, dict(dropout=True))] + [("composed", flags) for flags in FLAGS[:2]]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("backend, flags", CASES, ids=str)
def test_equals_a_concatenation(backend, flags, learned):
    seq = chained(*SMALL, learned=learned)
    inputs, flags = prepared(seq, flags, learned=learned)
    grad = torch.randn(seq.rows, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = dict(flags), dict(flags)
    if ours.pop("dropout", False):
        ours |= dict(dropout_p=0.3, dropout_seed=5)
        theirs["dropout"] = Dropout(0.3, 5)
    expected = run(concatenated, inputs, grad, seq, **theirs)
    actual = run(prefix_attention, inputs, grad, seq, backend=backend, **ours)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


needs_library = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))


@needs_library
@pytest.mark.parametrize(
    "flags, dtype",
    [
        ({}, torch.bfloat16),
        (dict(window=50), torch.float32),
        (dict(causal=False, softcap=1.5, sinks=True), torch.float32),
    ],
    ids=str,
)
def test_the_kernel_keeps_the_budget(every_isa, flags, dtype):
    seq = chained(*LARGE)
    inputs, flags = prepared(seq, flags, dtype, 2, 1, (20, 12))
    check(every_isa, inputs, random_grad(seq, 2, 12, dtype), seq, **flags)


@needs_library
def test_rows_may_lie_apart_and_outside_of_sequences(every_isa):
    """k and v of other strides, sequences that leave rows out, and chains of such rows."""
    seq = Sequences.runs(
        [60, 20, 45], [9, 12, 15], 70, [0, 1, -1], [30, 11], None, [range(30), [*range(40, 51)] * 2 + [0] * 8]
    )
    inputs = drawn(seq, 4, 2, (8, 8), torch.float32, learned=False)
    inputs[1:3] = (
        x.repeat_interleave(2, 2)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[1:3]
    )
    check(every_isa, inputs, random_grad(seq, 4, 8), seq)


@needs_library
@pytest.mark.parametrize("asked", [(1, 2), (3, 4), (1, 4), (0,)])
def test_gradients_that_nobody_asks_for_change_no_other(asked):
    seq = chained(*SMALL)
    inputs, grad = drawn(seq, 4, 2, (8, 5), torch.float32), random_grad(seq, 4, 5)

    def gradients(wanted):
        leaves = [x if x is None else x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        ours(*leaves[:5], seq)[0].backward(grad)
        return [x.grad for x in leaves[:5]]

    whole = gradients(range(5))
    for i, x in enumerate(gradients(asked)):
        assert (x is None) == (i not in asked)
        assert x is None or torch.equal(x, whole[i])


@needs_library
def test_no_chain_is_copied():
    """A step allocates what it returns: gradients, out, lse, and what belongs to a chunk."""
    seq = chained(100, 100, 100, (2,) * 40, learned=False)  # 40 sequences of two tokens behind up to 300
    inputs, grad = drawn(seq, 2, 1, (16, 16), torch.float32, learned=False), random_grad(seq, 2, 16)
    leaves = [x if x is None else x.requires_grad_() for x in inputs]
    with Allocations() as found:
        ours(*leaves[:5], seq)[0].backward(grad)
    assert max(found.sizes) <= seq.rows * 2 * 16 < seq.chains.numel() * 16


@needs_library
def test_gradients_do_not_depend_on_threads():
    seq, before = chained(*LARGE), torch.get_num_threads()
    inputs, grad = drawn(seq, 4, 2, (20, 12), torch.float32), random_grad(seq, 4, 12)
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(ours, inputs, grad, seq))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_library
def test_the_registered_operator_takes_chains():
    seq = chained(*SMALL)
    inputs, grad = drawn(seq, 4, 2, (8, 5), torch.float32), random_grad(seq, 4, 5)
    compiled = torch.compile(
        lambda *x, **flags: prefix_attention(*x[:5], seq, **flags), fullgraph=True, backend="eager"
    )
    expected = run(prefix_attention, inputs, grad, seq)
    for x, y in zip(run(compiled, inputs, grad), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(chains=torch.full((1, 2), 7)), r"seq.chains must lie in \[-8, 7\), got values from 7"),
        (dict(chains=torch.full((1, 2), -9)), r"seq.chains must lie in \[-8, 7\), got values from -9"),
        (dict(prefix_ids=torch.tensor([0, 1])), r"seq.prefix_ids must lie in \[-1, 1\)"),
        (dict(prefix_lens=torch.tensor([3])), r"seq.prefix_lens must lie in \[0, 3\)"),
        (dict(prefix_lens=torch.tensor([1, 1])), r"seq.prefix_lens must have shape \[1\]"),
    ],
)
def test_chains_that_cannot_be_are_refused(change, message):
    seq = replace(Sequences.packed([0, 3, 7], [-1, 0], chains=[[0, 1]]), **change)
    with pytest.raises(ValueError, match=message):
        prefix_attention(*drawn(seq, 2, 1, (4, 4))[:5], seq)


def test_learned_keys_have_to_be_there():
    seq = Sequences.packed([0, 3, 7], [-1, 0], chains=[[-1, 1]])
    with pytest.raises(ValueError, match=r"seq.chains must lie in \[0, 7\)"):
        prefix_attention(*drawn(seq, 2, 1, (4, 4), learned=False)[:5], seq)
    with pytest.raises(ValueError, match="no chains with key_seq"):
        prefix_attention(*drawn(seq, 2, 1, (4, 4))[:5], seq, causal=False, key_seq=Sequences.packed([0, 3, 7]))
    with pytest.raises(ValueError, match=r"chains must have shape \[N, W\]"):
        Sequences.packed([0, 3], chains=[0, 1])
