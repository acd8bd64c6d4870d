"""What a model can be trusted to do on packed rows: asked of the untouched model, then of the attached one.

A model is asked what it gives before anything in it is changed, and everything runs in wider arithmetic than the
model's own (see ``precision.py``): there rounding lies far below whatever one token may leak into another, and a
difference can only mean that packed rows are not the same computation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..layout import IGNORE, CannotPack, plan_padded_input, recurrent_schedule
from ..ops.prefix_attention.scheduled import Shape
from .attachment import evaluation_mode
from .cache import PackedCache, content
from .cache_names import CACHE_NAME
from .expectations import ITEMS, Expectations, column_read, first_output
from .first_layer import FirstLayer
from .known_attention import key_limit, sees_distances, why_not_indexed
from .last_layer import LastLayer
from .masks import UnsupportedAttention
from .outer_layer import calls_of
from .per_layer import searching_part, why_no_padding
from .runner import Runner
from .states import Recorded
from .structure import backbone_of, is_plain_linear, rope_limit, row_limit, why_never_packed


@dataclass(frozen=True)
class Abilities:
    """What the engine may do with a model.

    Attributes:
        refusal: None if packed rows give the model's own output, else the reason why not.
        is_lm: is it a causal LM, whose whole forward runs packed rows?
        layout: "shared" for a causal model, whose prompt no text changes, else "packed".
        position_offset, compact_positions: see Runner.
        left_padding: are left-padded rows seen as packed rows are?
        right_padding: is it so that the head does not read the last column, whatever stands there?
        plain_head: is its forward behind the decoder nothing but a linear head and the ordinary loss?
        own_loss: None if its loss is that of its logits, else what is different; with ``num_items_in_batch`` see
            own_loss_of_items.
        ignores_items: is its loss the mean, whatever ``num_items_in_batch`` says? Asked of encoder-decoders alone.
        packs_own_loss: if its loss is different, is it right when its own forward runs around the packed backbone?
        needs_ids: does it look more up by token id than embeddings?
        returns_cache: does it return a cache when asked?
        makes_cache: are the keys and values of attention, and the states of other layers, what that cache holds?
        cache_name: the name that it has in an output.
        cache_with_labels: is there one beside a loss, too? Asked of encoder-decoders alone.
        pooled_column: the column of hidden states that a classifier reads, whatever stands there: 0, -1, or None if it
            reads them all.
        rope_limit: the width from which on rotary frequencies depend on the padding; None: they never do.
        row_limit: the number of rows from which on a row's place in the batch counts; None: it never does.
        key_limit: the number of keys up to which a row sees all that its mask shows, and an indexer chooses none of
            them; None: there is no indexer.
        first_layer: the first layer of a causal LM, if no rows have met before its attention.
        last_layer: the last layer of a causal LM, if it gives the same when it runs on chosen rows.
        has_window: does a layer count positions in attention: through a sliding window, ALiBi or T5's bias?
    """

    refusal: str | None = None
    is_lm: bool = False
    layout: str = "shared"
    position_offset: int = 0
    compact_positions: bool = False
    left_padding: bool = True
    right_padding: bool = True
    plain_head: bool = False
    own_loss: str | None = None
    own_loss_of_items: str | None = None
    ignores_items: bool = False
    packs_own_loss: bool = False
    needs_ids: bool = False
    returns_cache: bool = False
    makes_cache: bool = False
    cache_name: str = CACHE_NAME
    cache_with_labels: bool = False
    pooled_column: int | None = None
    rope_limit: int | None = None
    row_limit: int | None = None
    key_limit: int | None = None
    first_layer: FirstLayer | None = None
    last_layer: LastLayer | None = None
    has_window: bool = False

    def why_not_loss_of_logits(self, num_items: torch.Tensor | int | None) -> str | None:
        """None if its loss, divided by ``num_items``, is that of its logits, else what is different."""
        return self.own_loss if num_items is None else self.own_loss_of_items

    @property
    def causal(self) -> bool:
        return self.layout == "shared"


@dataclass(eq=False)
class Probe:
    """Asks one model: :meth:`expect` while it is untouched, :meth:`abilities` once it is attached."""

    base: PreTrainedModel
    is_lm: bool = field(init=False)
    backbone: nn.Module = field(init=False)
    expected: Expectations = field(init=False)

    def __post_init__(self) -> None:
        self._asked, self._has_window = None, False
        self._shapes: set[Shape] = set()
        self.is_lm = self.base.get_output_embeddings() is not None and self.base.can_generate()
        self.backbone = backbone_of(self.base) if self.is_lm else self.base.base_model

    @torch.no_grad()
    def expect(self) -> str | None:
        """Ask the untouched model; the reason why it can never be packed, or None."""
        has_indexer = key_limit(self.backbone) is not None
        reason = why_not_indexed(self.backbone)
        reason = reason or why_never_packed(self.base, self.backbone, sees_distances(self.backbone), has_indexer)
        reason = reason or why_no_padding(searching_part(self.base))
        if reason is None:
            with evaluation_mode(self.base):
                self.expected = Expectations.of(self.base, self.backbone, self.is_lm)
            reason = self.expected.refusal
        return reason

    @torch.no_grad()
    def abilities(self) -> Abilities:
        """Compare what the attached model gives on packed rows."""
        with evaluation_mode(self.base):
            found = self._find_layout()
            if found.refusal is not None:
                return found
            found = self._find_left_padding(found)
            found = replace(
                found,
                returns_cache=self.expected.cache is not None,
                makes_cache=self._cache_is_the_same(found),
                cache_name=self.expected.cache_name,
                rope_limit=rope_limit(self.backbone),
                row_limit=row_limit(self.backbone),
                key_limit=key_limit(self.backbone),
                has_window=self._has_window or sees_distances(self.backbone),
            )
            if not self.is_lm:
                return replace(found, pooled_column=column_read(self.expected))
            found = replace(
                found,
                plain_head=self._head_is_plain(),
                own_loss=self._own_loss(None),
                own_loss_of_items=self._own_loss(ITEMS),
                needs_ids=self.expected.needs_ids,
                **self._outer_layers(found),
            )
            has_own_loss = any(found.why_not_loss_of_logits(items) is not None for items in self.expected.losses)
            return replace(found, packs_own_loss=has_own_loss and self._packs_own_loss(found))

    def runner(self, abilities: Abilities) -> Runner:
        return Runner(
            self.base,
            self.backbone,
            self.is_lm,
            abilities.layout,
            abilities.position_offset,
            abilities.compact_positions,
            abilities.first_layer,
            abilities.last_layer,
            shapes=self._shapes,
        )

    def _find_layout(self):
        """The layout and the first position that give the model's own output, or the reason why none does."""
        padding = getattr(self.base.config, "pad_token_id", None)
        offsets = [0] if padding is None else [0, padding + 1]  # RoBERTa counts from there
        reason = None
        for mask in ("right",) if self.is_lm else ("right", "full"):
            for layout in ("shared",) if self.is_lm else ("shared", "packed"):
                for offset in offsets:
                    tried = Abilities(None, self.is_lm, layout, offset, right_padding=mask == "right")
                    try:
                        found = self._differs(tried, mask)
                    except Exception as error:  # a model can fail in any way on rows it was not written for
                        found = reason_of(self.base, error)
                    if found is None:
                        return tried
                    reason = reason or found
        return Abilities(self._why_not_continued() or self._why_no_mask() or reason, self.is_lm)

    def _why_not_continued(self):
        """The first layer that takes no notice of the state of its prompt, or None."""
        recorded = Recorded()
        try:
            with self.expected.arithmetic():
                plan, _ = self._packed(Abilities(is_lm=self.is_lm), "right", recorded)
                schedule = recurrent_schedule(plan)
                reasons = (mixer.why_not_continued(schedule, shared) for mixer, shared in recorded.mixers)
                return next(filter(None, reasons), None)
        except Exception:  # it does not run packed rows at all
            return None

    def _why_no_mask(self):
        """Packed rows ran, and nothing told them apart in attention; None if that is not so, or they raised."""
        if self._asked is not False:
            return None
        return f"{type(self.backbone).__name__} does not ask transformers' attention interface for a mask"

    def _find_left_padding(self, found):
        for compact in (False, True):
            tried = replace(found, compact_positions=compact)
            try:
                if self._differs(tried, "left") is None:
                    return tried
            except (CannotPack, UnsupportedAttention):
                break
        return replace(found, left_padding=False)

    def _outer_layers(self, found):
        """The first and the last layer, each if less has to be done there than in all rows."""
        sample = self.expected.sample
        plan = self._plan(found.layout, sample.masks["right"])

        def run(abilities=found, prompt=sample.prompt, wanted=None):
            runner = self.runner(abilities)
            with self.expected.arithmetic():
                rows = runner.rows(plan, prompt, sample.embeds)
                return runner.states(plan, rows, None, wanted).last_hidden_state

        def first():
            layer = FirstLayer.of(self.backbone, calls)
            if layer is None:
                return None
            others, _ = calls_of(self.backbone, lambda: run(prompt=sample.embeds[0, : len(sample.prompt)]))
            at_tokens, behind_another = (layer.states_of(x)[:, plan.front :] for x in (calls, others))
            return layer if torch.equal(at_tokens, behind_another) else None

        def last():
            layer = LastLayer.of(self.backbone, calls)
            if layer is None:
                return None
            wanted = torch.arange(0, len(plan.source), 2, device=plan.source.device)
            chosen = run(replace(found, last_layer=layer), wanted=wanted)
            differs = self.expected.difference(chosen[:, wanted], all_rows[:, wanted], None)
            return layer if differs is None else None

        calls, all_rows = _unless_raised(lambda: calls_of(self.backbone, run)) or ([], None)
        return {"first_layer": _unless_raised(first), "last_layer": _unless_raised(last)}

    def _differs(self, tried, name):
        """None if the packed and the padded output agree where tokens are real, else what differs."""
        sample = self.expected.sample
        _, packed = self._packed(tried, name)
        return self.expected.difference(packed, self.expected.outputs[name], sample.real(sample.masks[name]))

    def _packed(self, tried, name, recorded=None):
        """The plan of the sample under a mask, and the output of the attached model on its packed rows."""
        sample = self.expected.sample
        mask = sample.masks[name]
        plan = self._plan(tried.layout, mask)
        runner = self.runner(tried)
        with self.expected.arithmetic():
            rows = runner.rows(plan, sample.prompt, sample.embeds)
            if self.is_lm:
                output = plan.unpack(runner.logits(plan, rows, recorded=recorded))
            else:
                with runner.packed_backbone(plan, {"inputs_embeds": rows}, recorded=recorded):
                    output = first_output(sample.run(self.base, mask))
        self._asked, self._has_window = runner.asked, runner.has_window
        return plan, output

    def _plan(self, layout, mask):
        """The rows of the sample under a mask."""
        sample = self.expected.sample
        plan = plan_padded_input(*mask.shape, len(sample.prompt), attention_mask=mask, layout=layout)
        return replace(plan, ids=plan.token_ids(sample.ids))

    def _cache_is_the_same(self, found):
        """Do packed rows leave the cache that the untouched model returned?"""
        expected = self.expected
        if not hasattr(expected.cache, "layers"):  # none, or one for cross-attention too
            return False
        recorded = Recorded()
        try:
            with expected.arithmetic():
                plan, _ = self._packed(found, "right", recorded)
                got = content(PackedCache(plan, recorded, None, self.base.config))
        except Exception:  # attention modules without the index of their layer
            return False
        return same_cache(expected, got, content(expected.cache), expected.sample.real(expected.sample.masks["right"]))

    def _own_loss(self, items):
        """None if the untouched model's loss is ``loss_function`` of its logits, else what is different."""
        expected = self.expected
        loss, labels = expected.losses[items], expected.sample.labels()
        if isinstance(loss, str):
            return loss
        rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        with expected.arithmetic():
            logits = expected.outputs["right"][rows, columns]
            ours = loss_of_logits(self.base, logits, labels[rows, columns + 1], items)
        if expected.difference(ours.reshape(1, 1), loss.reshape(1, 1), None) is None:
            return None
        return f"{type(self.base).__name__} computes a loss of its own"

    def _packs_own_loss(self, found):
        """Is the loss of the model's own forward the same when its backbone runs packed rows?"""
        expected, sample = self.expected, self.expected.sample
        mask, runner = sample.masks["right"], self.runner(found)
        plan = self._plan(found.layout, mask)
        for items, loss in expected.losses.items():
            extra = {} if items is None else {"num_items_in_batch": items}
            if isinstance(loss, str):
                if items is None:
                    return False
                continue
            with expected.arithmetic():
                rows = runner.rows(plan, sample.prompt, sample.embeds)
                with runner.packed_backbone(plan, {"inputs_embeds": rows}):
                    ours = sample.run(self.base, mask, labels=sample.labels(), **extra).loss
            if expected.difference(ours.reshape(1, 1), loss.reshape(1, 1), None) is not None:
                return False
        return True

    def _head_is_plain(self):
        head = self.base.get_output_embeddings()
        return is_plain_linear(head) and self.base.loss_function is ForCausalLMLoss and self.expected.head_is_linear


