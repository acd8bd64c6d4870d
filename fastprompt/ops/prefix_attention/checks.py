"""The checks of prefix_attention's arguments."""

import numpy as np
import torch

from ...checks import FLOATS, check_range, check_tensor
from ...layout import Sequences


def check_inputs(q, k, v, prefix_k, prefix_v, seq, window, softcap, sinks, key_seq):
    _check_sequences("seq", seq)
    if key_seq is not None:
        _check_sequences("key_seq", key_seq)
    check_tensor("q", q, [seq.rows, "H", "Dh"], dtypes=FLOATS)
    rows, heads, head_dim = q.shape
    if head_dim == 0:
        raise ValueError("q must have heads of at least one number, got none")
    if seq.kind == "decode":
        check_tensor("k", k, [*_cache_shape(seq), head_dim], like=("q", q))
    else:
        check_tensor("k", k, [rows if key_seq is None else key_seq.rows, "Hkv", head_dim], like=("q", q))
    check_tensor("v", v, [*k.shape[:-1], "Dv"], like=("q", q))
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    if value_dim == 0:
        raise ValueError("v must have values of at least one number, got none")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {heads}")
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("prefix_k and prefix_v must both be given or both be None")
    if prefix_k is not None:
        check_tensor("prefix_k", prefix_k, ["N", "P", kv_heads, head_dim], like=("q", q))
        check_tensor("prefix_v", prefix_v, [*prefix_k.shape[:-1], value_dim], like=("q", q))
    prefixes = prefix_k if seq.chains is None else seq.chains
    if prefixes is not None and seq.prefix_lens is not None:
        check_tensor("seq.prefix_lens", seq.prefix_lens, [prefixes.shape[0]])
    if sinks is not None:
        check_tensor("sinks", sinks, [heads], dtypes=FLOATS, like=("q", q))
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be a positive int or None, got {window!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap!r}")


def _check_sequences(name, value):
    if not isinstance(value, Sequences):
        raise TypeError(f"{name} must be a fastprompt.Sequences, got {type(value).__name__}")


def check_positions(q, softcap, alibi_slopes, position_bias):
    """What scores gain by the distance of key and query."""
    given = dict(alibi_slopes=alibi_slopes, position_bias=position_bias)
    given = {name: x for name, x in given.items() if x is not None}
    if len(given) == 2:
        raise ValueError("alibi_slopes and position_bias must not both be given")
    for name, x in given.items():
        double = (torch.float64,) if q.dtype == torch.float64 else ()
        shape = [q.shape[1], "2 * M + 1"] if name == "position_bias" else [q.shape[1]]
        check_tensor(name, x, shape, dtypes=(torch.float32, *double), like=("q", q))
        if softcap is not None:
            raise ValueError(f"softcap must be None with {name}: models disagree on which comes first")
    if position_bias is not None and position_bias.shape[1] % 2 == 0:
        raise ValueError(f"position_bias must have an odd number of columns, 2 * M + 1, got {position_bias.shape[1]}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient: there is none")


def check_cross(seq, key_seq, causal, window, alibi_slopes, position_bias):
    if seq.kind == "decode" or key_seq.kind == "decode":
        raise ValueError("seq and key_seq must not be for decode in cross-attention: give sequences of one row")
    if len(seq.starts) != len(key_seq.starts):
        raise ValueError(f"key_seq must have seq's {len(seq.starts)} sequences, got {len(key_seq.starts)}")
    if causal:
        raise ValueError("causal must be False with key_seq, got True")
    for name, x in (("window", window), ("alibi_slopes", alibi_slopes), ("position_bias", position_bias)):
        if x is not None:
            raise ValueError(f"{name} must be None with key_seq: its keys stand at no distance from the queries")
    for name in ("prefix_ids", "prefix_lens", "gaps", "chains"):
        if getattr(key_seq, name) is not None:
            raise ValueError(f"key_seq must have no {name}, which belong to seq")
    if seq.chains is not None:
        raise ValueError("seq must have no chains with key_seq: what stands in front are rows of its own")


def seed_of(p, seed):
    """The seed as a tensor of one int64, drawn where none is given; None without dropout."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {p!r}")
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"dropout_seed must be one int64, got {seed.dtype} of shape {list(seed.shape)}")
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"dropout_seed must be an int, a tensor or None, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"dropout_seed must lie in [-2**63, 2**63), got {seed}")
    if p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return seed if isinstance(seed, torch.Tensor) else torch.tensor(seed, dtype=torch.int64, device="cpu")


def check_gradients(seq, inputs):
    """Raises where a gradient is asked for that nothing computes."""
    if seq.pages is not None and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise NotImplementedError(
            "a cache in pages has no backward: run prefix_attention under torch.no_grad(), or with a contiguous cache"
        )


def check_ranges(k, prefix_k, seq):
    """What only the values of seq tell, from the host, where they have to be known anyway."""
    if seq.kind == "decode":
        _check_cache(k, seq.host)
    prefixes, where = (prefix_k, "prefix_k") if seq.chains is None else (seq.chains, "seq.chains")
    if prefixes is None:
        return
    count, room = prefixes.shape[:2]
    if seq.prefix_ids is None:
        if len(seq.starts) and count == 0:
            raise ValueError(f"seq.prefix_ids is None (prefix 0 for all), but {where} holds no prefix")
    else:
        check_range("seq.prefix_ids", torch.from_numpy(seq.host.prefix_ids), -1, count)
    if seq.prefix_lens is not None:
        check_range("seq.prefix_lens", torch.from_numpy(seq.host.prefix_lens), 0, room + 1)
    if seq.chains is not None:
        used = room if seq.prefix_lens is None else seq.host.prefix_lens[:, None]
        keys = torch.from_numpy(seq.host.chains[np.arange(room) < np.broadcast_to(used, (count, 1))])
        learned = 0 if prefix_k is None else prefix_k.shape[0] * prefix_k.shape[1]
        check_range("seq.chains", keys, -learned, k.shape[0])


def _cache_shape(seq):
    if seq.pages is None:
        return len(seq.lengths), "Hkv", "Lmax"
    return "pages", "Hkv", "page size"


def _check_cache(k, host):
    """The keys of every sequence stand in the cache, and the pages that hold them exist."""
    blocks, _, size, _ = k.shape
    room = size if host.pages is None else host.pages.shape[1] * size
    check_range("seq.lengths", torch.from_numpy(host.lengths), 0, room + 1)
    ends = host.key_starts + host.lengths
    if ((host.key_starts < 0) | (ends > room)).any():
        worst = int(np.where(host.key_starts < 0, room + 1, ends).argmax())
        raise ValueError(
            f"starts and lengths must stay within the {room} columns that the cache has for a sequence, got "
            f"{host.lengths[worst]} keys from column {host.key_starts[worst]} on in sequence {worst}"
        )
    if host.pages is not None:
        first = np.arange(host.pages.shape[1]) * size  # column of each page
        used = (first < ends[:, None]) & (first + size > host.key_starts[:, None]) & (host.lengths > 0)[:, None]
        check_range("seq.pages", torch.from_numpy(host.pages[used]), 0, blocks)
