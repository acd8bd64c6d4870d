"""What our prefix attention does, counted from the launches that it makes itself."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from unittest import mock

import torch
from fastprompt.kernels import launch as kernel_launch

from fastprompt import Sequences

from . import binary
from .chips import CHIPS
from .traffic import Launch, Program, Touch

BYTES = 2  # bf16
ROWS = 16  # a block of memory in the cache's model: this many rows of one head


@dataclass(frozen=True)
class Workload:
    """Sequences of these lengths (decode: keys in their caches) behind one prefix of ``prefix`` keys.

    ``value_dim``: the width of values, None: that of keys.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    prefix: int
    lengths: tuple
    value_dim: int | None = None

    @property
    def widths(self):
        """Of keys and of values."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def rows(self):
        return sum(self.lengths)

    @property
    def group(self):
        return self.heads // self.kv_heads

    def group_of(self, kv_head):
        """The query heads that read a key head."""
        return range(kv_head * self.group, (kv_head + 1) * self.group)

    def floor(self, direction):
        """Bytes of inputs, saved tensors and outputs, each once."""
        both = sum(self.widths) * BYTES
        queries = (len(self.lengths) if direction == "decode" else self.rows) * self.heads
        keys = (self.rows + self.prefix) * self.kv_heads * both
        if direction == "backward":  # q and dq, out and dout; keys, values and their gradients; lse
            return 2 * queries * both + 2 * keys + 4 * queries
        return queries * both + keys + 4 * queries

    def useful_flops(self, direction):
        """Two products of visible pairs forward, five backward."""
        if direction == "decode":
            pairs = sum(self.prefix + n for n in self.lengths)
        else:
            pairs = sum(n * self.prefix + n * (n + 1) // 2 for n in self.lengths)
        keys, values = self.widths
        products = 3 * keys + 2 * values if direction == "backward" else keys + values
        return 2 * products * pairs * self.heads


@contextmanager
def _recorded(target):
    """The launches that are made, as ``(Launch, {argument or constant: value})``."""
    found, call = [], kernel_launch.Kernel.__call__

    def record(kernel, grid, options, *arguments, **constants):
        call(kernel, grid, options, *arguments, **constants)
        found.append((launches[-1], kernel_launch.by_field(dict(zip(kernel.arguments, arguments)) | constants)))

    with kernel_launch.capture(target) as launches, mock.patch.object(kernel_launch.Kernel, "__call__", record):
        yield found


@cache
def _resident(launch, chip):
    contents = binary.inspect(launch.compile(CHIPS[chip].target))
    return max(1, CHIPS[chip].resident(contents.registers, contents.shared, launch.options.num_warps))


def ours(workload, direction, chip):
    """The launches of ``backend="triton"``."""
    from fastprompt.ops.prefix_attention import triton as launcher

    w, batch = workload, len(workload.lengths)
    new = partial(torch.empty, dtype=torch.bfloat16)  # on the CPU, where tables can be read; never touched
    if direction == "decode":
        seq, keys = Sequences.decode(w.lengths), (batch, w.kv_heads, max(w.lengths))
    else:
        seq, keys = Sequences.packed([sum(w.lengths[:b]) for b in range(batch + 1)]), (w.rows, w.kv_heads)
    q, k, v = new(seq.rows, w.heads, w.head_dim), *(new(*keys, width) for width in w.widths)
    inputs = q, k, v, *(new(1, w.prefix, w.kv_heads, width) for width in w.widths)
    out = new(seq.rows, w.heads, w.widths[1])
    options = dict(causal=True, window=None, softcap=None, sinks=None, scale=w.head_dim**-0.5)
    with _recorded(CHIPS[chip].target) as calls:
        if direction == "backward":
            launcher.backward(torch.empty_like(out), *inputs, out, torch.empty(w.heads, seq.rows), seq, **options)
        else:
            launcher.forward(*inputs, seq, **options)
    launches = []
    for one, values in calls:
        name = one.kernel.name.strip("_")
        launches.append(Launch(name, getattr(_Counter(w, values), name)(one.grid), _resident(one, chip)))
    return launches


class _Counter:
    """Programs of our kernels, a method each, from the tables they are given.

    The tables' columns are those of ``kernels/prefix_attention/schedule.py``.
    """

    def __init__(self, workload, values):
        self.w, self.values = workload, values
        k, v = (width * BYTES for width in workload.widths)
        self.row = dict(q=k, dq=k, k=k, dk=k, out=v, dout=v, v=v, dv=v)  # bytes of a row
        self.fold = values.get("FOLD")

    def rows(self, name, head, start, stop, heads=1, write=False, size=None):
        """Touches of rows ``[start, stop)`` of some neighbouring heads of a tensor; ``size`` of one, unless its name
        says it."""
        size = size or self.row[name.split("prefix_")[-1]] * heads
        return [
            Touch(
                (name, head, block),
                ROWS * size,
                (min(stop, block * ROWS + ROWS) - max(start, block * ROWS)) * size,
                write,
            )
            for block in range(start // ROWS, -(-stop // ROWS))
        ]

    def queries(self, names, group, start, stop):
        """The rows of one group of folded heads in each tensor; 16 bytes a query and head are lse and spans."""
        touches = self.rows("lse", group, start, stop, size=16 * self.fold)
        for name in names:
            touches += self.rows(name, group, start, stop, self.fold)
        return touches

    def keys(self, prefix, head, start, stop, block):
        """Keys and values, block by block as the loop reads them."""
        return [touch for at in range(start, stop, block) for name in "kv"
                for touch in self.rows(prefix + name, head, at, min(at + block, stop))]  # fmt: skip

    def products(self, m, n, over_keys, over_values):
        """Operations of so many products of a tile that are as wide as keys, and as values."""
        width = over_keys * self.values["BD"] + over_values * self.values["BV"]
        return 2.0 * self.values[m] * self.values[n] * width

    def table(self, name):
        return self.values[name].tolist()

    def forward(self, grid):
        programs = []
        for group in range(grid[1]):
            head = group * self.fold // self.w.group
            for i, (q0, q1, k0, k1, _, p0, p1, _) in enumerate(self.table("tiles")):
                block = self.values["BN"]
                touches = [Touch(("table", i), 32, 32), *self.queries(["q"], group, q0, q1)]
                touches += self.keys("prefix_", head, p0, p1, block) + self.keys("", head, k0, k1, block)
                touches += self.rows("out", group, q0, q1, self.fold, write=True)
                blocks = -(-(p1 - p0) // block) + -(-(k1 - k0) // block)
                programs.append(Program(touches, self.products("BM", "BN", 1, 1) * blocks))
        return programs

    def backward(self, grid):
        return [self._item(i, item, group) for group in range(grid[1]) for i, item in enumerate(self.table("items"))]

    def _item(self, i, item, group):
        role, q0, q1, k0, k1, _, p0, p1 = item  # a row of the kernel's table
        touches = [Touch(("table", i), 32, 32)]
        rows = ["q", "dout", "out"]
        if role == 0:  # queries
            head, block = group * self.fold // self.w.group, self.values["BN"]
            touches += self.queries(rows, group, q0, q1)
            touches += self.keys("prefix_", head, p0, p1, block) + self.keys("", head, k0, k1, block)
            touches += self.rows("dq", group, q0, q1, self.fold, write=True)
            blocks = -(-(p1 - p0) // block) + -(-(k1 - k0) // block)
            return Program(touches, self.products("BM", "BN", 2, 1) * blocks)
        if group >= self.w.kv_heads:
            return Program(touches)
        own, parts, step = role == 1, self.w.group // self.fold, self.values["KEYS_BM"] // self.fold
        touches += self.keys("" if own else "prefix_", group, k0, k1, k1 - k0)
        for part in range(parts):
            for at in range(q0, q1, step):
                touches += self.queries(rows, group * parts + part, at, min(at + step, q1))
        for name in "kv":
            if own:
                touches += self.rows("d" + name, group, k0, k1, write=True)
            else:  # fp32 partial sums; the slot stands where a query item has p0
                touches += self.rows(f"partial_{name}", (p0, group), 0, k1 - k0, write=True, size=2 * self.row[name])
        return Program(touches, self.products("KEYS_BM", "KEYS_BN", 2, 2) * parts * -(-(q1 - q0) // step))

    def reduce(self, grid):
        (blocks,), rows, block = self.table("slots"), self.values["ROWS"], self.values["KEYS_BN"]
        programs = []
        for head in range(grid[1]):
            for start in range(0, self.w.prefix, rows):
                first, last, _ = blocks[start // block]
                stop, at = min(start + rows, self.w.prefix), start % block
                touches = [
                    touch
                    for slot in range(first, last)
                    for name in "kv"
                    for touch in self.rows(
                        f"partial_{name}", (slot, head), at, at + stop - start, size=2 * self.row[name]
                    )
                ]
                for name in "kv":
                    touches += self.rows(f"dprefix_{name}", head, start, stop, write=True)
                programs.append(Program(touches))
        return programs

    def decode(self, grid):
        programs, parts, room = [], self.table("parts"), max(self.w.lengths)
        first = [sum(self.w.lengths[:b]) for b in range(len(self.w.lengths))]
        for group in range(grid[1]):
            head = group * self.fold // self.w.group
            for i, (q0, q1, k0, k1, prefix, number, _, _) in enumerate(self.table("items")):
                touches = [Touch(("table", i), 32, 32), *self.queries(["q"], group, q0, q1)]
                if prefix >= 0:
                    touches += self.keys("prefix_", head, k0, k1, self.values["BN"])
                else:
                    shift = q0 * room - first[q0]  # from virtual keys to places of the cache
                    touches += self.keys("", head, k0 + shift, k1 + shift, self.values["BN"])
                for query in range(q0, q1):
                    touches.append(self._part(parts[query] + number, group, write=True))
                blocks = -(-(k1 - k0) // self.values["BN"])
                programs.append(Program(touches, self.products("BM", "BN", 1, 1) * blocks))
        return programs

    def merge(self, grid):
        """One program a query and head; counted a group of heads at a time, as they were written."""
        parts = self.table("parts")
        self.fold = self.w.group
        return [
            Program([self._part(number, group) for number in range(parts[query], parts[query + 1])]
                    + self.rows("out", group, query, query + 1, self.fold, write=True))
            for group in range(self.w.kv_heads) for query in range(grid[0])
        ]  # fmt: skip

    def _part(self, number, group, write=False):
        size = (self.w.widths[1] + 1) * 4 * self.fold
        return Touch(("part", number, group), size, size, write)
