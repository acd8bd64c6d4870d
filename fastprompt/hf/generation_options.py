"""What a call of ``generate`` asks for: read, and refused by name where it cannot be done behind prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

# What gives the model other inputs than ids and a mask, or runs it in another way than one row a sequence.
_REFUSED = {
    "inputs": "pass input_ids",
    "inputs_embeds": "pass input_ids",
    "decoder_input_ids": "the model is a decoder",
    "position_ids": "positions are counted behind the prompts",
    "token_type_ids": "a prompt has none",
    "encoder_outputs": "the model is a decoder",
    "custom_generate": "its loop is not known",
    "negative_prompt_ids": "it would run without the prompt",
    "guidance_scale": "it would run without the prompt",
    "penalty_alpha": "its loop runs the cache on in another way",
    "dola_layers": "its loop is not known",
    "constraints": "its loop is not known",
    "force_words_ids": "its loop is not known",
    "num_beam_groups": "its loop is not known",
    "token_healing": "it changes the text",
    "assistant_early_exit": "its assistant shares the cache",
    "use_mtp": "its assistant shares the cache",
    "speculation_type": "its assistant shares the cache",
    "mtp_module": "its assistant shares the cache",
}
_WITHOUT_EFFECT = {"guidance_scale": (1, 1.0), "num_beam_groups": (1,)}
# What reads the ids that generate was called with, apart from those that were generated.
_READ_INPUT = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
# What reads the text so far, and would take what stands in front of it for text.
_READ_TEXT = (
    *_READ_INPUT,
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "stop_strings",
    "watermarking_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
)


@dataclass(frozen=True, eq=False)
class GenerationOptions:
    """The options of one call: arguments, else those of its ``generation_config``, else the model's own.

    Args:
        base: the model.
        given: the keyword arguments of ``generate`` but for ids, mask and cache.

    Raises:
        ValueError: an option that cannot be done behind prompts.
    """

    base: PreTrainedModel
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, reason in _REFUSED.items():
            value = self[name]
            if value is None or value is False or value in _WITHOUT_EFFECT.get(name, ()):
                continue
            raise ValueError(f"{name} cannot be used behind prompts ({reason}), got {_shown(value)}")
        if self["use_cache"] is False:
            raise ValueError("use_cache must be True behind prompts, which stand in the cache, got False")
        kind = self["cache_implementation"]
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f'cache_implementation must be "dynamic" or "static" behind prompts, got {kind!r}')
        if self["streamer"] is not None and self.num_beams > 1:
            raise ValueError(f"streamer must be None for beams, got num_beams={self.num_beams}")
        chunk = self["prefill_chunk_size"]
        if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"prefill_chunk_size must be at least 1, got {chunk!r}")
        if self.assisted and self.is_static:
            raise ValueError('cache_implementation must be "dynamic" for assisted decoding, got "static"')
        if self.assisted and self.expansion > 1:
            expected = "must be 1 for assisted decoding"
            raise ValueError(f"num_beams and num_return_sequences {expected}, got {self.num_beams} and {self.returned}")

    def __getitem__(self, name: str) -> Any:
        """The value of an option, None if nobody set it."""
        found = next((source[name] for source in self._sources() if source.get(name) is not None), None)
        # Some models' files still ask for what transformers no longer has, and passes over.
        inherited = name == "cache_implementation" and found not in [source.get(name) for source in self._sources()[:2]]
        return None if inherited and found == "hybrid" else found

    @property
    def num_beams(self) -> int:
        return self["num_beams"] or 1

    @property
    def returned(self) -> int:
        """Sequences that are returned for each row."""
        return self["num_return_sequences"] or 1

    @property
    def expansion(self) -> int:
        """Rows of the model's batch for each row of the call."""
        return max(self.num_beams, self.returned)

    @property
    def assisted(self) -> bool:
        """Is a part of the tokens guessed, and only looked through by the model?"""
        return self["assistant_model"] is not None or self["prompt_lookup_num_tokens"] is not None

    @property
    def is_static(self) -> bool:
        return self["cache_implementation"] == "static"

    @property
    def penalises_repetition(self) -> bool:
        return self["repetition_penalty"] not in (None, 1, 1.0)

    @property
    def counts_tokens(self) -> bool:
        """Does an option look at which tokens a text has, wherever they stand?"""
        of_input = self["encoder_repetition_penalty"] not in (None, 1, 1.0)
        ngrams = (self[name] for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"))
        return self.penalises_repetition or of_input or 1 in ngrams

    @property
    def reads_input_apart(self) -> str | None:
        """An option that looks at the input ids apart from the text so far, or None."""
        return self._first_of(_READ_INPUT)

    @property
    def reads_text(self) -> str | None:
        """An option that looks at all of the text so far, or None."""
        return self._first_of(_READ_TEXT)

    def _first_of(self, names):
        without = (None, 0, 1.0)
        return next((name for name in names if not any(self[name] is x or self[name] == x for x in without)), None)

    def new_tokens(self, width: int) -> int:
        """The largest number of new tokens behind a text of ``width`` columns.

        Raises:
            ValueError: ``max_length`` leaves none.
        """
        for source in self._sources():
            if source.get("max_new_tokens") is not None:
                return source["max_new_tokens"]
            if (longest := source.get("max_length")) is not None:
                if longest <= width:
                    raise ValueError(f"max_length must be above the {width} columns of text, got {longest}")
                return longest - width
        return _DEFAULT_NEW_TOKENS

    def for_generate(self, width: int) -> dict[str, Any]:
        """The keyword arguments for the model's own ``generate``, with lengths that count new tokens."""
        passed = {name: x for name, x in self.given.items() if name not in _DONE_HERE}
        if self["max_length"] is not None or "max_new_tokens" in self.given:
            passed["max_new_tokens"] = self.new_tokens(width)
        if (least := self["min_length"]) and self["min_new_tokens"] is None:
            passed["min_new_tokens"] = max(least - width, 0)
        for name in ("cache_implementation", "prefill_chunk_size"):
            if self[name] is not None:
                passed[name] = None
        return passed

    def _sources(self):
        config = self.given.get("generation_config")
        return self.given, vars(config) if config is not None else {}, vars(self.base.generation_config)


_DEFAULT_NEW_TOKENS = 20  # as in transformers
_DONE_HERE = ("max_length", "min_length", "cache_implementation", "prefill_chunk_size", "max_cache_len")


def _shown(value):
    return repr(value) if isinstance(value, (str, int, float, bool)) else type(value).__name__
