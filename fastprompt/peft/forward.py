"""The forward of an accelerated model: which call runs how."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, PeftModelForSequenceClassification

from ..hf.checkpointing import without_checkpoints
from ..hf.interventions import NotAsked
from ..hf.masks import UnsupportedAttention
from ..hf.per_layer import behind_prompt, told_ids
from ..hf.request import beside, tokens_of
from ..layout import CannotPack
from .adapter import is_prefix, rows_in_front
from .call import PACKED_CLASSES, Call
from .heads import last_token_read, outputs_of_text, targets_of_text
from .samples import TOLD, cu_seqlens_of, in_one_row, padded
from .seq2seq import PairCall
from .smoothing import to_be_shifted


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Does torch.export trace this? In a graph of torch.compile, torch before 2.13 says so itself."""
    return torch.compiler.is_exporting()


def forward(model: PeftModel, state: Any, *args: Any, **kwargs: Any) -> Any:
    """The output of PEFT's forward, run on packed rows where they give the same.

    Args:
        model: the model.
        state: what it remembers; the other arguments are those of PEFT's forward.
    """
    output = _run(model, state, args, kwargs)
    if is_exporting() or not isinstance(model, PeftModelForCausalLM):
        return output
    return to_be_shifted(output) if is_prefix(model.active_peft_config) else output


def _run(model, state, args, kwargs):
    original = state.original(model)
    if is_exporting():
        return original(*args, **kwargs)
    config = model.active_peft_config
    if not config.is_prompt_learning or not isinstance(model, PACKED_CLASSES):
        return original(*args, **kwargs)
    front = rows_in_front(config)
    given, of_text, reading = _understood(model, state, original, front, args, kwargs)
    output = _packed_or_padded(model, state, original, given, reading)
    return outputs_of_text(output, front) if of_text else output


@torch.compiler.disable
def _understood(model, state, original, front, args, kwargs):
    """The arguments of a call by name, are its outputs wanted of the text only, and what makes a block to run it in."""
    given = by_name(original, args, kwargs)
    if state.heads != "text":
        return given, False, nullcontext
    given, of_text = targets_of_text(model, front, given, state.tell)
    reading = nullcontext
    if isinstance(model, PeftModelForSequenceClassification) and not state.engine.abilities.right_padding:
        by_id = is_prefix(model.active_peft_config)
        reading = functools.partial(last_token_read, model.base_model, given, by_id=by_id, tell=state.tell)
    return given, of_text, reading


def by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, its tensors on the device of its tokens."""
    given = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    return beside(tokens_of(given), given)


def _packed_or_padded(model, state, original, given, reading):
    call = _translate(model, state, given)
    if call is not None:
        try:
            if call.direct:
                return call.language_model()
            with call.packed_backbone(), reading():
                return original(**{name: x for name, x in given.items() if name != "adapter_names"})
        except NotAsked:
            state.engine.uncount(call.plan)
            return _packed_or_padded(model, state, original, given, reading)
        except (UnsupportedAttention, CannotPack) as reason:  # what the model's layers are given shows more
            state.engine.uncount(call.plan)
            _fall_back(state, str(reason), given)
    # PEFT hands a prefix on as a cache, which a checkpointed layer does not take.
    layers = without_checkpoints(model) if is_prefix(model.active_peft_config) else nullcontext()
    with reading(), layers:
        return _padded(model, state, original, given)


def _padded(model, state, original, given):
    """PEFT's own forward; samples that come packed into one row get a row each, or it would take them for one."""
    front = rows_in_front(model.active_peft_config)
    starts = cu_seqlens_of(given) if isinstance(model, PeftModelForCausalLM) else None
    if starts is not None:
        state.tell(TOLD)
        given = padded(given, starts)
    ids = given.get("input_ids")
    with nullcontext() if ids is None else told_ids(model.base_model, behind_prompt(ids, front)):
        output = original(**given)
    return output if starts is None else in_one_row(output, starts, front)


@contextmanager
def disable_adapter(model: PeftModel, state: Any) -> Iterator[None]:
    """``PeftModel.disable_adapter``, in which the base model runs packed rows, too: no padding, common text once.

    Args:
        model: the model.
        state: what it remembers.
    """
    with state.original(model, "disable_adapter")():
        if model.active_peft_config.is_prompt_learning and isinstance(model, PeftModelForCausalLM):
            # PEFT has put the base model's there, and gives back at the end what it found.
            without = functools.partial(_without_adapter, model, state, model.forward)
            setattr(model, "forward", without)  # noqa: B010
        yield


def _without_adapter(model, state, original, *args, **kwargs):
    """The base model's forward ``original``, on packed rows where they give the same."""
    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    given = by_name(original, args, kwargs)
    call = _translate(model, state, given, disabled=True)
    if call is not None:
        try:
            return call.language_model()
        except NotAsked:
            state.engine.uncount(call.plan)
            return _without_adapter(model, state, original, **given)
        except (UnsupportedAttention, CannotPack) as reason:
            state.engine.uncount(call.plan)
            _fall_back(state, str(reason), given)
    return original(*args, **kwargs)


@torch.compiler.disable
def _translate(model, state, given, disabled=False):
    """The call, planned, or None if it has to take PEFT's own forward."""
    try:
        kind = PairCall if isinstance(model, PeftModelForSeq2SeqLM) else Call
        return kind(model, state, given, disabled)
    except CannotPack as reason:
        _fall_back(state, str(reason), given)
        return None


def _fall_back(state, reason, given):
    """Let the call take PEFT's own forward, unless that would be the wrong answer."""
    if given.get("adapter_names") is not None:
        raise ValueError(f"adapter_names needs packed rows, but {reason}")
    state.fell_back(reason)
