"""prefix_attention behind Hugging Face's attention interface.

A model is switched over by its ``config._attn_implementation`` (of its own copy of the config). A mask function then
returns a :class:`MaskPlan` in place of a mask tensor; it travels through the layers, gradient checkpointing included,
to the attention function, which finds everything it needs in it. Outside of a :func:`running` block both functions
hand over to the implementation the model had before.

Both interfaces have to know the name: with only the attention function registered, transformers drops the padding
mask without a word.
"""

import copy
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..layout import Sequences
from ..ops import prefix_attention

# Our name for a model that ran on ... before. transformers treats names with "sdpa", "flash" or "/" specially.
_BEFORE = {
    "fastprompt": "sdpa",
    "fastprompt_eager": "eager",
    "fastprompt_flex": "flex_attention",
    "fastprompt_fa2": "flash_attention_2",
    "fastprompt_fa3": "flash_attention_3",
    "fastprompt_fa4": "flash_attention_4",
}
_NAMES = {before: name for name, before in _BEFORE.items()}

# Keyword arguments that models hand to every attention function and that do not change what attention computes.
# sliding_window is among them because the mask already carries the window.
_WITHOUT_EFFECT = {
    "is_causal",
    "sliding_window",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
    "shift_labels",
    "labels",
    "cache_position",
    "layer_idx",
    "position_embeddings",
    "deterministic",
    "target_dtype",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


class UnsupportedAttention(NotImplementedError):
    """A model asks attention for something prefix_attention does not compute; the message says what."""


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """What stands where a model expects its attention mask.

    Attributes:
        seq: the sequences among the rows of the batch.
        window: see prefix_attention.
        causal: see prefix_attention.
        shared: the rows whose keys and values other sequences share, as in RowPlan.
        prefix: for each layer its learned ``(keys, values)``, ``[N, P, Hkv, Dh]`` each, or None; None: no layer has.
        dense: a mask of the implementation before over prefix and own keys, for a batch that ``seq`` cannot describe.
    """

    seq: Sequences | None
    window: int | None = None
    causal: bool = True
    shared: tuple[tuple[int, int], ...] = ()
    prefix: tuple[tuple[torch.Tensor, torch.Tensor] | None, ...] | None = None
    dense: torch.Tensor | None = None

    def to(self, *args, **kwargs):
        """accelerate moves whatever has ``to`` between devices; the sequences follow when attention reads them."""
        return self


class PackedRows:
    """Rows that :mod:`fastprompt.layout` planned, as the one packed sequence of a batch of size 1."""

    def __init__(self, plan, causal=True, prefix=None):
        self.plan, self.causal, self.prefix = plan, causal, prefix

    def mask(self, before, *, local_size=None, **_):
        window = local_size if self.causal or local_size is None else local_size + 1  # bidirectional: inclusive
        return MaskPlan(self.plan.sequences, window, self.causal, self.plan.shared, self.prefix)


class PaddedBatch:
    """A batch as users pass it: padded, packed by its position ids, or decoding, with learned prefixes or without.

    ``prefix_ids [B]`` says which of the N stands in front of each row, or of each B-th part of them (beams); None: the
    first.
    """

    def __init__(self, prefix=None, prefix_ids=None):
        self.prefix, self.prefix_ids = prefix, prefix_ids
        self.asked = False  # did the model ask for a mask at all?

    def mask(
        self, before, *, batch_size, q_length, kv_length, mask_function, attention_mask=None, local_size=None, **other
    ):
        self.asked = True
        device = other.get("device", "cpu")
        sees = partial(mask_function, torch.arange(batch_size, device=device)[:, None], 0)
        if q_length == kv_length:
            starts, lengths, gaps, whole = _runs(sees, batch_size, q_length, attention_mask, device)
            if whole:
                last = torch.arange(q_length - 1, device=device)
                ahead = q_length > 1 and bool(_as_mask(sees(last, last + 1), batch_size, q_length - 1, device).any())
                window = local_size + 1 if local_size is not None and ahead else local_size  # bidirectional: inclusive
                ids = None if self.prefix_ids is None else self._ids(batch_size)[starts // q_length]
                seq = Sequences.runs(starts, lengths, batch_size * q_length, ids, gaps=gaps)
                return MaskPlan(seq, window, causal=not ahead, prefix=self.prefix)
        return self._dense(
            before,
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **other,
        )

    def _dense(self, before, **arguments):
        original = ALL_MASK_ATTENTION_FUNCTIONS[before]
        if self.prefix is None:
            return original(**arguments)
        length = prefix_length(self.prefix)
        arguments["kv_length"] += length
        arguments["q_offset"] = arguments.get("q_offset", 0) + length
        arguments["allow_is_causal_skip"] = arguments["allow_is_bidirectional_skip"] = False
        if (real := arguments.get("attention_mask")) is not None:
            arguments["attention_mask"] = torch.cat([real.new_ones(real.shape[0], length), real], 1)
        prefix = self.prefix
        if self.prefix_ids is not None:
            ids = self._ids(arguments["batch_size"])
            prefix = tuple(layer and tuple(x[ids] for x in layer) for layer in prefix)  # a row of the batch each
        return MaskPlan(None, prefix=prefix, dense=original(**arguments))

    def _ids(self, batch):
        return self.prefix_ids.repeat_interleave(batch // max(len(self.prefix_ids), 1))


def _runs(sees, batch, width, attention_mask, device):
    """The runs of real tokens: starts, lengths, gaps, and whether they describe the batch (no holes in the mask)."""
    first = torch.ones(batch, 1, dtype=torch.bool, device=device)
    position = torch.arange(1, width, device=device)
    joined = _as_mask(sees(position, position - 1), batch, width - 1, device)  # does a token see the one before it?
    real = (
        torch.ones(batch, width, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.bool()
    )
    opens = real & torch.cat([first, ~joined | ~real[:, :-1]], 1)
    closes = real & torch.cat([~joined | ~real[:, 1:], first], 1)
    starts, ends = opens.reshape(-1).nonzero()[:, 0], closes.reshape(-1).nonzero()[:, 0]
    whole = attention_mask is None or bool((opens.sum(1) <= 1).all())
    gaps = None if attention_mask is None else starts % max(width, 1)
    return starts, ends - starts + 1, gaps, whole


def _as_mask(seen, batch, width, device):
    """A mask function's answer as ``[B, width]``: some answer True or False for all, some without the batch axis."""
    return torch.as_tensor(seen, device=device).expand(batch, width)


_ACTIVE: ContextVar[PackedRows | PaddedBatch | None] = ContextVar("fastprompt_active", default=None)


@contextmanager
def running(batch):
    """While the block runs, models that were switched over run ``batch`` on prefix_attention."""
    token = _ACTIVE.set(batch)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def switch_over(model):
    """Make ``model`` run on prefix_attention inside :func:`running` blocks.

    Gives the model a config of its own first: models built from one config object share it, and only this one is to
    change.

    Raises:
        UnsupportedAttention: the model's present attention is not one that can be handed back to, or sees chunks.
    """
    copies = {}
    copy.deepcopy(model.config, copies)
    own = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and id(config) in copies:
            module.config = own[id(config)] = copies[id(config)]
    configs = list({id(c): c for c in own.values()}.values())
    if any("chunked_attention" in (getattr(c, "layer_types", None) or ()) for c in configs):
        raise UnsupportedAttention("attention in chunks is not a sliding window")
    before = [c._attn_implementation for c in configs]
    for implementation in before:
        if implementation not in _NAMES and implementation not in _BEFORE:
            raise UnsupportedAttention(f"attention implementation {implementation!r} is not one of {sorted(_NAMES)}")
    for config in configs:
        # The public setter would also overwrite sub-configs, which may run on something else.
        config._attn_implementation_internal = _NAMES.get(config._attn_implementation, config._attn_implementation)


def is_switched_over(config):
    """Does a model with this config run on prefix_attention inside of :func:`running` blocks?"""
    return config._attn_implementation in _BEFORE


def packed_rows_run():
    """Is a :class:`PackedRows` being run right now?"""
    return isinstance(_ACTIVE.get(), PackedRows)


def switch_back(model):
    """Undo :func:`switch_over`; the model keeps its config object and whatever was changed in it meanwhile."""
    for module in model.modules():
        config = module.__dict__.get("config")
        name = getattr(config, "_attn_implementation", None)
        if name in _BEFORE:
            config._attn_implementation_internal = _BEFORE[name]


def _mask(before, **arguments):
    batch = _ACTIVE.get()
    if batch is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[before](**arguments)
    return batch.mask(before, **arguments)


def _attention(before, module, query, key, value, attention_mask, **arguments):
    if not isinstance(attention_mask, MaskPlan):
        batch = _ACTIVE.get()
        if isinstance(batch, PackedRows) or getattr(batch, "prefix", None) is not None:
            given = "no mask" if attention_mask is None else f"a ready-made mask of shape {list(attention_mask.shape)}"
            raise UnsupportedAttention(f"{type(module).__name__} handed {given} to attention instead of asking for one")
        return _original(before, module)(module, query, key, value, attention_mask, **arguments)
    plan = attention_mask
    prefix = None if plan.prefix is None else _of_layer(module, plan.prefix, key)
    if plan.dense is not None:
        keys, values = (
            torch.cat([p.transpose(1, 2).expand(x.shape[0], -1, -1, -1), x], 2) for p, x in zip(prefix, (key, value))
        )  # [B, Hkv, P + S, Dh]
        return _original(before, module)(module, query, keys, values, plan.dense, **arguments)
    return _run(module, query, key, value, plan, prefix, **arguments), None


def prefix_length(prefix):
    """P of the layers' learned keys and values; 0 without any."""
    return next((layer[0].shape[1] for layer in prefix or () if layer is not None), 0)


def _of_layer(module, prefix, key):
    """The learned keys and values of the layer that ``module`` is in, in the dtype and on the device of its own."""
    if not isinstance(layer := getattr(module, "layer_idx", None), int) or layer >= len(prefix):
        raise UnsupportedAttention(f"{type(module).__name__} has no layer_idx below the prefix's {len(prefix)} layers")
    if prefix[layer] is None:
        return None
    found, expected = list(prefix[layer][0].shape[2:]), [key.shape[1], key.shape[3]]
    if found != expected:
        raise UnsupportedAttention(f"layer {layer} has keys of (heads, width) {expected}, its prefix {found}")
    return tuple(x.to(key.device, key.dtype) for x in prefix[layer])


def _run(module, query, key, value, plan, prefix, *, scaling=None, dropout=0.0, softcap=None, s_aux=None, **other):
    unknown = sorted(name for name, x in other.items() if name not in _WITHOUT_EFFECT and x is not None)
    if unknown:
        raise UnsupportedAttention(f"{type(module).__name__} passes {unknown}, which prefix_attention does not know")
    if torch.is_autocast_enabled(query.device.type):  # as scaled_dot_product_attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        prefix = prefix and tuple(x.to(dtype) for x in prefix)
    batch, heads, width, head_dim = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * S, heads, Dh]
    seq = plan.seq if plan.seq.starts.device == q.device else plan.seq.to(q.device)
    prefix_k, prefix_v = (_bank(learned, x, plan.shared) for learned, x in zip(prefix or (None, None), (k, v)))
    out, _ = prefix_attention(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        seq,
        causal=plan.causal,
        window=plan.window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.to(q.dtype),
        scale=scaling,
        dropout_p=dropout,  # its seed is drawn here, so every layer has its own and checkpointing draws the same again
    )
    return out.view(batch, width, heads, out.shape[-1])


def _bank(learned, rows, shared):
    """The prefixes that sequences refer to, ``[N, length, Hkv, Dh]``, of keys or of values, or None.

    Learned ones, shared rows, or both: then every prompt stands there twice, the learned prefix alone for the shared
    rows behind it, and with them for the rest; ``prefix_lens`` tells the two apart.
    """
    if not shared:
        return learned
    (first, length), count = shared[0], len(shared)
    if all(n == length for _, n in shared):
        common = rows[first : first + count * length].unflatten(0, (count, length))  # a view
    else:
        common = pad_sequence([rows[start : start + n] for start, n in shared], batch_first=True)
    if learned is None:
        return common
    both = torch.cat([learned, common], 1)
    return both.expand(2, -1, -1, -1) if count == 1 else torch.cat([both, both])


def _original(before, module):
    if before != "eager":
        return ALL_ATTENTION_FUNCTIONS[before]
    return sys.modules[type(module).__module__].eager_attention_forward


for _name, _before in _BEFORE.items():
    AttentionInterface.register(_name, partial(_attention, _before))
    AttentionMaskInterface.register(_name, partial(_mask, _before))
