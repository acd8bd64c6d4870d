"""accelerate(peft_model): PEFT prompt learning on the packed engine, in place; restore(peft_model) undoes it."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftModelForSeq2SeqLM, PeftType
from transformers import PreTrainedModel

from ..hf.checkpointing import without_checkpoints
from ..hf.compiled_prompts import CompiledPrompts
from ..layout import CannotPack
from . import resuming
from .adapter import is_prefix
from .call import PACKED_CLASSES, Call, shared_of_prefix
from .forward import disable_adapter, forward
from .generation import generate
from .renamed_cache import generates_wrongly, prepare_inputs_for_generation
from .seq2seq import PairCall
from .smoothing import smooth_by_text
from .state import State, restore


def accelerate(peft_model: PeftModel, *, heads: str = "text", pad_rows_to: int | None = None) -> PeftModel:
    """Make a PEFT prompt-learning model run what its rows have in common once per batch. Same loss, gradients,
    checkpoints.

    Works in place on this one object and returns it, for every kind of prompt learning: Prompt Tuning, P-Tuning,
    Multitask Prompt Tuning, Prefix-Tuning, CARTRIDGE and CPT, before causal LMs, classifiers, question answering and
    feature extraction, decoders and encoders, and before encoder-decoders. Padding is not run. On decoders the prompt,
    and the tokens that all rows of a prompt begin with, run once. Adapters that are added or loaded later are covered.
    Prefix-Tuning works with gradient checkpointing switched on afterwards, or before by :func:`get_peft_model`; a batch
    that is not packed runs without checkpoints then.

    ``save_pretrained`` writes the encoder of P-Tuning and of projected prefixes beside PEFT's files, and
    ``load_adapter`` brings it back, which PEFT cannot: trainings resume, by hand (``is_trainable=True``) and by
    Trainer. Trainer's label smoothing is right.

    With labels, in training, the head of a causal LM runs on labelled rows only; ``outputs.logits`` are computed when
    somebody reads them, and ``outputs.past_key_values`` is None. Otherwise logits come in PEFT's shape, and a cache
    where PEFT returns one. What a model puts out at padding is that of zero hidden states. A batch or model that packed
    rows cannot represent exactly takes PEFT's own forward, with one warning a reason. In a step of an encoder-decoder,
    what stands behind a row's last label is padding, which no label sees.
    Dropout in the base model is drawn for packed rows: loss and gradient have PEFT's expectation, not its numbers.
    ``generate`` runs the prompt once, until it or the model changes, and takes ``adapter_names``, one a row, of
    adapters of any method and length; then a padded row gives what it gives alone. A padded batch without them, and
    what it does not take, is PEFT's own, put right where that does not find the cache (transformers 5.24). One forward
    at a time: as PEFT itself, not for several threads. A copy, by ``copy.deepcopy`` or by pickle, is accelerated too.
    ``torch.export`` sees PEFT's own forward.

    Args:
        peft_model: a ``PeftModel`` with a prompt-learning adapter.
        heads: "text": where PEFT's classes for classification and question answering mistake virtual tokens or padding
            for text, they do not. A classifier on a decoder reads a row's last real token, whatever the side of the
            padding; labels ``[B, S]`` of tokens, and positions of answers, are those of the text, and logits that come
            with them, too. One warning says so. "peft": everything as in PEFT.
        pad_rows_to: rows that nothing reads are added to every batch until their number is a multiple of this, so that
            few shapes are met: what is tuned, compiled or recorded for a shape (CUDA graphs) is used again. 64 adds 32
            rows on average. None: no row is added. Not for encoder-decoders.

    Raises:
        TypeError: not such a model; it is left as it was.
        ValueError: another ``heads`` or ``pad_rows_to``.
    """
    if heads not in ("text", "peft"):
        raise ValueError(f'heads must be "text" or "peft", got {heads!r}')
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model must be a peft.PeftModel, got {type(peft_model).__name__}")
    config = peft_model.active_peft_config
    if not config.is_prompt_learning:
        raise TypeError(f"peft_model must use prompt learning, got {PeftType(config.peft_type).value}")
    restore(peft_model)
    base: Any = peft_model.base_model
    state = State(base, _REPLACED, heads, unneeded=_right_already, pad_rows_to=pad_rows_to)
    state.compiled = CompiledPrompts()
    state.attach(peft_model)
    try:
        reason = state.engine.refusal or _why_not_behind_prefix(peft_model, state)
    except BaseException:
        restore(peft_model)
        raise
    smooth_by_text()
    if reason is not None:
        state.warn(reason)
    return peft_model


@torch.no_grad()
def _why_not_behind_prefix(model, state):
    """None if the model gives the same behind its learned keys and values, packed, or has none, else what differs."""
    if not is_prefix(model.active_peft_config) or not isinstance(model, PACKED_CLASSES):
        return None
    kind = PairCall if isinstance(model, PeftModelForSeq2SeqLM) else Call
    try:
        shared_of_prefix(model, state, model.get_prompt(batch_size=1), kind.state_of)
    except CannotPack as reason:
        return str(reason)
    return None


def get_peft_model(
    model: PreTrainedModel,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    *,
    heads: str = "text",
    pad_rows_to: int | None = None,
    **options: Any,
) -> PeftModel:
    """``peft.get_peft_model`` and :func:`accelerate` in one, for models whose gradient checkpointing is on already.

    PEFT refuses Prefix-Tuning on them, for its own forward cannot do it (``prepare_model_for_kbit_training`` switches
    it on); packed rows can. Other arguments are those of ``peft.get_peft_model``.
    """
    with without_checkpoints(model):
        peft_model = peft.get_peft_model(model, peft_config, adapter_name, **options)
    return accelerate(peft_model, heads=heads, pad_rows_to=pad_rows_to)


def _right_already(model):
    """The methods that need no replacing in one model."""
    return () if generates_wrongly(model) else ("prepare_inputs_for_generation",)


# The methods of a PeftModel that an accelerated one replaces.
_REPLACED: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "generate": generate,
    "prepare_inputs_for_generation": prepare_inputs_for_generation,
    "disable_adapter": disable_adapter,
    "save_pretrained": resuming.save_pretrained,
    "load_adapter": resuming.load_adapter,
    "add_adapter": resuming.add_adapter,
}
