"""Generation and scoring of a batch in which each row stands behind a prompt of its own, or behind none.

The model's own ``generate`` runs on a cache that starts with the prompts. Where padding between a prompt and its text
would be seen (a recurrent state runs over it, a sliding window counts it), or a text is run on in chunks or goes on
from an earlier call, the cache is brought to the last token of each row first.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
)

from .attachment import evaluation_mode
from .cache_names import CACHE_NAMES, cache_argument
from .generation_options import GenerationOptions
from .masks import AsBefore, running
from .mixed_text import MixedText, checked_mask
from .per_layer import searching_part
from .prompt_cache import fill, virtual_columns
from .prompt_state import PromptState, cache_of_all_tokens
from .shared_state import layers_with_keys, text_config
from .structure import backbone_of, rope_limit

NO_PROMPT = PromptState(0)
_TURN = "_fastprompt_turn"  # in a cache that was returned: what it holds


@dataclass(frozen=True, eq=False)
class Turn:
    """What stands in a cache that a call returned.

    Attributes:
        model: the base model.
        prompts: what the prompts of its rows are called, if they have names.
        given: ``[B, S]`` booleans, the mask of the text as it was given.
        columns: ``[B, n]`` int64, 1 where one of the cache's first n columns, prompt and text, is real.
    """

    model: PreTrainedModel
    prompts: tuple[Any, ...]
    given: torch.Tensor
    columns: torch.Tensor


class Mixed:
    """A frozen causal LM whose rows stand behind prompts.

    Args:
        base: the model. It is not changed.
        needs_ids: does it look more up by token id than embeddings?

    Attributes:
        takes_prompts: may prompts of embeddings stand in front of text? Not where what is looked up by id would be
            added to text that was without in training (Gemma 3n).
    """

    def __init__(self, base: PreTrainedModel, needs_ids: bool = False) -> None:
        self.base, self.needs_ids = base, needs_ids
        self._config = text_config(base.config)
        layers: list[Any] = DynamicCache(config=self._config).layers
        self._keeps_state = any(hasattr(layer, "update_conv_state") for layer in layers)
        self._window = min((x.sliding_window for x in layers if hasattr(x, "sliding_window")), default=None)
        self._has_attention = bool(layers_with_keys(base.config))
        self._rope_limit = rope_limit(backbone_of(base))
        self._parameters = inspect.signature(base.forward).parameters
        prepare: Any = base.prepare_inputs_for_generation
        self._assisted: str | None = None  # why it cannot be; "": it can; None: that was not asked yet
        self.takes_prompts = not needs_ids or searching_part(base) is not None
        self._takes_embeds = "inputs_embeds" in inspect.signature(prepare).parameters and not needs_ids

    def generate(
        self,
        rows: Sequence[PromptState] | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        prompts: Sequence[Any] | None = None,
        **options: Any,
    ) -> Any:
        """What ``base.generate`` returns, each row as if it stood alone behind its prompt; the text as given in front.

        Arguments and errors are those of :meth:`prepare`.
        """
        return self.prepare(rows, input_ids, attention_mask, prompts=prompts, **options)()

    def prepare(
        self,
        rows: Sequence[PromptState] | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        prompts: Sequence[Any] | None = None,
        **options: Any,
    ) -> Callable[[], Any]:
        """Look through a call of :meth:`generate`; the function that is returned runs it.

        Args:
            rows: what stands in front of each of the B rows; None with ``past_key_values``, which has it.
            input_ids: ``[B, S]``; with ``past_key_values`` all of the text, that of earlier turns, too.
            attention_mask: ``[B, S]``, padded on any side; None: everything is text.
            prompts: names of the rows, which a later turn may repeat.
            options: of ``generate``; ``past_key_values`` is a cache that an earlier call returned.

        Raises:
            TypeError, ValueError, NotImplementedError: what cannot be run, by name, before anything is.
        """
        names = [name for name in CACHE_NAMES if options.get(name) is not None]
        past = options.pop(names[0]) if names else None
        asked = GenerationOptions(self.base, {name: x for name, x in options.items() if name not in CACHE_NAMES})
        batch, width = checked_mask(input_ids, attention_mask).shape
        if asked.assisted:
            if batch != 1:
                raise ValueError(f"input_ids must have one row for assisted decoding, got {batch}")
            self._check_assisted()
        if past is not None:
            return self._go_on(past, prompts, input_ids, attention_mask, asked)
        if rows is None or len(rows) != batch:
            raise ValueError(f"prompts must have one entry for each of the {batch} rows, got {rows and len(rows)}")
        text = MixedText.of(input_ids, attention_mask)
        reach = max(row.length for row in rows) + text.ids.shape[1] + asked.new_tokens(width)
        self.check_reach(reach)
        seen = text.is_padded and self._sees_padding(reach)
        stepwise = seen or asked["prefill_chunk_size"] is not None
        if stepwise:
            self._check_stepwise(asked, "attention_mask with padding" if seen else "prefill_chunk_size")
        given, called = checked_mask(input_ids, attention_mask), tuple(prompts or [None] * batch)

        def run():
            with torch.no_grad(), running(AsBefore()):
                held, ahead = rows, text.mask
                if stepwise:
                    held, ahead = self._advanced(rows, text, asked["prefill_chunk_size"]), text.mask[:, -1:]
                columns = torch.cat([virtual_columns(held, ahead.device), ahead], 1)
                cache, turn = self._filled(held, asked, reach), Turn(self.base, called, given, columns)
                return self._run(asked, input_ids, text, columns, cache, turn, stepwise)

        return run

    def _go_on(self, past, prompts, input_ids, attention_mask, asked):
        """A turn behind those that a cache holds."""
        turn = vars(past).get(_TURN)
        if turn is None or turn.model is not self.base:
            raise ValueError(
                "past_key_values must be a cache that an earlier call returned, with return_dict_in_generate=True and "
                f"without beams, got a {type(past).__name__}"
            )
        if prompts is not None and tuple(prompts) != turn.prompts:
            raise ValueError(
                f"prompts must be None or those of the earlier turns with past_key_values, got {list(prompts)}"
            )
        if asked["cache_implementation"] is not None:
            raise ValueError("cache_implementation must be None with past_key_values")
        if asked.expansion > 1:
            raise ValueError(
                "num_beams and num_return_sequences must be 1 with past_key_values, got "
                f"{asked.num_beams} and {asked.returned}"
            )
        self._check_stepwise(asked, "past_key_values")
        seen, real = turn.given, checked_mask(input_ids, attention_mask)
        length = past.get_seq_length() if self._has_attention else None
        if length is None:
            raise NotImplementedError("past_key_values cannot be used again where no layer keeps keys and values")
        generated = int(length) - turn.columns.shape[1]
        held = seen.shape[1] + generated
        batch, width = real.shape
        if batch != len(seen) or width <= held or not torch.equal(real[:, : seen.shape[1]], seen.to(real.device)):
            raise ValueError(
                f"input_ids and attention_mask must begin with the text of the earlier turns, {list(seen.shape)} and "
                f"{generated} tokens, and go on, got {list(real.shape)}"
            )
        between, new = real[:, seen.shape[1] : held].long(), MixedText.of(input_ids[:, held:], real[:, held:])
        columns = torch.cat([turn.columns, between, new.mask], 1)
        reach = columns.shape[1] + asked.new_tokens(width)
        self.check_reach(reach)
        if bool((columns.diff(dim=1) < 0).any()) and self._sees_padding(reach):
            raise NotImplementedError(
                f"attention_mask must leave no padding between what a row holds by now, up to {reach} positions, for a "
                "model whose layers keep a state or a sliding window"
            )
        limit = _room(past)
        if limit is not None and limit < reach - 1:
            raise ValueError(f"max_new_tokens must leave room in a static cache of {limit} positions, got {reach}")

        def run():
            with torch.no_grad(), running(AsBefore()):
                vars(past).pop(_TURN)  # no more what it was, should this call not end
                self._advance(past, new.ids[:, :-1], columns[:, :-1], asked["prefill_chunk_size"])
                ids = torch.cat([input_ids[:, :held].long(), new.ids], 1)
                mask = torch.cat([real[:, :held].long(), new.mask], 1)
                turn_after = Turn(self.base, turn.prompts, real, columns)
                return self._run(asked, input_ids, MixedText(ids, mask), columns, past, turn_after, stepwise=True)

        return run

    def _run(self, asked, input_ids, text, columns, cache, turn, stepwise):
        """The model's own ``generate`` on a cache that holds what stands in front, or all but the last column."""
        options = asked.for_generate(input_ids.shape[1])
        options.update(cache_argument(self.base.forward, cache))
        ids, last = text.ids, text.ids[:, -1:]
        if asked.counts_tokens:
            # Padding is no text, nor does the mask begin where the ids do, by which transformers would tell.
            first = ids.gather(1, text.mask.argmax(1, keepdim=True))
            ids = torch.where(text.mask.bool(), ids, first)
        if asked.penalises_repetition:
            options["logits_processor"] = _with_repetition_penalty(asked)
        if not self._has_attention:
            columns = text.mask if not stepwise else torch.ones_like(last)
        if stepwise and self._takes_embeds:
            # The text goes to what reads it (penalties, stopping); what is run is the last column alone.
            embeds = self.base.get_input_embeddings()(last)
            options["inputs_embeds"] = embeds.expand(-1, columns.shape[1], -1)
        elif stepwise:  # as many ids as columns: the model's own generate runs what the cache does not hold
            ids = torch.cat([ids[:, :1].expand(-1, columns.shape[1]), ids], 1)[:, -columns.shape[1] :]
        result = self.base.generate(input_ids=ids, attention_mask=columns, **options)
        return self._as_given(result, input_ids, ids.shape[1], asked, turn)

    def _as_given(self, result, input_ids, width, asked, turn):
        """``result`` with the text as it was given in front, and a cache that a later turn can go on from."""
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        front = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0)
        sequences = torch.cat([front.to(sequences), sequences[:, width:]], 1)
        if isinstance(result, torch.Tensor):
            return sequences
        result.sequences = sequences
        cache = next((result[name] for name in CACHE_NAMES if result.get(name) is not None), None)
        if cache is not None and asked.num_beams == 1:
            times = asked.returned
            given, columns = (x.repeat_interleave(times, 0) for x in (turn.given, turn.columns))
            repeated = tuple(prompt for prompt in turn.prompts for _ in range(times))
            vars(cache)[_TURN] = Turn(self.base, repeated, given, columns)
        return result

    def _filled(self, rows, asked, reach):
        """A new cache that starts with ``rows``, each as often as the model's batch has it."""
        cache: Cache
        if asked.is_static:
            longest = max(reach, asked["max_cache_len"] or 0)
            cache = StaticCache(config=self._config, max_cache_len=longest)
        else:
            cache = DynamicCache(config=self._config)
        return fill(cache, [row for row in rows for _ in range(asked.expansion)])

    def _advanced(self, rows, text, chunk):
        """The states behind all but the last token of each row: rows of one length together, so that none is padded."""
        reached = list(rows)
        lengths = text.lengths
        for length in sorted(set(lengths) - {1}):
            members = [index for index, n in enumerate(lengths) if n == length]
            front = [rows[index] for index in members]
            ids = text.ids[members, -length:-1]
            columns = torch.cat([virtual_columns(front, ids.device), torch.ones_like(ids)], 1)
            cache = fill(cache_of_all_tokens(self.base.config), front)
            self._advance(cache, ids, columns, chunk)
            totals = [row.length + length - 1 for row in front]
            for index, state in zip(members, PromptState.of_cache(cache, self.base, totals)):
                reached[index] = state
        return reached

    def _advance(self, cache, ids, columns, chunk=None):
        """Run ``ids [B, n]`` behind what ``cache`` holds; ``columns [B, held + n]`` is the mask of both."""
        done = columns.shape[1] - ids.shape[1]
        for part in ids.split(chunk or max(ids.shape[1], 1), 1):
            if part.shape[1]:
                done += part.shape[1]
                self.forward(cache, part, columns[:, :done], keep=1)

    def forward(
        self, cache: Cache, ids: torch.Tensor, columns: torch.Tensor, keep: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[B, n, V]`` of ``ids [B, n]`` behind what ``cache`` holds, or of the columns ``keep``.

        ``columns [B, held + n]`` is the mask of both; positions count its ones.
        """
        options: dict[str, Any] = {}
        if "position_ids" in self._parameters:
            options["position_ids"] = (columns.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._parameters and keep is not None:
            options["logits_to_keep"] = keep
        mask = columns if self._has_attention else columns[:, -ids.shape[1] :]
        options.update(cache_argument(self.base.forward, cache))
        return self.base(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True, **options).logits

    def _sees_padding(self, reach):
        """Would padding between a prompt and its text change what follows?"""
        return self._keeps_state or (self._window is not None and reach > self._window)

    def check_reach(self, reach: int) -> None:
        """Raises NotImplementedError if rows of ``reach`` positions depend on one another."""
        if self._rope_limit is not None and reach > self._rope_limit:
            raise NotImplementedError(
                f"prompt, text and new tokens must stay within {self._rope_limit} positions, for rotary frequencies "
                f"depend on the longest row from there on, got {reach}"
            )

    def _check_assisted(self):
        """Raises if this transformers does not decode with guesses behind a cache that starts with a prompt."""
        if self._assisted is None:
            self._assisted = self._why_not_assisted()
        if self._assisted:
            raise NotImplementedError(f"assisted decoding does not run behind a prompt here: {self._assisted}")

    def _why_not_assisted(self):
        """ "" if a text goes on in the same way with guesses as without, else what is different."""
        asked = Mixed(self.base, self.needs_ids)
        asked._assisted = ""
        table: Any = self.base.get_input_embeddings()
        ids = torch.tensor([[3, 5, 8, 3, 5]], device=table.weight.device) % len(table.weight)
        options: dict[str, Any] = dict(max_new_tokens=2, do_sample=False, num_beams=1, num_return_sequences=1)
        options.update(return_dict_in_generate=True, output_logits=True, pad_token_id=0, repetition_penalty=1.0)
        try:
            with torch.no_grad(), evaluation_mode(self.base), running(AsBefore()):
                row = PromptState.of_rows(self.base, table(ids)[0, :3])
                plain = asked.generate([row], ids, **options).logits[0].float()
                guessed = asked.generate([row], ids, prompt_lookup_num_tokens=2, **options).logits[0].float()
        except Exception as error:  # transformers' loop can fail in any way on a cache that it did not fill
            return f"{type(error).__name__}: {error}"
        worst = float((plain - guessed.reshape(plain.shape)).abs().max() / plain.abs().max())
        allowed = max(16 * torch.finfo(self.base.dtype).eps, 1e-4)
        return "" if worst <= allowed else f"its logits differ (relative difference {worst:.1e})"

    def _check_stepwise(self, asked, what):
        """Raises if a text cannot be run on in steps, as ``what`` makes it."""
        if asked.assisted:
            raise NotImplementedError(f"{what} cannot be used with assisted decoding")
        if (option := asked.reads_input_apart if self._takes_embeds else asked.reads_text) is not None:
            raise NotImplementedError(f"{what} cannot be used with {option} before a {type(self.base).__name__}")


def _room(cache):
    """How many positions a static cache has in layers that keep all of them; None: there is no end."""
    sizes = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len") and not layer.is_sliding]
    return min(sizes, default=None)


def _with_repetition_penalty(asked):
    """The processors of a call, and a penalty that counts all ids."""
    processors = LogitsProcessorList(asked["logits_processor"] or [])
    if not any(type(x) is RepetitionPenaltyLogitsProcessor for x in processors):
        processors.append(RepetitionPenaltyLogitsProcessor(float(asked["repetition_penalty"])))
    return processors