def _unless_raised(find: Callable[[], Any]) -> Any:
    """What is found; None for an exception: a layer can be anything, and then all of its rows run."""
    try:
        return find()
    except Exception:
        return None


def same_cache(expected: Expectations, got: dict, theirs: dict, mask: torch.Tensor) -> bool:
    """Is the :func:`content` of two caches the same, where ``mask [B, W]`` says that tokens are real?"""
    if not got or got.keys() != theirs.keys():
        return False
    for key, other in theirs.items():
        ours = got[key]
        if ours.shape != other.shape:
            return False
        if key[1] in ("keys", "values", "indexer_keys"):  # at padding nobody reads them
            real = mask[:, -other.shape[2] :]
            ours, other = ours.transpose(1, 2)[real], other.transpose(1, 2)[real]
        if expected.difference(ours.flatten(1), other.flatten(1), None) is not None:
            return False
    return True


def loss_of_logits(
    base: PreTrainedModel,
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The model's own loss of ``[M, V]`` logits against ``[M]`` shifted labels."""
    extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    return base.loss_function(
        logits=logits[None], labels=labels[None], vocab_size=logits.shape[-1], shift_labels=labels[None], **extra
    )


def reason_of(base: PreTrainedModel, error: Exception) -> str:
    """An error on packed rows in words for users."""
    if "PackedMask" in str(error):  # what stands in place of the mask met code that wants a tensor
        return f"{type(base).__name__} computes attention in code of its own"
    if isinstance(error, CannotPack | UnsupportedAttention):
        return str(error)
    return f"{type(base).__name__} raises {type(error).__name__}: {error}"
