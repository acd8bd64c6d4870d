"""Which weights attention dropout keeps: a pure function of seed, query's row, head, and key's position.

There is no state, and no counter that depends on tiles, threads or instruction sets: forward and backward of every
backend draw the same mask, bit for bit, in whatever order they come by its elements. A row and head have a key of 64
bits, made once and by a strong mixer: splitmix64's finaliser of the mixed seed plus ``head * 2**40 + row``. Its halves
``low`` and ``high`` then cost two 32-bit multiplications for each position, in any vector unit::

    x = position * 0x9E3779B9 + low
    x = (x ^ x >> 16) * 0x21F0AAAD
    x = (x ^ x >> 15 ^ high) * 0x735A2D97
    kept = x >= p * 2**32

That is lowbias32, with its best known constants, over a Weyl sequence; ``high`` comes in between, so that no row is a
shifted copy of another. Philox-4x32 takes ten times the multiplications for a word, if only one of its four falls to a
place in a tile. Cheaper forms are not good enough: over 2e8 bits, masks of keys 512 or 1024 apart are correlated, by 8
standard errors with ``position ^ low`` in place of the Weyl sequence and by 30 without the first shift. With both, no
lag up to 1597 and no neighbouring rows, heads or seeds stand out.
"""

from dataclasses import dataclass

import torch

_WORD, _LONG = 1 << 32, 1 << 64


@dataclass(frozen=True)
class Dropout:
    """Attention dropout with probability ``p`` in (0, 1) and a ``seed`` of 64 bits, as the backends need it."""

    p: float
    seed: int

    @property
    def key(self) -> int:
        """The mixed seed, from -2**63: neighbouring seeds have nothing in common."""
        x = (self.seed + 0x9E3779B97F4A7C15) % _LONG
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % _LONG
        x = (x ^ x >> 27) * 0x94D049BB133111EB % _LONG
        return _signed(x ^ x >> 31, _LONG)

    @property
    def threshold(self) -> int:
        """Words below it are dropped."""
        return min(round(self.p * _WORD), _WORD - 1)

    @property
    def scale(self) -> float:
        """What a weight that is kept is multiplied by."""
        return 1 / (1 - self.p)

    def kept(self, rows: torch.Tensor, heads: int, positions: torch.Tensor) -> torch.Tensor:
        """``[H, n, keys]`` bools for the queries in ``rows [n]`` of q and keys at ``positions [keys]``, both int64."""
        head = torch.arange(heads, device=rows.device)[:, None, None]
        key = _mix(self.key + (head << 40) + rows[:, None])  # [H, n, 1]
        low, high = key & (_WORD - 1), _shift(key, 32)
        x = (positions * 0x9E3779B9 + low) % _WORD
        x = (x ^ x >> 16) * 0x21F0AAAD % _WORD
        x = (x ^ x >> 15 ^ high) * 0x735A2D97 % _WORD
        return x >= self.threshold


def _mix(x):
    """splitmix64's finaliser on int64, whose products wrap."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9, _LONG)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB, _LONG)
    return x ^ _shift(x, 31)


def _shift(x, bits):
    """``x >> bits`` of int64 as if it had no sign."""
    return (x >> bits) & ((1 << 64 - bits) - 1)


def _signed(x, size):
    return x - size if x >= size // 2 else x
