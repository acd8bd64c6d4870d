"""What the kernels of prefix_attention are called with, in groups. A kernel takes each group as one argument.

A pointer is to the first element; strides are in elements.
"""

from typing import Any, NamedTuple


class Queries(NamedTuple):
    """``[Rq, H, Dh]``."""

    q: Any
    stride_row: Any
    stride_head: Any


class Keys(NamedTuple):
    """Keys and values with a first dimension of sequences in a cache or of prefixes; own keys of rows have none, nor
    have learned ones in chains."""

    k: Any
    v: Any
    stride_kb: Any
    stride_kr: Any
    stride_kh: Any
    stride_vb: Any
    stride_vr: Any
    stride_vh: Any


class Output(NamedTuple):
    """``out [Rq, H, Dv]``, whose heads stand side by side, and ``lse [H, Rq]``."""

    out: Any
    lse: Any
    stride_row: Any
    lse_rows: Any


class Gradient(NamedTuple):
    """Of the output."""

    dout: Any
    stride_row: Any
    stride_head: Any


class Gradients(NamedTuple):
    """Of the inputs, None where nobody asks; heads of dq stand side by side. Own keys: as :class:`Keys`, prefixes:
    partial sums of key blocks."""

    dq: Any
    dk: Any
    dv: Any
    stride_row: Any
    stride_kb: Any
    stride_kr: Any
    stride_kh: Any
    stride_vb: Any
    stride_vr: Any
    stride_vh: Any
    partial_k: Any
    partial_v: Any


class Batch(NamedTuple):
    """Rows in memory of virtual queries and keys, None where they are the same; ``spans [4, queries]`` (see visible);
    the numbers of queries, and of places in a row or page of a cache; prefixes that are ``chains [N, chain_room]``:
    rows of own keys in memory, or -1 - i for learned key i; None where they are those of a bank."""

    query_rows: Any
    key_rows: Any
    spans: Any
    queries: Any
    room: Any
    chains: Any = None
    chain_room: Any = None


class Scores(NamedTuple):
    """How scores come out of products, and what a window hides; ALiBi's slopes ``[H]`` and a position bias
    ``[H, 2 * most + 1]``, None without."""

    scale: Any
    softcap: Any
    window: Any
    slopes: Any
    bias: Any
    most: Any


class Dropout(NamedTuple):
    """The halves of the seed and the threshold (see kept), and what kept weights are multiplied with."""

    seed_low: Any
    seed_high: Any
    threshold: Any
    scale: Any


class Static(NamedTuple):
    """What a variant is compiled for."""

    DH: int  # width of queries and keys
    BD: int  # of their block, a power of two
    DV: int  # width of values
    BV: int  # of their block
    GROUP: int = 1  # query heads of a key head
    FOLD: int = 1  # of them in one tile
    CAUSAL: bool = False
    WINDOW: bool = False
    SOFTCAP: bool = False
    GATHER: bool = False  # virtual rows are not those in memory
    CACHE: bool = False  # own keys stand in a cache [B, Hkv, room, Dh]
    PAGES: bool = False  # of pages: those of a sequence do not stand side by side
    UPCAST: bool = False  # see product
