"""patch_attention: an ordinary Hugging Face model on prefix_attention, behind a learned prefix or none."""

from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checks import FLOATS, check_tensor
from .attachment import attach, detach, evaluation_mode
from .cache_names import cache_in
from .expectations import Expectations, first_output
from .masks import PaddedBatch, UnsupportedAttention, outranks_patch, running
from .request import tokens_of
from .shared_state import SharedState
from .structure import position_embeddings, tell_positions


def patch_attention(model: PreTrainedModel, prefix: torch.Tensor | None = None) -> PreTrainedModel:
    """Run ``model``'s attention on :func:`fastprompt.prefix_attention`, for padded, packed and decoding batches alike.

    Changes this one model, in place: neither its class nor the library, and no other model that was built from the same
    config object. Forward, ``generate``, gradient checkpointing and training go on as before; packed batches come as
    Hugging Face packs them (no mask, position ids that start again at every sequence). Attention gives zeros at
    padding, so what a model predicts there, which nobody should read, differs from before.

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
    patch = PaddedCalls(model)
    try:
        reason = patch.why_not()
        if reason is None:
            patch.shared = None if prefix is None else SharedState.of_tensor(prefix, model.config)
            patch.start()
            model.__dict__["_fastprompt_patch"] = patch
    finally:
        if "_fastprompt_patch" not in model.__dict__:
            patch.remove()
    if reason is not None:
        raise UnsupportedAttention(f"{type(model).__name__} cannot run on prefix_attention: {reason}")
    return model


def unpatch_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`patch_attention`; a model that is not patched is left alone. Returns the model."""
    patch = model.__dict__.pop("_fastprompt_patch", None)
    if patch is not None:
        patch.remove()
    return model


class PaddedCalls:
    """Every call of a model's forward runs as a :class:`PaddedBatch`: its attention switched, two hooks, until
    :meth:`remove`.

    Attributes:
        shared: the learned keys and values in front of every row, or None.
    """

    def __init__(self, model: PreTrainedModel, shared: SharedState | None = None) -> None:
        self.model, self.shared = model, shared
        self._counting = position_embeddings(model)
        self._open: list[Any] = []
        self._hooks: list[Any] = []

    def why_not(self) -> str | None:
        """Attach; None, or the reason why the model does not give what it gave before."""
        try:
            with evaluation_mode(self.model), torch.no_grad():
                expected = Expectations.behind_prefix(self.model, self._forward, None)
                attach(self.model, self)
                mask = expected.sample.masks["right"]
                with expected.arithmetic(), running(PaddedBatch()) as batch:
                    got = first_output(self._forward(input_ids=expected.ids, attention_mask=mask))
        except Exception as error:  # a model can fail in any way on a mask it was not written for
            return f"{type(error).__name__}: {error}"
        if not batch.asked:
            return "it does not ask the attention interface for a mask"
        return expected.difference(got, expected.outputs["right"], mask.bool())

    def start(self) -> None:
        """Attach, and run every call so from now on."""
        attach(self.model, self)
        self._hooks.append(self.model.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._close()
        detach(self.model, self)

    def _forward(self, **inputs):
        return self.model(**inputs, return_dict=True)

    def _close(self):
        """Leave what an interrupted call left open: torch calls no hook after a KeyboardInterrupt."""
        while self._open:
            self._open.pop().close()

    def _enter(self, model, args, kwargs):
        self._close()
        if outranks_patch():  # a soft prompt's own call of a model that is patched too
            return args, kwargs
        block = ExitStack()
        if self.shared is not None:
            positions = self._positions(args, kwargs)
            for module in self._counting:
                block.callback(tell_positions(module, positions[0]).remove)
            kwargs = kwargs if self._counting else {**kwargs, "position_ids": positions}
        block.enter_context(running(PaddedBatch(self.shared)))
        self._open.append(block)
        return args, kwargs

    def _leave(self, model, args, output):
        self._close()

    def _positions(self, args, kwargs):
        """The caller's position ids, or 0, 1, ... behind the cache, moved behind the prefix."""
        length = self.shared.length
        if (given := kwargs.get("position_ids")) is not None:
            return given + length
        tokens = tokens_of(kwargs)
        if tokens is None:
            tokens = args[0]
        past = cache_in(kwargs)
        seen = 0 if past is None else past.get_seq_length()
        return (length + seen + torch.arange(tokens.shape[1], device=tokens.device))[None]
