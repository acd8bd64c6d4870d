"""The engine: decides how a request is run, and runs it through an attached model."""

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ..layout import IGNORE, NODE_COST, CannotPack, PairPlan, RowPlan, plan_packed_input, plan_padded_input
from ..layout.dead_rows import check_pad_rows_to
from .abilities import Abilities, Probe, reason_of
from .attachment import attach, detach, evaluation_mode, is_attached, suspended
from .cache import PackedCache
from .encoder_decoder import PairRunner, planned_pairs
from .expectations import Expectations, first_output
from .head import LanguageHead, label_rows_of
from .interventions import Interventions
from .left_out import needs_labels_alone, whole_logits
from .limits import why_too_long
from .pair_probe import PairExpectations, PairProbe
from .request import Embed, Request
from .runner import Inputs, gathered, unpacked
from .shared_state import SharedState, why_not_learned
from .states import Recorded
from .stats import Stats
from .structure import is_encoder_decoder, is_transformed, survey

_MIXER_COST = 96  # of a node, in rows, where layers with a state run each in a call of its own


class Engine:
    """A model that can run packed rows beside its ordinary forward.

    Building one asks the untouched model what it gives for a few short rows, attaches to it (its attention is switched,
    its gated MLPs keep less, its layers with a state run sequences; its ordinary forward gives what it gave) and
    compares what packed rows give. If that is another output, or anything is raised, the model is left as it was.

    Attributes:
        base: the model: a causal LM, or any other head on a decoder or an encoder.
        abilities: what the engine may do with it.
        stats: how the calls were run.
        node_cost: what a node of a tree of shared text has to save, in rows; None: only what all rows begin with is
            shared.
        pad_rows_to: of what the number of rows of every batch is to be a multiple; None: of nothing.
        refusal: None if the packed rows give the model's own output, else the reason why not.
    """

    def __init__(self, base: PreTrainedModel, pad_rows_to: int | None = None) -> None:
        self.pad_rows_to = check_pad_rows_to(pad_rows_to)
        if pad_rows_to is not None and is_encoder_decoder(base):
            raise ValueError(f"pad_rows_to must be None for an encoder-decoder, got {pad_rows_to}")
        self.base, self._user, self._released = base, object(), False
        self.interventions = Interventions(base)
        self.logits_are_read = False
        self.stats = Stats()
        self._ask()
        self.node_cost: int | None = _MIXER_COST if self.runner.mixers else NODE_COST

    def _ask(self):
        self._prefixes: dict[Hashable, str | None] = {}
        self.abilities = Abilities("it was not asked yet")
        try:
            with self.interventions.being_asked():
                self.abilities = self._probe()
        finally:
            self.refusal = self.abilities.refusal
            if self.refusal is not None:
                detach(self.base, self._user)

    @torch.compiler.disable
    def ask_again(self) -> None:
        """Ask the model once more if others gave it hooks or forwards by now: TRL, or who steers it."""
        if not self._released and self.interventions.are_others():
            self._ask()

    def own_forward_has_the_loss(self, labels: torch.Tensor | None, num_items: torch.Tensor | int | None) -> bool:
        """Must the loss be left to the model's own forward?"""
        if labels is None or not self.is_lm:
            return False
        replaced = "forward" in vars(self.base) and not hasattr(self.base, "_hf_hook")  # Accelerate's moves tensors
        return replaced or self.abilities.why_not_loss_of_logits(num_items) is not None

    def _probe(self):
        probe: Any = (PairProbe if is_encoder_decoder(self.base) else Probe)(self.base)
        self.runner = probe.runner(Abilities(is_lm=probe.is_lm))
        try:
            with suspended(self.base) if is_attached(self.base) else nullcontext():
                refusal = probe.expect()
            if refusal is not None:
                return Abilities(refusal, probe.is_lm)
            attach(self.base, self._user, packs=True)
            found = probe.abilities()
        except Exception as error:  # a model can fail in any way on rows it was not written for; the reason is kept
            return Abilities(reason_of(self.base, error), probe.is_lm)
        self.runner = probe.runner(found)
        return found

    @property
    def is_lm(self) -> bool:
        return self.abilities.is_lm

    @property
    def numbers_columns(self) -> bool:
        """Is a token's position the number of its column, and can the model be told it?"""
        found = self.abilities
        plain = found.refusal is None and not found.compact_positions and found.position_offset == 0
        return plain and "position_ids" in inspect.signature(self.base.forward).parameters

    def detach(self) -> None:
        """Give the model its own attention and MLPs back; nothing is packed any more."""
        self.refusal, self._released = self.refusal or "the model was released", True
        detach(self.base, self._user)

    @torch.compiler.disable
    def plan(self, request: Request) -> Any:
        """The rows of a request, a RowPlan, or the PairPlan of an encoder-decoder.

        Raises:
            CannotPack: the reason why it has to take the padded path.
            ValueError, TypeError: wrong arguments.
        """
        plan = self._planned(request)
        self.stats.count_packed(*plan.counts)
        return plan

    def uncount(self, plan: RowPlan | PairPlan) -> None:
        """A planned call was not run on packed rows after all."""
        rows, padded = plan.counts
        self.stats.count_packed(-rows, -padded, calls=-1)

    def _planned(self, request):
        if self.refusal is not None:
            raise CannotPack(self.refusal)
        now = survey(self.base if self.is_lm else self.runner.backbone)
        self.runner.compiled = now.compiled
        reason = self._why_not(request, now.otherwise)
        if reason is not None:
            raise CannotPack(reason)
        if request.target is not None:
            return planned_pairs(request, request.target)
        plan = self.laid_out(request, needs_labels_alone(self, request, now.draws))
        reason = why_too_long(self.abilities, request, plan)
        if reason is None and request.cu_seqlens is None:
            reason = self._why_not_planned(request, plan)
        if reason is not None:
            raise CannotPack(reason)
        return plan

    def laid_out(self, request: Request, to_last_label: bool) -> RowPlan:
        """The rows of a request that can be packed."""
        plan = self._laid_out(request, to_last_label)
        return plan if self.runner.searching is None else replace(plan, ids=plan.token_ids(request.tokens))

    def _laid_out(self, request, to_last_label):
        like_tokens = {"labels": request.labels, "virtual_tokens": request.virtual_tokens}
        like_tokens["token_ids"] = request.tokens if self._may_share(request) else None
        options: dict[str, Any] = dict(
            prompt_ids=request.prompt_ids,
            only_used_prompts=True,
            prefix_length=request.prefix_length,
            layout=self.abilities.layout,
            to_last_label=to_last_label,
            pad_rows_to=self.pad_rows_to,
            node_cost=self.node_cost,
            device=request.tokens.device,
        )
        if request.cu_seqlens is not None:
            flat: dict[str, Any] = {name: None if x is None else x.reshape(-1) for name, x in like_tokens.items()}
            plan = plan_packed_input(request.cu_seqlens, request.num_virtual_tokens, **flat, **options)
            return self._flattened(request, plan) if request.flat else plan
        batch, width = request.tokens.shape[:2]
        return plan_padded_input(
            batch,
            width,
            request.num_virtual_tokens,
            attention_mask=request.attention_mask,
            share_padded=not self.abilities.has_window,
            **like_tokens,
            **options,
        )

    def _flattened(self, request, plan):
        """The plan with its results side by side, as the tokens came."""
        front = request.num_virtual_tokens
        cells = plan.grid[:, front:]
        lengths = torch.as_tensor(request.cu_seqlens, device=cells.device).diff()
        text = cells[torch.arange(cells.shape[1], device=cells.device) < lengths[:, None]][None]
        if request.own_forward and request.labels is not None:
            starts = torch.as_tensor(request.cu_seqlens, device=text.device)[:-1].long()
            labels = request.labels.reshape(-1)
            if bool((labels[starts[starts < len(labels)]] != IGNORE).any()):
                raise CannotPack(
                    "the first token of a packed sample has a label, and the model's own forward shifts them"
                )
        return replace(plan, grid=torch.cat([plan.grid[:1, :front], text], 1))

    def run(self, request: Request, plan: Any, embed: Embed) -> Any:
        """A causal LM's output: ``loss`` if the plan has labels, ``logits [B, W, V]``, and the cache if it is wanted.

        Or that of an encoder-decoder; see :meth:`PairRunner.run`.

        Args:
            request, plan: what was asked, and its plan.
            embed: token ids or embeddings -> embeddings.
        """
        with self.interventions.watched():
            return self._run(request, plan, embed)

    def _run(self, request, plan, embed):
        if request.target is not None:
            found, with_cache = self.abilities, self._wants_cache(request)
            return self.runner.run(request, request.target, plan, embed, found, with_cache)
        if request.prompts is not None:
            prompts = request.prompts()
            request = replace(request, prompts=lambda: prompts)
        rows = self.rows(request, plan, embed)
        if not request.wants_logits:
            whole = whole_logits(self, request, embed) if plan.to_last_label else None
            return self.head.step(request, plan, rows, whole)
        recorded = Recorded() if self._wants_cache(request) else None
        logits = self.runner.logits(plan, rows, request.shared, recorded=recorded)
        loss = None
        if request.labels is not None:
            loss = self.head.loss_of_logits(request, plan, gathered(logits, label_rows_of(request, plan)))
        output = CausalLMOutputWithPast(loss=loss, logits=unpacked(plan, logits))
        if recorded is not None:
            output[self.abilities.cache_name] = self._cache(request, plan, recorded)
        return output

    def run_fused_head(self, request: Request, plan: RowPlan, embed: Embed, **options: Any) -> ModelOutput:
        """See :meth:`LanguageHead.fused`."""
        with self.interventions.watched():
            return self.head.fused(request, plan, self.rows(request, plan, embed), **options)

    @property
    def head(self) -> LanguageHead:
        """Of a causal LM, as it stands."""
        return LanguageHead(self.base, self.runner, self.abilities)

    @contextmanager
    def packed_backbone(self, request: Request, plan: RowPlan, inputs: Inputs) -> Iterator[None]:
        """While the block runs, the model's own forward runs its backbone on the plan's rows; see Runner."""
        recorded = Recorded() if self._wants_cache(request) else None

        def finish(output):
            if recorded is not None:
                setattr(output, self.abilities.cache_name, self._cache(request, plan, recorded))

        with self.interventions.watched(), self.runner.packed_backbone(plan, inputs, request.shared, finish, recorded):
            yield

    @torch.no_grad()
    def why_not_prefix(
        self, shared: Callable[[], SharedState], key: Hashable, forward: Callable[..., Any]
    ) -> str | None:
        """None if learned keys and values give the same packed as in ``forward``, the padded way, else what differs.

        Args:
            shared: a function that gives the SharedState.
            key: by which the answer is remembered.
            forward: takes ``input_ids`` and ``attention_mask``, and ``decoder_input_ids`` if there is a decoder, and
                returns the model's output behind the prefix.
        """
        reason = self.refusal or why_not_learned(self.base.config)
        if reason is not None:
            return reason
        if key not in self._prefixes:
            self._prefixes[key] = self._probe_prefix(shared, forward)
        return self._prefixes[key]

    def _probe_prefix(self, shared, forward):
        padding = getattr(self.base.config, "pad_token_id", None)
        with torch.compiler.set_stance("force_eager"), evaluation_mode(self.base):
            try:
                kind = PairExpectations if isinstance(self.runner, PairRunner) else Expectations
                with suspended(self.base):
                    expected: Any = kind.behind_prefix(self.base, forward, padding)
                if isinstance(expected, PairExpectations):
                    return expected.why_not_behind(self.runner, self.abilities, shared)
                mask, ids = expected.sample.masks["right"], expected.ids
                plan = plan_padded_input(
                    *mask.shape, 0, attention_mask=mask, prefix_length=shared().length, layout=self.abilities.layout
                )
                with expected.arithmetic():
                    if self.is_lm:
                        packed = plan.unpack(self.runner.logits(plan, plan.token_ids(ids), shared()))
                    else:
                        with self.runner.packed_backbone(plan, {"input_ids": plan.token_ids(ids)}, shared()):
                            packed = first_output(self.base(input_ids=ids, attention_mask=mask, return_dict=True))
                return expected.difference(packed, expected.outputs["right"], mask.bool())
            except Exception as error:  # as in _probe
                return reason_of(self.base, error)

    def _why_not(self, request, drawn_otherwise):
        """The reason why this call has to take the padded path, or None; see ``Survey`` for the second argument."""
        found, mask = self.abilities, request.attention_mask
        if is_transformed():
            return "a transform of torch.func is at work"
        if drawn_otherwise is not None:
            return f"{drawn_otherwise} is at work in the base model; call .eval() on it"
        if mask is not None:
            if mask.dim() != 2:
                return f"the attention mask has {mask.dim()} dimensions"
            if mask.shape != request.tokens.shape[:2]:
                return f"the attention mask has shape {list(mask.shape)}, the tokens {list(request.tokens.shape[:2])}"
            if not found.left_padding and bool((mask[:, :1] == 0).any()):
                return "the model does not see left-padded rows as packed rows would"
            reads_padding = not (found.right_padding or request.finds_last or request.finds_last_by_id)
            if reads_padding and bool((mask[:, -1:] == 0).any()):
                return "the model reads what stands in the last column, which is padding here; pad on the left"
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if getattr(self.base.config, name, False):
                return f"config.{name} is set"
        if not request.has_ids and request.target is None and self.runner.searching is not None:
            return "the model looks embeddings up by token id in every layer, and is given none; pass input_ids"
        if request.shared is not None and found.position_offset:  # RoBERTa
            if not request.has_ids:
                return "without token ids, the model does not count the prefix in its positions"
            if mask is not None and bool((mask[:, :1] == 0).any()):
                return "the model counts positions by token ids, and padding on the left is not counted"
        if request.shared is not None and request.has_ids and found.needs_ids and not self.looks_up_ids():
            return "the model looks more up by token id than embeddings, and a hook changes these"
        if request.labels is not None and request.loss is None:
            own = found.why_not_loss_of_logits(request.num_items_in_batch)
            if own is not None and not (request.own_forward and found.packs_own_loss):
                return own
        if request.each_label and not self.head.is_cross_entropy:
            return f"{type(self.base).__name__} computes a loss of its own"
        if found.returns_cache and not found.makes_cache and self._wants_cache(request):
            return "its cache holds other values than packed rows leave; pass use_cache=False"
        return None

    def _why_not_planned(self, request, plan):
        """As :meth:`_why_not`, for what only the plan shows."""
        found, padding = self.abilities, plan.grid < 0
        if request.shared is not None and request.has_ids and found.position_offset:
            if bool((~padding & (request.tokens == self._padding_id)).any()):
                return "the model counts positions by token ids, and a real token has that of padding"
        if not request.own_forward:
            return None
        if request.reads_all_columns and bool(padding.any()):
            return "an answer's probabilities are over all columns, padding among them"
        labels = request.head_labels
        if labels is not None and labels.shape == padding.shape:
            if bool((labels[padding.to(labels.device)] != IGNORE).any()):
                return f"padding has labels other than {IGNORE}; mask them with it"
        by_id = request.shared is not None and request.has_ids and not found.right_padding
        if by_id and not request.finds_last and not self._finds_last_by_id(request.tokens, ~padding):
            return "by its token ids, the model reads what the attention mask says is padding"
        return None

    def _finds_last_by_id(self, ids, real):
        """Is the last token of each row that is not padding by its id one of the rows ``real [B, S]``?"""
        column, padding = torch.arange(ids.shape[1], device=ids.device), self._padding_id
        last = column[-1:] if padding is None else ((ids != padding) * column).argmax(1)
        return bool(real.gather(1, last.expand(len(ids))[:, None]).all())

    @property
    def _padding_id(self):
        return getattr(self.base.config, "pad_token_id", None)

    def _may_share(self, request):
        """Is a token the same row wherever it stands at the beginning of a sequence?"""
        everywhere = request.shared is None or request.shared.everywhere
        return request.has_ids and everywhere and not request.rows_differ and self.looks_up_ids()

    def looks_up_ids(self) -> bool:
        """Are two tokens of the same id the same row? Not if a hook of the embedding module may change one of them."""
        hooks = self.base.get_input_embeddings()._forward_hooks.values()
        return all(getattr(hook, "__name__", "").startswith("make_inputs_require_grad") for hook in hooks)

    def _wants_cache(self, request):
        """Would the model's own forward return a cache?"""
        if not self.abilities.returns_cache or not request.wants_logits:
            return False
        if request.target is not None and request.shared is not None:  # one that is given is given back
            return True
        if request.target is not None and request.labels is not None and not self.abilities.cache_with_labels:
            return False
        backbone = self.runner.backbone
        if backbone.training and getattr(backbone, "gradient_checkpointing", False):
            return False
        asked = request.use_cache
        return bool(getattr(backbone.config, "use_cache", False) if asked is None else asked)

    def _cache(self, request, plan, recorded):
        return PackedCache(plan, recorded, request.shared, self.base.config)

    def rows(self, request: Request, plan: RowPlan, embed: Embed) -> torch.Tensor:
        """What the model is given: ``[R, D]`` embeddings, or ``[R]`` token ids where it may look them up itself."""
        if request.prompts is None and request.has_ids and self.looks_up_ids():
            return plan.token_ids(request.tokens)
        prompt = None if request.prompts is None else request.prompts()
        return self.runner.rows(plan, prompt, embed(request.tokens))
