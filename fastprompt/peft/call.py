"""One call of a PEFT model, translated for the engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
)
from transformers import Cache
from transformers.modeling_outputs import ModelOutput

from ..hf.cache_names import CACHE_NAMES, cache_in
from ..hf.request import Request, tokens_of
from ..hf.shared_state import SharedState
from ..layout import CannotPack
from .adapter import is_prefix, rows_in_front
from .chosen import ChosenPrompts
from .cpt import CPTLoss
from .encoder import fast_encoder
from .samples import OF_SAMPLES, TOLD, cu_seqlens_of

PACKED_CLASSES = (
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftModelForQuestionAnswering,
    PeftModelForFeatureExtraction,
    PeftModelForSeq2SeqLM,
)
# What a caller may pass without leaving the packed path. Anything else that is not None takes PEFT's own forward.
_UNDERSTOOD = {
    "adapter_names",
    "fused_lm_head",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "labels",
    "task_ids",
    "num_items_in_batch",
    "return_dict",
    "use_cache",
    "token_type_ids",
    "start_positions",
    "end_positions",
    "input_type_mask",
}
# What says something about adapters, or what PEFT ignores.
_OF_ADAPTERS = {"adapter_names", "task_ids", "input_type_mask", "token_type_ids"}
# What a backbone may be given besides its rows, where PEFT's own forward runs around it.
_OF_BACKBONE = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    *CACHE_NAMES,
    "token_type_ids",
    "use_cache",
    "return_dict",
    "num_items_in_batch",  # on its way to the loss
}


class Call:
    """One forward call of an accelerated model.

    There are two ways to run it: :meth:`language_model` does what PEFT's forward would do, with the head on labelled
    rows only; in :meth:`packed_backbone` PEFT's own forward runs, and only the layers in it see packed rows.

    Args:
        model: the model.
        state: what it remembers.
        given: the arguments by name.
        disabled: is the adapter disabled? Then the call is one of the base model's forward, a causal LM's.

    Attributes:
        request: what the engine is asked for.
        plan: its rows.
        direct: is :meth:`language_model` the way?

    Raises:
        CannotPack: the call has to take PEFT's own forward; the message says why.
        ValueError: wrong arguments.
    """

    def __init__(self, model: PeftModel, state: Any, given: dict[str, Any], disabled: bool = False) -> None:
        self.model, self.state, self.engine, self.given = model, state, state.engine, given
        self.config, self.disabled = model.active_peft_config, disabled
        self.is_prefix = is_prefix(self.config) and not disabled
        self.length = 0 if disabled else rows_in_front(self.config)
        is_lm = isinstance(model, PeftModelForCausalLM)
        self.direct = is_lm and self.engine.is_lm
        fused = bool(given.get("fused_lm_head"))
        if not fused:  # a fused head is given labelled rows by whatever forward there is; it needs the backbone only
            self.engine.ask_again()
        if self.engine.refusal is not None:
            raise CannotPack(self.engine.refusal)
        if self._unknown_arguments():  # they may concern nothing but the head
            self.direct = False
        if not fused and self.engine.own_forward_has_the_loss(given.get("labels"), given.get("num_items_in_batch")):
            self.direct = False
        if disabled and not self.direct:
            raise CannotPack("the adapter is disabled, and the call is not a plain one")
        self.tokens = cast(torch.Tensor, tokens_of(given))  # there are either
        if self.tokens.shape[1] == 0:
            raise CannotPack("the batch has no tokens")
        self.cu_seqlens = self._samples() if is_lm else None
        self._find_prompts()
        labels = given.get("labels")
        loss = self._loss(labels) if is_lm else None
        self.request = Request(
            tokens=self.tokens,
            num_virtual_tokens=self.length,
            prompts=self._prompts if self.length else None,
            prompt_ids=self.chosen.ids,
            shared=self._shared() if self.is_prefix else None,
            attention_mask=given.get("attention_mask") if self.cu_seqlens is None else None,
            cu_seqlens=self.cu_seqlens,
            flat=self.cu_seqlens is not None,
            labels=(labels if loss is None else loss.labels) if is_lm else None,
            loss=loss,
            num_items_in_batch=given.get("num_items_in_batch"),
            training=model.training,
            use_cache=given.get("use_cache") if self.cu_seqlens is None else False,
            own_forward=not self.direct,
            head_labels=labels,
            reads_all_columns=isinstance(model, PeftModelForQuestionAnswering),
            finds_last=state.heads == "text" and isinstance(model, PeftModelForSequenceClassification),
            finds_last_by_id=self.is_prefix and given.get("input_ids") is not None,
            rows_differ=given.get("token_type_ids") is not None and not self.direct,
        )
        self.plan = self._planned()

    def _unknown_arguments(self):
        given = self.given
        if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
            raise CannotPack("exactly one of input_ids and inputs_embeds is expected")
        if cache_in(given) is not None:
            raise CannotPack("a cache is given")
        # PEFT ignores positions behind prompts.
        understood = _UNDERSTOOD - _OF_ADAPTERS if self.disabled else _UNDERSTOOD
        return {name for name, value in given.items() if says_something(value)} - understood - OF_SAMPLES

    def _samples(self):
        """``cu_seqlens`` of several samples that come as one row, or None."""
        given, starts = self.given, cu_seqlens_of(self.given)
        if starts is None:
            if not self.length and given.get("position_ids") is not None:
                raise CannotPack("position_ids given")
            return None
        if not self.direct and any(given.get(name) is not None for name in ("task_ids", "adapter_names")):
            raise CannotPack("packed samples behind several prompts, run by the model's own forward")
        if self.config.peft_type == PeftType.CPT and not self.disabled:
            raise CannotPack("packed samples, and CPT has labels of its own for each token of a row")
        mask = given.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise CannotPack("a packed batch with an attention mask")
        if not self.disabled:
            self.state.tell(TOLD)
        return starts

    def _find_prompts(self):
        """Which prompt each row has."""
        rows = len(self.tokens) if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        names, task_ids = self.given.get("adapter_names"), self.given.get("task_ids")
        self.chosen = ChosenPrompts.of(self.model, names, task_ids, rows, self.tokens.device)
        self.parts = self.chosen.parts(())
        if names is not None:
            self.state.tell("fastprompt: adapter_names gives every row the prompt of its own adapter; PEFT ignores it")

    def _planned(self):
        """The plan of the request, which says which prompts there are."""
        plan = self.engine.plan(self.request)
        self.parts = self.chosen.parts(plan.prompts)
        return plan

    def _of_each_adapter(self, get):
        """``get(tasks)`` with each adapter of the batch active in turn, and its tasks, None if it has none."""
        active, results = self.model.active_adapter, []
        try:
            for name, tasks in self.parts:
                self.model.active_adapter = name
                results.append(get(tasks))
        finally:
            self.model.active_adapter = active
        return results

    def _loss(self, labels):
        """CPT's own loss; None: the model's."""
        if self.config.peft_type != PeftType.CPT or self.disabled or labels is None:
            return None
        if self.given.get("fused_lm_head"):
            raise CannotPack("CPT has a loss of its own, and a fused head another one")
        # PEFT takes the weights from the adapter of this name, whichever is active.
        decay = self.model.peft_config.get("default", self.config)
        return CPTLoss(self.config, decay, labels, self.given.get("input_type_mask"))

    def _prompts(self):
        """The distinct prompts, ``[N * P, D]``."""
        return self._distinct_prompts().flatten(0, 1)

    def _distinct_prompts(self):
        """``[N, P, D]``."""

        def of_active(tasks):
            with self._encoder():
                return self.model.get_prompt(batch_size=1 if tasks is None else len(tasks), task_ids=tasks)  # [n, P, D]

        return torch.cat(self._of_each_adapter(of_active))

    @cached_property
    def _cache(self):
        """PEFT's prefix, for a batch of one row."""
        return self.model.get_prompt(batch_size=1)

    def _shared(self):
        first, *others = self._of_each_adapter(self._shared_of_active)
        if not others:
            return first
        return first.with_tensors(map(torch.cat, zip(first.tensors(), *(x.tensors() for x in others))))

    def _shared_of_active(self, tasks):
        cache = self._cache if len(self.chosen.adapters) == 1 else self.model.get_prompt(batch_size=1)
        return shared_of_prefix(self.model, self.state, cache, self.state_of)

    @staticmethod
    def state_of(cache: Any, config: Any) -> SharedState:
        """What stands in front of the sequences of a model with this config, of a cache that PEFT made."""
        return SharedState.of_cache(cache, config)

    def language_model(self) -> ModelOutput | tuple[Any, ...]:
        """The output of a causal LM."""
        given, model = self.given, self.model
        if not self.disabled:  # PEFT's warnings about arguments it ignores
            ignored = {name: given.get(name) for name in ("position_ids", "token_type_ids")}
            model._adjust_prompt_learning_kwargs(self.config, kwargs=ignored)
        if given.get("fused_lm_head"):
            options = {name: given[name] for name in ("fused_lm_head", "num_items_in_batch") if name in given}
            return self.engine.run_fused_head(self.request, self.plan, self._embed, **options)
        return as_asked(self.engine.run(self.request, self.plan, self._embed), given, model.base_model.config)

    def _encoder(self):
        return fast_encoder(self.model.prompt_encoder[self.model.active_adapter], self.state.outputs)

    def _embed(self, tokens):
        return tokens if tokens.is_floating_point() else self.model.word_embeddings(tokens)

    @contextmanager
    def packed_backbone(self) -> Iterator[None]:
        """PEFT's own forward inside of this block runs its layers on packed rows."""
        try:
            if self.is_prefix:
                # PEFT would repeat the prefix for every row of the batch; nothing reads it here.
                cache = self._cache
                self.model.__dict__["get_prompt"] = lambda *args, **kwargs: cache
            elif self.given.get("adapter_names") is not None:
                prompts = self._distinct_prompts()
                prompts = prompts[list(self.plan.prompt_ids)]
                self.model.__dict__["get_prompt"] = lambda *args, **kwargs: prompts
            with self.engine.packed_backbone(self.request, self.plan, self._packed), self._encoder():
                yield
        finally:
            self.model.__dict__.pop("get_prompt", None)

    def _packed(self, given):
        """The packed rows of what PEFT hands to the backbone: ``[B, P + S, ...]``, prompt and text."""
        unknown = {name for name, value in given.items() if says_something(value)} - _OF_BACKBONE
        if self.cu_seqlens is not None:
            unknown -= OF_SAMPLES
        if unknown:
            raise CannotPack(f"{', '.join(sorted(unknown))} given")
        source = self.plan.source
        width = self.tokens.shape[1]
        front = self.request.num_virtual_tokens
        row, column = source // width, front + source % width
        if front:
            # The first row of the batch in front of which each prompt stands.
            firsts = {prompt: index for index, prompt in reversed(list(enumerate(self.plan.prompt_ids)))}
            row_of = torch.tensor([firsts.get(i, 0) for i in range(len(self.plan.prompts))], device=source.device)
            virtual = -1 - source  # of all prompts, where it is not negative
            row = torch.where(virtual < 0, row, row_of[virtual.clamp(min=0) // front])
            column = torch.where(virtual < 0, column, virtual % front)
        cells = row * (front + width) + column
        names = [name for name in ("input_ids", "inputs_embeds", "token_type_ids") if given.get(name) is not None]
        return {name: given[name].flatten(0, 1)[cells] for name in names}


def shared_of_prefix(
    model: PeftModel, state: Any, prefix: Any, read: Callable[[Any, Any], SharedState] = SharedState.of_cache
) -> SharedState:
    """The learned keys and values that the active adapter puts in front, ``prefix``, of a batch of one row.

    The first time for an adapter of this shape, the model is asked whether it gives the same behind them, packed.
    ``read`` makes them of a cache that PEFT made, and the model's config.

    Raises:
        CannotPack: it does not.
    """
    if not isinstance(prefix, Cache):
        raise CannotPack(f"its prefix is a {type(prefix).__name__}")
    config = state.engine.base.config
    shared = read(prefix, config)
    reason = state.engine.why_not_prefix(
        lambda: read(model.get_prompt(batch_size=1), config),
        (model.active_adapter, *(layer and layer.keys.shape for layer in shared.layers)),
        state.original(model),
    )
    if reason is not None:
        raise CannotPack(reason)
    return shared


def says_something(value: Any) -> bool:
    """Is it more than the default of an argument that switches something on?"""
    return value is not None and value is not False


@torch.compiler.disable  # a compiled caller hands logits on that are computed when they are read
def as_asked(output: ModelOutput, given: dict[str, Any], config: Any) -> ModelOutput | tuple[Any, ...]:
    """An output, or the tuple of it that ``return_dict``, of a call's arguments or of the config, asks for."""
    as_dict = given.get("return_dict")
    if as_dict is None:
        as_dict = getattr(config, "return_dict", True)
    return output if as_dict else output.to_tuple()
