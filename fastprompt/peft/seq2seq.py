"""One call of a PEFT model of an encoder-decoder, translated for the engine."""

from functools import cached_property
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from peft.utils import shift_tokens_right

from ..hf.cache_names import cache_in
from ..hf.request import Request, Target, tokens_of
from ..hf.shared_state import SharedState
from ..layout import CannotPack
from .adapter import is_prefix, rows_in_front
from .call import Call, says_something

# What a caller may pass without leaving the packed path.
_UNDERSTOOD = {
    "adapter_names",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "decoder_attention_mask",
    "labels",
    "task_ids",
    "num_items_in_batch",
    "return_dict",
    "use_cache",
    "token_type_ids",  # PEFT ignores these two
    "position_ids",
}


class PairCall(Call):
    """One forward call of an accelerated encoder-decoder.

    PEFT's prompts stand in front of the encoder's text, and its prefixes in front of the decoder's tokens. The prompts
    of Multitask Prompt Tuning have a second half, which stands there, too, unless the adapter is said to be for one
    part only (``num_transformer_submodules``).

    Args, attributes and errors are those of :class:`Call`.
    """

    def __init__(self, model: PeftModel, state: Any, given: dict[str, Any], disabled: bool = False) -> None:
        self.model, self.state, self.engine, self.given = model, state, state.engine, given
        self.config, self.disabled, self.direct, self.cu_seqlens = model.active_peft_config, disabled, True, None
        self.is_prefix, self.length = is_prefix(self.config), rows_in_front(self.config)
        self.engine.ask_again()
        if self.engine.refusal is not None:
            raise CannotPack(self.engine.refusal)
        if unknown := {name for name, value in given.items() if says_something(value)} - _UNDERSTOOD:
            raise CannotPack(f"{', '.join(sorted(unknown))} given")
        if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
            raise CannotPack("exactly one of input_ids and inputs_embeds is expected")
        if cache_in(given) is not None:
            raise CannotPack("a cache is given")
        self.tokens = cast(torch.Tensor, tokens_of(given))
        self._find_prompts()
        self.request = Request(
            tokens=self.tokens,
            num_virtual_tokens=self.length,
            prompts=(lambda: self._prompts_of_both[:, : self.length].flatten(0, 1)) if self.length else None,
            prompt_ids=self.chosen.ids,
            shared=self._shared() if self.is_prefix else None,
            attention_mask=given.get("attention_mask"),
            target=self._target(),
            labels=given.get("labels"),
            num_items_in_batch=given.get("num_items_in_batch"),
            training=model.training,
            use_cache=given.get("use_cache"),
        )
        self.plan = self._planned()

    def _target(self):
        """What the decoder is given, as PEFT's forward would hand it on."""
        given, mask = self.given, self.given.get("decoder_attention_mask")
        ids, embeds, labels = (given.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        if ids is not None and embeds is not None:
            raise CannotPack("decoder_input_ids and decoder_inputs_embeds are both given")
        tokens = ids if embeds is None else embeds
        if self.config.peft_type != PeftType.MULTITASK_PROMPT_TUNING:
            if tokens is None and labels is None:
                raise CannotPack("neither labels nor tokens for the decoder are given")
            return Target(tokens, mask)
        if ids is not None or (tokens is None and labels is None):
            raise CannotPack("of Multitask Prompt Tuning's targets PEFT takes labels only")
        if self.config.num_transformer_submodules == 1:
            if embeds is not None or mask is not None:
                raise CannotPack("of Multitask Prompt Tuning's targets PEFT takes labels only")
            return Target()
        if tokens is None:
            config = self.model.config
            tokens = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        return Target(tokens, mask, self.length, lambda: self._prompts_of_both[:, self.length :].flatten(0, 1))

    @staticmethod
    def state_of(cache: Any, config: Any) -> SharedState:
        """Of the decoder's self-attention."""
        return SharedState.of_cache(cache.self_attention_cache, config)

    @cached_property
    def _prompts_of_both(self):
        """The distinct prompts of encoder and decoder, ``[N, 2 * P, D]``, or those of the encoder alone."""
        return self._distinct_prompts()
