"""What other implementations of prefix attention do, launch by launch, in their favour where there is a choice.

A tensor's block is what one sequence has of it in one head.
"""

from .counts import BYTES
from .traffic import Launch, Program, Touch, stream


def peft(w, direction, _chip):
    if direction == "decode":
        batch, queries, keys = len(w.lengths), 1, w.prefix + max(w.lengths)
        first = [
            _copy(
                "concatenate " + x,
                w,
                {x + "_cache": (keys - 1) * w.kv_heads, x: w.kv_heads},
                {x + "c": keys * w.kv_heads},
            )
            for x in "kv"
        ]
    else:
        batch, queries, keys = len(w.lengths), max(w.lengths), w.prefix + max(w.lengths)
        first = [
            _copy(
                "concatenate " + x,
                w,
                {"prefix_" + x: w.prefix * w.kv_heads, x: queries * w.kv_heads},
                {x + "c": keys * w.kv_heads},
            )
            for x in "kv"
        ]
    row, mask = w.head_dim * BYTES, queries * keys
    if direction != "backward":
        repeat = [
            _copy("repeat heads of " + x, w, {x + "c": keys * w.kv_heads}, {x + "r": keys * w.heads}) for x in "kv"
        ]
        bias = stream("mask to bias", {"mask": batch * mask}, {"bias": batch * mask * BYTES}, batch)

        def sources(b, h):
            return [("kr", b, h, keys * row), ("vr", b, h, keys * row), ("bias", b, 0, mask * BYTES)]

        attend = _tiles("memory-efficient forward", w, [queries] * batch, 64, 64, lambda n, q1: keys, 2, sources)
        return [*first, *repeat, bias, attend]
    read = {"q": queries, "dout": queries, "kr": keys, "vr": keys}
    whole = [
        Program(
            [Touch((x, b, h), n * row, n * row) for x, n in read.items()]
            + [Touch(("bias", b), mask * BYTES, mask * BYTES), Touch(("delta", b, h), 8 * queries, 8 * queries)]
            + [Touch((x, b, h), n * row, n * row, True) for x, n in (("dq", queries), ("dkr", keys), ("dvr", keys))],
            5 * 2 * 64 * 64 * w.head_dim * -(-queries // 64) * -(-keys // 64),
        )
        for b in range(batch)
        for h in range(w.heads)
    ]
    summed = [_copy("sum heads of d" + x, w, {f"d{x}r": keys * w.heads}, {f"d{x}c": keys * w.kv_heads}) for x in "kv"]
    return [
        _copy("delta", w, {"dout": queries * w.heads, "out": queries * w.heads}, {}, {"delta": 4 * queries * w.heads}),
        Launch("memory-efficient backward", whole),
        *summed,
        *_sum_prefix(w, "c"),
    ]


def flash(w, direction, _chip):
    row = w.head_dim * BYTES
    if direction == "decode":  # the prefix stands in every sequence's own cache
        programs = []
        for b, n in enumerate(w.lengths):
            for h in range(w.kv_heads):
                for part in range(0, w.prefix + n, 256):
                    size, result = min(256, w.prefix + n - part) * row, 4 * w.group * w.head_dim
                    touches = [Touch((x, b, h, part), size, size) for x in "kv"]
                    touches.append(Touch(("part", b, h, part), result, result, True))
                    programs.append(Program(touches, 4 * 64 * 256 * w.head_dim))
        parts = [touch for program in programs for touch in program.touches if touch.write]
        combine = [Program([touch._replace(write=False)]) for touch in parts]
        outputs = stream("", {}, {"out": len(w.lengths) * w.heads * row}, len(w.lengths)).programs
        return [Launch("split-KV", programs), Launch("combine", combine + outputs)]
    full = [w.prefix + n for n in w.lengths]
    if direction == "forward":
        gather = [Launch("gather " + x, [Program([
            Touch(("prefix_" + x,), w.prefix * w.kv_heads * row, w.prefix * w.kv_heads * row),
            Touch((x, b), n * w.kv_heads * row, n * w.kv_heads * row),
            *(Touch((x + "c", b, h), (w.prefix + n) * row, (w.prefix + n) * row, True) for h in range(w.kv_heads)),
        ]) for b, n in enumerate(w.lengths)]) for x in "kv"]  # fmt: skip
        return [
            *gather,
            _tiles(
                "flash forward",
                w,
                w.lengths,
                128,
                64,
                lambda n, q1: w.prefix + q1,
                2,
                lambda b, h: [(x + "c", b, h // w.group, full[b] * row) for x in "kv"],
            ),
        ]
    programs, grouped = [], w.group > 1
    for b, n in enumerate(w.lengths):
        for h in range(w.heads):
            for k0 in range(0, full[b], 64):
                rows, seen = (
                    min(64, full[b] - k0),
                    n - max(0, k0 - w.prefix),
                )  # the queries from the block's own keys on
                touches = [Touch((x + "c", b, h // w.group, k0), rows * row, rows * row) for x in "kv"]
                touches += [Touch((x, b, h), n * row, seen * row) for x in ("q", "dout")]
                touches.append(Touch(("delta", b, h), 8 * n, 8 * seen))
                touches.append(Touch(("dq32", b, h), 2 * n * row, 4 * seen * row, True))
                touches += [
                    Touch((f"d{x}{'r' if grouped else 'c'}", b, h, k0), rows * row, rows * row, True) for x in "kv"
                ]
                programs.append(Program(touches, 5 * 2 * 64 * 128 * w.head_dim * -(-seen // 128)))
    all_rows = w.rows * w.heads
    launches = [
        stream(
            "delta, zero dq",
            {"dout": all_rows * row, "out": all_rows * row},
            {"delta": 4 * all_rows, "dq32": 2 * all_rows * row},
            len(w.lengths),
        ),
        Launch("flash backward", programs),
        stream("dq to bf16", {"dq32": 2 * all_rows * row}, {"dq": all_rows * row}, len(w.lengths)),
    ]
    keys = sum(full) * w.kv_heads * row
    if grouped:
        launches += [
            stream(f"sum heads of d{x}", {f"d{x}r": keys * w.group}, {f"d{x}c": keys}, len(w.lengths)) for x in "kv"
        ]
    own = w.rows * w.kv_heads * row
    launches += [stream(f"own d{x}", {f"d{x}c": own}, {f"d{x}": own}, len(w.lengths)) for x in "kv"]
    return launches + _sum_prefix(w, "p")


def flex_packed(w, direction, _chip):
    row, total, size = w.head_dim * BYTES, w.prefix + w.rows, 128
    starts = [sum(w.lengths[:b]) for b in range(len(w.lengths))]
    bounds = [(s, s + n) for s, n in zip(starts, w.lengths) for _ in range(n)]
    seen = {}  # query block -> key blocks
    for q0 in range(0, w.rows, size):
        q1 = min(q0 + size, w.rows)
        prefix, own = range(0, w.prefix, size), range((w.prefix + bounds[q0][0]) // size * size, w.prefix + q1, size)
        seen[q0] = sorted({k0 // size for k0 in (*prefix, *own)})

    def block(name, head, i, rows, write=False):
        n = min(size, rows - i * size) * row
        return Touch((name, head, i), n, n, write)

    product = 2.0 * size * size * w.head_dim
    if direction == "forward":
        join = [
            stream(
                "concatenate " + x,
                {x: w.rows * w.kv_heads * row, "prefix_" + x: w.prefix * w.kv_heads * row},
                {x + "c": total * w.kv_heads * row},
                264,
            )
            for x in "kv"
        ]
        programs = [
            Program(
                [block("q", h, q0 // size, w.rows)]
                + [block(x + "c", h // w.group, i, total) for i in blocks for x in "kv"]
                + [block("out", h, q0 // size, w.rows, True)],
                2 * product * len(blocks),
            )
            for h in range(w.heads)
            for q0, blocks in seen.items()
        ]
        return [*join, Launch("flex forward", programs)]
    programs = [
        Program(
            [block(x, h, q0 // size, w.rows) for x in ("q", "dout")]
            + [block(x + "c", h // w.group, i, total) for i in blocks for x in "kv"]
            + [block("dq", h, q0 // size, w.rows, True)],
            3 * product * len(blocks),
        )
        for h in range(w.heads)
        for q0, blocks in seen.items()
    ]
    for head in range(w.kv_heads):
        for i in range(-(-total // size)):
            readers = [q0 // size for q0, blocks in seen.items() if i in blocks]
            touches = [block(x + "c", head, i, total) for x in "kv"]
            touches += [block(x, h, j, w.rows) for h in w.group_of(head) for j in readers for x in ("q", "dout")]
            touches += [block(f"d{x}c", head, i, total, True) for x in "kv"]
            programs.append(Program(touches, 4 * product * len(readers) * w.group))
    all_rows = w.rows * w.heads
    delta = stream("delta", {"dout": all_rows * row, "out": all_rows * row}, {"delta": 4 * all_rows}, 264)
    return [delta, Launch("flex backward", programs)]


def flex_shared(w, direction, _chip):
    """Padded queries: one call on the shared prefix, one on the own keys, and their merge."""
    row, batch, longest = w.head_dim * BYTES, len(w.lengths), max(w.lengths)

    def own(b, h):
        return [(x, b, h // w.group, longest * row) for x in "kv"]

    def shared(b, h):
        return [("prefix_" + x, 0, h // w.group, w.prefix * row) for x in "kv"]

    def whole_prefix(n, q1):
        return w.prefix

    def up_to_itself(n, q1):
        return q1

    padded, queries = [longest] * batch, longest * w.heads
    if direction == "forward":
        return [
            _tiles("flex forward, prefix", w, padded, 128, 128, whole_prefix, 2, shared, out="out_p"),
            _tiles("flex forward, own", w, padded, 128, 128, up_to_itself, 2, own, out="out_o"),
            _copy("merge", w, {"out_p": queries, "out_o": queries}, {"out": queries}),
        ]
    launches = [
        _copy(
            "merge backward",
            w,
            dict.fromkeys(("dout", "out_p", "out_o"), queries),
            dict.fromkeys(("dout_p", "dout_o"), queries),
        )
    ]
    for part, sources, keys, span in (("p", shared, w.prefix, whole_prefix), ("o", own, longest, up_to_itself)):
        launches.append(
            _copy("delta " + part, w, {"dout_" + part: queries, "out_" + part: queries}, {}, {"delta": 4 * queries})
        )
        programs = _tiles("", w, padded, 128, 128, span, 3, sources, extra=("dout_" + part,), out="dq_" + part).programs
        for b in range(batch):
            for head in range(w.kv_heads):
                touches = [Touch((name, at, h, 0), size, size) for name, at, h, size in sources(b, head * w.group)]
                touches += [
                    Touch((x, b, h, 0), longest * row, longest * row)
                    for h in w.group_of(head)
                    for x in ("q", "dout_" + part)
                ]
                touches += [Touch((f"d{x}_{part}", b, head), keys * row, keys * row, True) for x in "kv"]
                pairs = -(-keys // 128) * -(-longest // 128)
                programs.append(Program(touches, 4 * 2 * 128 * 128 * w.head_dim * pairs * w.group))
        launches.append(Launch("flex backward " + part, programs))
    return [*launches, _copy("add dq", w, {"dq_p": queries, "dq_o": queries}, {"dq": queries}), *_sum_prefix(w, "_p")]


def _copy(name, w, reads, writes, bytes_written=None):
    """A pass over tensors ``{name: rows of Dh values a sequence}``."""
    batch, row = len(w.lengths), w.head_dim * BYTES

    def scaled(sizes, size):
        return {x: n * size * batch for x, n in sizes.items()}

    return stream(name, scaled(reads, row), scaled(writes, row) | scaled(bytes_written or {}, 1), batch)


def _tiles(name, w, lengths, block_q, block_k, span, products, sources, extra=(), out="out"):
    """A program a sequence, head, tile of queries; ``span(n, q1)``: keys it runs over; ``sources``: what it reads."""
    row, programs = w.head_dim * BYTES, []
    for b, n in enumerate(lengths):
        for h in range(w.heads):
            for q0 in range(0, n, block_q):
                q1 = min(q0 + block_q, n)
                size, keys = (q1 - q0) * row, span(n, q1)
                touches = [Touch((x, b, h, q0), size, size) for x in ("q", *extra)]
                touches += [Touch((x, *at, 0), whole, whole) for x, *at, whole in sources(b, h)]
                touches.append(Touch((out, b, h, q0), size, size, True))
                programs.append(Program(touches, 2.0 * products * block_q * block_k * w.head_dim * -(-keys // block_k)))
    return Launch(name, programs)


def _sum_prefix(w, suffix):
    """The gradient of the shared prefix from that of its copies."""
    size = w.prefix * w.kv_heads * w.head_dim * BYTES
    return [
        stream(f"sum dprefix_{x}", {f"d{x}{suffix}": len(w.lengths) * size}, {f"dprefix_{x}": size}, 264) for x in "kv"
    ]
