"""Tiles ``[BP, BK, BD]`` (tokens, ranks, columns) of the kernels that sum over one side of the factor, by rule.

A thread keeps at most 16 fp32 sums: with 32 the loads of both factors in flight left too few registers and some targets
spilled. There are few programs where a batch has one task, so a tile is small along what is left and long along what is
summed.
"""

from dataclasses import dataclass

from ..launch import Options
from ..tiles import power_of_two


@dataclass(frozen=True)
class Tile:
    tokens: int
    ranks: int
    columns: int
    options: Options = Options(num_warps=4, num_stages=1)


def rows_tile(width, rank, element_size):
    """Of the sum over columns: 4 tokens, and what 128 threads load by one 16-byte load each, two for the first rank."""
    ranks = _ranks(rank)
    return Tile(4, ranks, min(power_of_two(width), max(512, 1024 // ranks) // element_size))


def cols_tile(width, rank, element_size):
    """Of the sum over tokens: the columns of one 128-byte cache line, and as many loads as above."""
    ranks = _ranks(rank)
    return Tile(max(16, 32 // ranks), ranks, min(power_of_two(width), 128 // element_size))


def _ranks(rank):
    return min(4, power_of_two(rank))
