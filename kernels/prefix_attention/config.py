"""Sizes of tiles, by rule: what fits the registers and the shared memory of a chip, and fills its matrix units.

On a device that was tuned its table (``tuned.py``) comes before the rule. Nothing is tuned at run time.
"""

from dataclasses import dataclass, replace
from functools import wraps

from ..launch import DIVISOR, Options
from ..tiles import power_of_two
from . import tuned


@dataclass(frozen=True)
class Tiles:
    """A program's tile of queries (heads of a group folded in) and of keys.

    ``key_queries`` and ``key_keys`` are those of a backward item that holds keys.
    """

    queries: int
    keys: int
    options: Options
    key_queries: int = 0
    key_keys: int = 0


def block_width(width):
    """Rows of keys and of values are padded to a power of two, at least what a matrix instruction takes."""
    return max(16, power_of_two(width))


def fold(group, *tiles):
    """How many heads of a group stand in one tile: all of them, or the most that divide it and fit."""
    return max(n for n in range(1, group + 1) if group % n == 0 and n <= min(tiles))


def _wide(*widths):
    """Whether rows consist of 16-byte loads (of halves); if not, every element is loaded from an address of its own."""
    return all(width % DIVISOR == 0 for width in widths)


def _for_widths(rule):
    """The rule for a width of keys and one of values (None: the same), by the wider of the two.

    Where they are equal the table of a device overrides it; ``device`` is its name, or None for the rule alone.
    """
    role = rule.__name__.removesuffix("_tiles")

    @wraps(rule)
    def tiles(head_dim, element_size, target, device=None, *, value_dim=None, **options):
        value_dim = value_dim or head_dim
        width, wide = block_width(max(head_dim, value_dim)), _wide(head_dim, value_dim)
        chosen = rule(width, wide, element_size, target, **options)
        found = device and head_dim == value_dim and tuned.entry(device, role, element_size, head_dim)
        return replace(chosen, **found) if found else chosen

    return tiles


@_for_widths
def forward_tiles(width, wide, element_size, target, *, group=1, gather=False, alibi=False, bias=False):
    """Per thread live: the output and the scores with their half-precision copy, ``BM (BV + 1.5 BN)`` fp32 values, and
    where matrix instructions read registers (sm_80, sm_120) a copy of the queries and keys as well: fewer keys there,
    and fewer still where rows are read from a table, a group's heads are found by a division or scores gain by
    distance, or it would spill. A position bias is a value and an address for each score: half the keys everywhere."""
    if element_size == 4:  # fp32 products run on the plain units, which hold rows of both operands in registers
        rows = 32 if width <= 64 and not (alibi or bias) else 16
        return Tiles(rows, rows, Options(num_warps=8))
    if not wide:
        return Tiles(64, 32 if width <= 128 else 16, Options(num_warps=8))
    if width > 128:
        return Tiles(64, 32, Options(num_warps=8))
    keys = 32 if bias else 64
    if target.backend == "hip":
        return Tiles(128, keys, Options(num_warps=4))
    if _from_shared_memory(target) or width <= 64 and not bias:
        return Tiles(128, keys, Options(num_warps=8, num_stages=2))
    few = gather or alibi or bias or _uneven(group)
    return Tiles(128, 16 if few else 32, Options(num_warps=8, num_stages=3))


@_for_widths
def backward_tiles(width, wide, element_size, target, *, group=1, dropout=False, alibi=False, bias=False):
    """A key item holds keys, values and two sums of their shape, so its tile of queries is the smaller one. sm_100
    keeps sums in tensor memory and has room for more; its compiler has to be told not to spill for the sake of a second
    program on the processor. On sm_120 eight warps spill where heads are not folded or all flags are set.

    With wide heads two kinds of groups take more registers than are left: those whose heads are found by a division,
    and those folded in parts, over which key items run one more loop. Fewer queries, or on sm_100, where they are the
    wrong end to save at, no loads ahead. Dropout takes registers, too: too many with wide heads on sm_90. A position
    bias does so everywhere, and most in items that hold queries: fewer keys for these."""
    in_parts = width > 64 and fold(group, 32) < group
    if element_size == 4:
        rows = 32 if width <= 64 and not (alibi or bias) else 16
        return Tiles(rows, rows, Options(num_warps=8), key_queries=16, key_keys=rows)
    if not wide:
        keys = 32 if width <= 128 else 16
        return Tiles(32, keys, Options(num_warps=8), key_queries=16, key_keys=keys)
    if width > 128:  # eight warps share the sums; on AMD they would have half the registers that four have
        if target.backend == "hip":
            return Tiles(32, 32, Options(num_warps=4), key_queries=16, key_keys=32)
        return Tiles(32, 32, Options(num_warps=8), key_queries=32, key_keys=32)
    if target.backend == "hip":
        return Tiles(64, 32, Options(num_warps=4), key_queries=16 if in_parts else 32, key_keys=64)
    if target.arch // 10 == 10:
        options = Options(num_warps=8, num_stages=1 if in_parts else 2, registers=255)
        return Tiles(64, 64, options, key_queries=64, key_keys=64)
    if target.arch // 10 == 12 and width <= 64:
        return Tiles(64, 32, Options(num_warps=4), key_queries=32, key_keys=32)
    few = width > 64 and (bias or target.arch // 10 == 9 and (_uneven(group) or dropout))
    keys = 32 if bias and width > 64 else 64
    return Tiles(64, keys, Options(num_warps=8), key_queries=16 if few else 32, key_keys=64)


DECODE_ROWS = 64


@_for_widths
def decode_tiles(width, wide, element_size, target, *, fold, sharing):
    """Memory bound: a tile for all ``sharing`` queries that read one prefix, as far as they fit, and few keys at a
    time. The compiler for sm_100, and for sm_120 in half precision, has to be told not to spill, as in the backward."""
    told = (10, 12) if element_size == 2 else (10,)
    registers = 255 if target.backend == "cuda" and target.arch // 10 in told else None
    options = Options(num_warps=4, num_stages=3, registers=registers)
    return Tiles(min(DECODE_ROWS, max(16, power_of_two(fold * sharing))), 32, options)


def reduce_options(width):
    """For rows of a block ``width`` wide; threads that have little to hold are made to spill by sm_80's compiler, so
    that more programs fit."""
    return Options(num_warps=4 if width > 32 else 2)


def _uneven(group):
    """Whether the heads of a tile's rows are found by a division and not by a shift."""
    return group & (group - 1) != 0


def _from_shared_memory(target):
    """Whether matrix instructions read their operands from shared memory: sm_90 and sm_100."""
    return target.arch // 10 in (9, 10)


def chunk_rows(prefix_length, tile_rows, tile_queries):
    """Queries a prefix item runs over. The partial sums it writes and that are read again are about
    ``2 P / (chunk in tile rows)`` of what the backward moves anyway: with 8 P rows a quarter, of which the longer walk
    through fewer chunks would lose more to the cache (benchmarks/gpu/model.py)."""
    return tile_queries * max(4, -(-8 * prefix_length // tile_rows))


def decode_split(keys, kv_heads, programs=264, smallest=128, largest=1024):
    """Own keys a decode program reads: few enough that two programs for each of about 132 processors have work."""
    split = -(-keys * kv_heads // programs)
    return min(max(power_of_two(split), smallest), largest)
