"""The calls whose kernels are compiled: typical ones, and for each flag of the operators one that sets it.

A case runs an operator's own launching code on tensors without storage, so what is compiled is what would be launched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fastprompt import Sequences

HEAD_DIMS = (16, 32, 64, 80, 96, 100, 112, 128, 256)  # rows of 100 are no whole number of 16-byte loads
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Uneven lengths whose sum is odd: nothing may be fast only where the row count happens to divide. "even" makes it a
# multiple of 16, which gives the same variants unless a kernel depends on it.
LENGTHS = (37, 12, 64, 10, 25, 51, 18)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        op, direction: which operator; "forward", "backward" or "decode".
        label: dtype, sizes and flags.
        run: makes the call.
        everywhere: part of the sample for every target; the other cases of the sample take turns.
        native: full tiles of halves, so the matrix instructions have to be the chip's own.
    """

    op: str
    direction: str
    label: str
    run: Callable
    everywhere: bool = False
    native: bool = False


def sample():
    """The cases that are compiled by default."""
    cases = []
    for heads, kv_heads, head_dim in ((9, 3, 64), (32, 8, 128)):
        for rows in ({}, {"even": True}):
            cases += _attention("bf16", head_dim, heads, kv_heads, everywhere=True, native=True, **rows)
        features = dict(dropout=0.1), dict(alibi=True), dict(bias=128, causal=False), dict(cross=True)
        for feature in (*features, dict(chains=True, prefix=0), dict(chains=True)):
            cases += _attention("bf16", head_dim, heads, kv_heads, everywhere=True, native=True, **feature)
    flags = dict(window=48, softcap=30.0, sinks=True, layout="padded", prefixes=3)
    cases += _attention("fp16", 128, 32, 8, native=True)
    cases += _attention("fp16", 96, 4, 4, **flags)
    cases += _attention("fp32", 64, 9, 3)
    cases += _attention("bf16", 80, 8, 1, causal=False, strided=True)
    cases += _attention("bf16", 256, 8, 4)
    cases += _attention("bf16", 112, 7, 7, prefix=0)
    cases += _attention("bf16", 100, 4, 2)
    cases += _attention("bf16", 192, 16, 16, everywhere=True, native=True, value_dim=128)  # as DeepSeek V3
    cases += _attention("bf16", 24, 4, 2, value_dim=12, **flags)
    cases += _attention("fp32", 16, 4, 2, needs="prefix", **flags)
    cases += _attention("fp16", 64, 12, 12, bias=128)  # the decoder of a T5
    cases += _attention("bf16", 128, 32, 8, everywhere=True, queries=5, pages=16)
    cases += _attention("fp16", 64, 9, 3, queries=3, sinks=True, window=48)
    cases += _attention("bf16", 64, 71, 1, alibi=True)  # Falcon 7B
    cases += _attention("fp32", 64, 9, 3, alibi=True, window=48, sinks=True, layout="padded", prefixes=3, dropout=0.1)
    cases += _concat("bf16", 576, everywhere=True) + _concat("fp32", 577)
    cases += _multitask("bf16", 576, 1, everywhere=True) + _multitask("fp32", 577, 4)
    cases += _rotary("bf16", 32, 128, everywhere=True) + _rotary("fp16", 9, 64) + _rotary("fp32", 8, 80, of=128)
    cases += _row_plan("padded", everywhere=True) + _row_plan("packed", virtual=True, prompts=True, dtype=torch.int32)
    return cases


