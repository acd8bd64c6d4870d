"""Tiles of kernels that stream rows ``[R, D]``: memory bound, so all that matters is that memory stays busy."""

from dataclasses import dataclass

from .launch import Options

_THREADS = 128
_LOAD = 16  # bytes, the widest access of a thread


@dataclass(frozen=True)
class Tile:
    """A program's rows and columns, both powers of two."""

    rows: int
    columns: int
    options: Options = Options(num_warps=_THREADS // 32, num_stages=1)


def row_tile(width, element_size, loads=4, most_columns=1024):
    """A tile of rows of ``width`` elements, ``loads`` 16-byte loads a thread: as many are in flight at once.

    Rows that do not all start at 16 bytes are loaded by single elements, of which a thread can hold fewer.

    A tile as wide as the row would leave up to half its threads idle. The widest is taken that wastes at most an
    eighth, but never less than 128 bytes, a cache line.
    """
    values = _THREADS * loads * (_LOAD // element_size if width % 16 == 0 else 2)
    columns = power_of_two(width)
    narrowest = min(columns, 128 // element_size)
    columns = min(columns, most_columns, values)
    while columns > narrowest and -(-width // columns) * columns * 8 > width * 9:
        columns //= 2
    return Tile(values // columns, columns)


def power_of_two(n):
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
