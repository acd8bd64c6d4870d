"""patch_attention: an ordinary Hugging Face model on prefix_attention, with a learned prefix or without, without PEFT."""

import torch

from ..checks import FLOATS, check_tensor
from .attention import switch_back, switch_over
from .masks import PaddedBatch, UnsupportedAttention, packed_rows_run, running
from .prefix import layers_of_tensor, prefix_length
from .probe import primary, quiet, relative_error, tolerance


def patch_attention(model, prefix=None):
    """Run ``model``'s attention on :func:`fastprompt.prefix_attention`, for padded, packed and decoding batches alike.

    Changes this one model, in place: neither its class nor the library, and no other model that was built from the same
    config object. Forward, ``generate``, gradient checkpointing and training go on as before; packed batches come as
    Hugging Face packs them (no mask, position ids that start again at every sequence). Attention gives zeros at padding,
    so what a model predicts there, which nobody should read, differs from before.

    Args:
        model: a Hugging Face model whose attention goes through the attention interface.
        prefix: ``[L, 2, P, Hkv, Dh]`` learned keys and values for each of L layers, in front of every sequence; may
            require gradients. Own positions then start at P. None: no prefix.

    Returns:
        ``model``. :func:`unpatch_attention` undoes it.

    Raises:
        UnsupportedAttention: the model does not give the same result on prefix_attention; it is left as it was.
        TypeError, ValueError: a prefix of another kind or shape.
    """
    unpatch_attention(model)
    if prefix is not None:
        check_tensor("prefix", prefix, ["L", 2, "P", "Hkv", "Dh"], dtypes=FLOATS)
    before = _probe(model)
    switch_over(model)
    patch = PaddedCalls(model)
    try:
        error = relative_error(_probe(model), before)
        reason = None if error <= tolerance(before.dtype) else f"its result differs by {error:.1e}"
    except (
        Exception
    ) as failure:  # a model can fail in any way on a mask it was not written for; the reason is passed on
        reason = f"{type(failure).__name__}: {failure}"
    if reason is None and not patch.reached:
        reason = "it does not ask the attention interface for a mask"
    if reason is not None:
        patch.remove()
        switch_back(model)
        raise UnsupportedAttention(f"{type(model).__name__} cannot run on prefix_attention: {reason}")
    patch.prefix = None if prefix is None else layers_of_tensor(prefix, model.config)
    model.__dict__["_fastprompt_patch"] = patch
    return model


def unpatch_attention(model):
    """Undo :func:`patch_attention`; a model that is not patched is left alone. Returns the model."""
    patch = model.__dict__.pop("_fastprompt_patch", None)
    if patch is not None:
        patch.remove()
        switch_back(model)
    return model


class PaddedCalls:
    """Two hooks on a model's forward: every call of it runs as a :class:`PaddedBatch`, until :meth:`remove`.

    Attributes:
        prefix, prefix_ids: see PaddedBatch.
        reached: did the model ask for a mask yet?
    """

    def __init__(self, model, prefix=None, prefix_ids=None):
        self.model, self.prefix, self.prefix_ids, self.reached, self._open = model, prefix, prefix_ids, False, []
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self):
        for hook in self._hooks:
            hook.remove()
        self._close()

    def _close(self):
        """Leave what an interrupted call left open: torch calls no hook after a KeyboardInterrupt."""
        while self._open:
            self._open.pop()[0].__exit__(None, None, None)

    def _enter(self, model, args, kwargs):
        self._close()
        if packed_rows_run():  # a soft prompt's own call of a model that is patched too
            return args, kwargs
        if self.prefix is not None:
            kwargs = {**kwargs, "position_ids": self._positions(args, kwargs)}
        block = running(batch := PaddedBatch(self.prefix, self.prefix_ids))
        block.__enter__()
        self._open.append((block, batch))
        return args, kwargs

    def _leave(self, model, args, output):
        if self._open:
            self.reached |= self._open[-1][1].asked
        self._close()

    def _positions(self, args, kwargs):
        """The caller's position ids, or 0, 1, ... behind the cache, moved behind the prefix."""
        length = prefix_length(self.prefix)
        if (given := kwargs.get("position_ids")) is not None:
            return given + length
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if tokens is None:
            tokens = args[0]
        past = kwargs.get("past_key_values")
        seen = 0 if past is None else past.get_seq_length()
        return (length + seen + torch.arange(tokens.shape[1], device=tokens.device))[None]


@torch.no_grad()
def _probe(model):
    """The first output of two short rows, one of them padded; zeros where the padding is."""
    table = model.get_input_embeddings().weight
    ids = (torch.arange(10, device=table.device).view(2, 5) * 7 + 3) % table.shape[0]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], device=table.device)
    with quiet(model):
        output = model(input_ids=ids, attention_mask=mask, return_dict=True)
    first = primary(output)
    if first.shape[:2] == mask.shape:
        first = first * mask.unsqueeze(-1).to(first.dtype)
    return first