def complete():
    """Every head dim and dtype, and every flag at the usual head dims."""
    cases = sample()
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            cases += _attention(dtype, head_dim, 8, 2)
        for head_dim, value_dim in ((192, 128), (96, 64), (24, 12), (64, 256)):
            cases += _attention(dtype, head_dim, 8, 8, value_dim=value_dim)
    flags = [dict(window=48), dict(softcap=30.0), dict(sinks=True), dict(causal=False), dict(causal=False, window=48),
             dict(layout="padded"), dict(prefixes=3), dict(prefix=0), dict(strided=True), dict(dropout=0.1),
             dict(window=48, softcap=30.0, sinks=True, layout="padded", prefixes=3),
             dict(window=48, softcap=30.0, sinks=True, layout="padded", prefixes=3, dropout=0.1),
             dict(alibi=True), dict(alibi=True, window=48, sinks=True, layout="padded", prefixes=3, dropout=0.1),
             dict(bias=128), dict(bias=128, causal=False), dict(bias=128, layout="padded", prefixes=3, dropout=0.1),
             dict(cross=True), dict(cross=True, layout="padded", sinks=True, prefixes=3, dropout=0.1),
             dict(queries=5), dict(queries=1, pages=16), dict(queries=5, pages=16, alibi=True, window=48, prefixes=3),
             dict(queries=5, pages=16, bias=128, causal=False),
             dict(chains=True, prefix=0), dict(chains=True),
             dict(chains=True, window=48, softcap=30.0, sinks=True, dropout=0.1),
             dict(chains=True, alibi=True, window=48, sinks=True, dropout=0.1),
             *(dict(needs=needs) for needs in _NEEDS)]  # fmt: skip
    for dtype in DTYPES:
        for head_dim in (64, 128):
            for chosen in flags:
                cases += _attention(dtype, head_dim, 32, 8, **chosen)
            for heads, kv_heads in ((8, 8), (8, 1), (9, 3), (71, 1)):
                cases += _attention(dtype, head_dim, heads, kv_heads)
    for dtype in DTYPES:
        for width in (576, 577, 4096):
            cases += _concat(dtype, width)
            for rank in (1, 4, 16):
                cases += _multitask(dtype, width, rank)
        for head_dim in HEAD_DIMS:
            cases += _rotary(dtype, 8, head_dim) + _rotary(dtype, 8, head_dim // 4 * 2, of=head_dim)
    for kind in ("padded", "packed"):
        for virtual in (False, True):
            cases += _row_plan(kind, virtual, prompts=True)
    cases += _row_plan("padded", width=64)
    return cases


_NEEDS = {  # gradients asked for: of q, k, v, prefix_k, prefix_v, sinks
    "all": (True,) * 6,
    "prefix": (False, False, False, True, True, False),
    "inputs": (True, True, True, False, False, False),
    "query": (True, False, False, False, False, False),
}


def _attention(dtype, head_dim, heads, kv_heads, *, everywhere=False, native=False, needs="all", **flags):
    """The forward, backward and decode case with these flags; only the backward knows what ``needs`` are,
    cross-attention and chains have no decode, and ``queries`` a sequence has nothing else."""
    given = "".join(f" {name}={value}" for name, value in flags.items()) + (f" needs={needs}" if needs != "all" else "")
    label = f"{dtype} {heads}/{kv_heads}x{head_dim}{given}"
    arguments = DTYPES[dtype], head_dim, heads, kv_heads
    cases = []
    directions = ("forward", "backward", "decode") if needs == "all" else ("backward",)
    if flags.get("cross") or flags.get("chains"):
        directions = directions[:2]
    if flags.get("queries"):
        directions = directions[2:]
    for direction in directions:
        run = partial(_run_attention, direction, *arguments, needs=_NEEDS[needs], **flags)
        # Whether tiles have rows enough for the chip's own matrix instructions.
        enough_rows = direction == "forward" or direction == "backward" and head_dim <= 128
        cases.append(Case("prefix_attention", direction, label, run, everywhere, native and enough_rows))
    return cases


def _run_attention(
    direction,
    dtype,
    head_dim,
    heads,
    kv_heads,
    *,
    needs,
    causal=True,
    window=None,
    softcap=None,
    sinks=False,
    layout="packed",
    prefix=100,
    prefixes=1,
    strided=False,
    even=False,
    dropout=0.0,
    value_dim=None,
    alibi=False,
    bias=None,
    cross=False,
    queries=None,
    pages=None,
    chains=False,
):
    from fastprompt.ops.prefix_attention import triton as launcher
    from fastprompt.ops.prefix_attention.dropout import Dropout

    new = partial(torch.empty, dtype=dtype, device="meta")
    lengths = (*LENGTHS[:-1], LENGTHS[-1] + 7) if even else LENGTHS
    batch = len(lengths)
    bank = dict(
        prefix_ids=[b % (prefixes + 1) - 1 for b in range(batch)], prefix_lens=[prefix - p for p in range(prefixes)]
    )
    if direction == "decode":
        table = [[0] * -(-max(lengths) // pages)] * batch if pages else None
        seq = Sequences.decode(lengths, queries=queries, pages=table, **(bank if prefixes > 1 else {}))
    elif chains:  # the first sequence stands in front of all others, and learned keys in front of it
        chain = [*range(-1, -1 - prefix, -1), *range(lengths[0])]
        seq = Sequences.packed(
            [sum(lengths[:b]) for b in range(batch + 1)], [0] + [1] * (batch - 1), [prefix, len(chain)],
            chains=[chain, chain],
        )  # fmt: skip
    elif layout == "padded":
        seq = Sequences.padded(
            [max(lengths) - n for n in lengths], lengths, max(lengths), **(bank if prefixes > 1 else {})
        )
    else:
        seq = Sequences.packed([sum(lengths[:b]) for b in range(batch + 1)], **(bank if prefixes > 1 else {}))

    key_seq = Sequences.packed([3 * sum(lengths[:b]) for b in range(batch + 1)]) if cross else None

    def rows(count, heads, width):  # [count, heads, width], strided: a column too many in memory
        return new(count, heads * width + strided)[:, : heads * width].unflatten(1, (heads, width))

    def keys(width):
        if direction == "decode":
            return new(batch, kv_heads, pages or max(lengths), width)
        return rows(key_seq.rows if cross else seq.rows, kv_heads, width)

    widths = head_dim, value_dim or head_dim
    q, k, v = rows(seq.rows, heads, head_dim), *map(keys, widths)
    prefix_k, prefix_v = (new(prefixes, prefix, kv_heads, width) if prefix else None for width in widths)
    options = dict(
        causal=causal and not cross, window=window, softcap=softcap, sinks=new(heads) if sinks else None,
        scale=head_dim**-0.5, dropout=Dropout(dropout, seed=0) if dropout else None,
        alibi_slopes=torch.empty(heads, device="meta") if alibi else None,
        position_bias=torch.empty(heads, 2 * bias + 1, device="meta") if bias else None, key_seq=key_seq,
    )  # fmt: skip
    if direction != "backward":
        launcher.forward(q, k, v, prefix_k, prefix_v, seq, **options)
        return
    lse = torch.empty(heads, seq.rows, device="meta")
    grad, out = (new(seq.rows, heads, widths[1]) for _ in range(2))
    launcher.backward(grad, q, k, v, prefix_k, prefix_v, out, lse, seq, **options, needs=needs)


def _concat(dtype, width, everywhere=False):
    return [
        Case(
            "prompt_concat",
            direction,
            f"{dtype} D={width}",
            partial(_run_concat, direction, DTYPES[dtype], width),
            everywhere,
        )
        for direction in ("forward", "backward")
    ]


def _run_concat(direction, dtype, width):
    from fastprompt.ops.prompt_concat import triton as launcher

    source = torch.cat([-1 - torch.arange(100), torch.arange(sum(LENGTHS))]).to("meta")
    new = partial(torch.empty, dtype=dtype, device="meta")
    if direction == "forward":
        launcher.forward(source, new(32768, width), new(100, width), 1.0)
    else:
        launcher.backward(new(len(source), width), source, 1.0, 32768, 100, True, True)


def _multitask(dtype, width, rank, everywhere=False):
    return [
        Case(
            "multitask_prompt",
            direction,
            f"{dtype} D={width} rank={rank}",
            partial(_run_multitask, direction, DTYPES[dtype], width, rank),
            everywhere,
        )
        for direction in ("forward", "backward")
    ]


def _run_multitask(direction, dtype, width, rank, prompt=100, tasks=8, distinct=3):
    from fastprompt.ops.multitask_prompt import triton as launcher

    new = partial(torch.empty, dtype=dtype, device="meta")
    inputs = (
        new(prompt, width),
        new(tasks, prompt, rank),
        new(tasks, rank, width),
        torch.arange(distinct, device="meta"),
    )
    if direction == "forward":
        launcher.forward(*inputs)
    else:
        launcher.backward(new(distinct, prompt, width), *inputs, True, True, True)


def _rotary(dtype, heads, width, of=None, everywhere=False):
    """``of``: the width of the heads of which ``width`` numbers are turned, where it is not all."""
    label = f"{dtype} {heads}x{width}" + (f" of={of}" if of else "")
    arguments = DTYPES[dtype], heads, width, of or width
    return [
        Case("rotary", direction, label, partial(_run_rotary, direction, *arguments), everywhere)
        for direction in ("forward", "backward")
    ]


def _run_rotary(direction, dtype, heads, width, head_dim):
    from fastprompt.ops.rotary import triton as launcher

    new, rows = partial(torch.empty, dtype=dtype, device="meta"), sum(LENGTHS)
    x, *tables = new(1, rows, heads, head_dim)[..., :width], new(1, rows, width), new(1, rows, width)
    (launcher.forward if direction == "forward" else launcher.backward)(x, *tables)


def _row_plan(kind, virtual=False, prompts=False, dtype=torch.int64, width=4096, everywhere=False):
    given = " virtual" * virtual + " prompts" * prompts
    return [Case("row_plan", "forward", f"{str(dtype).removeprefix('torch.')} {kind} S={width}{given}",
                 partial(_run_row_plan, kind, virtual, prompts, dtype, width), everywhere)]  # fmt: skip


def _run_row_plan(kind, virtual, prompts, dtype, width, size=8, length=100):
    from fastprompt.layout import cells
    from fastprompt.layout import triton as launcher

    new = partial(torch.empty, device="meta")
    tokens = partial(new, size * width, dtype=dtype)
    sequences = (None, None) if kind == "padded" else (new(size, dtype=torch.int64), new(size, dtype=torch.int64))
    real = new(size * width, dtype=torch.bool) if kind == "padded" else None
    virtual_ids = tokens() if virtual else None
    prompt_ids = new(size, dtype=torch.int64) if prompts else None
    batch = cells.Batch(
        size, width, torch.device("meta"), *sequences, real, tokens(), virtual_ids, tokens(), prompt_ids, length, 0
    )
    launcher.measure(batch)
    launcher.fill(batch, new(len(cells.ENTRY), size, dtype=torch.int64), size * (length + width), size)
