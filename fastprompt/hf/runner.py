"""How a planned batch travels through a model: its rows in, its hidden states, logits or loss out."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from ..layout import RowPlan, Sequences
from ..ops import prompt_concat
from ..ops.prefix_attention.scheduled import Shape
from .attachment import attach_again, is_attached
from .attention import handed_out
from .cache import RecordingCache
from .cache_names import CACHE_NAMES, cache_argument
from .checkpointing import checkpoints_reentrantly, others_checkpoint, recomputing, through_reentrant_checkpoints
from .first_layer import FirstLayer
from .last_layer import LastLayer
from .masks import AsBefore, PackedRows, UnsupportedAttention, active, running
from .own_attention import is_patched, own_attention
from .per_layer import per_layer_inputs, searching_part
from .recurrent import mixers
from .shared_state import SharedState
from .states import Recorded
from .structure import position_embeddings, survey, tell_positions

# What the backbone is given, [R, ...] each, or a function that makes it from what it is called with.
Inputs = dict[str, torch.Tensor] | Callable[[dict[str, Any]], dict[str, torch.Tensor]]


@dataclass
class Runner:
    """Runs the rows of a plan through an attached model.

    Attributes:
        base: the model.
        mixers: its layers with a state.
        searching: the part that looks up by token id what embeddings do not tell; or None.
        backbone: the part of it that runs packed rows; what comes behind it sees padded hidden states.
        is_lm: is it a causal LM, whose whole forward runs packed rows?
        layout: "shared" for a causal model, whose prompt no text changes, else "packed".
        position_offset: the first position, as the model's embedding of positions counts them.
        compact_positions: does the model number tokens alone, so that left padding leaves no gap?
        first_layer: the first layer, if no rows have met before its attention.
        last_layer: the last layer, if it can run on chosen rows.
        asked: has it asked for a mask so far?
        has_window: has it asked for that of a sliding window?
        shapes: of its calls of attention so far, which schedules for compiled layers depend on.
        compiled: the parts of the model that torch.compile runs; the engine looks for them in every call.
    """

    base: nn.Module
    backbone: nn.Module
    is_lm: bool
    layout: str = "shared"
    position_offset: int = 0
    compact_positions: bool = False
    first_layer: FirstLayer | None = None
    last_layer: LastLayer | None = None
    asked: bool = False
    has_window: bool = False
    shapes: set[Shape] = field(default_factory=set)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.backbone.forward).parameters
        self._takes_use_cache = "use_cache" in parameters or "kwargs" in parameters
        self._takes_positions = "position_ids" in parameters
        self._position_embeddings = position_embeddings(self.backbone)
        self._own_attention = own_attention(self.backbone)
        self.mixers = mixers(self.backbone)
        self.searching = searching_part(self.base)
        self.compiled = survey(self.backbone).compiled

    def rows(self, plan: RowPlan, prompt: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor:
        """``[R, D]`` input rows of a plan.

        Args:
            plan: a RowPlan.
            prompt: ``[N * P, D]``, or None if the plan has no virtual tokens.
            embeds: ``[B, S, D]`` or ``[T, D]`` embedded tokens of the batch the plan was made of.
        """
        flat = embeds.reshape(-1, embeds.shape[-1])
        return prompt_concat(plan.source, flat, flat[:0] if prompt is None else prompt.to(embeds.dtype))

    def states(
        self,
        plan: RowPlan,
        rows: torch.Tensor,
        shared: SharedState | None = None,
        wanted: torch.Tensor | None = None,
        sources: Sequences | None = None,
        **options: Any,
    ) -> Any:
        """``[R, D]`` rows, or ``[R]`` token ids -> the backbone's output, ``last_hidden_state [1, R, D]``.

        Args:
            plan, rows, shared: see :meth:`rows` and :class:`PackedRows`.
            wanted: ``[M]``, the rows whose states will be read, each once; what the others hold is not said. None: all.
            sources: the sequences of the encoder's rows that a decoder's sequences attend to; None: there are none.
            options: what the backbone's forward takes besides.
        """
        return self._call(self.backbone, plan, rows, shared, wanted=wanted, sources=sources, **options)

    def logits(
        self,
        plan: RowPlan,
        rows: torch.Tensor,
        shared: SharedState | None = None,
        recorded: Recorded | None = None,
    ) -> torch.Tensor:
        """Logits ``[R, V]`` of all rows of a causal LM; ``recorded`` is given what a cache holds, or None."""
        return self._call(self.base, plan, rows, shared, recorded).logits[0]

    def logits_and_states(
        self,
        plan: RowPlan,
        rows: torch.Tensor,
        shared: SharedState | None,
        keep: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ModelOutput]:
        """Logits ``[M, V]`` of the rows ``keep``, and the backbone's output as :meth:`states` gives it."""
        seen = []

        def choose(module, args, output):
            seen.append(copy.copy(output))
            output.last_hidden_state = gathered(output.last_hidden_state[0], keep)[None]
            return output

        hook = self.backbone.register_forward_hook(choose)
        try:
            logits = self._call(self.base, plan, rows, shared, wanted=wanted).logits[0]
        finally:
            hook.remove()
        return logits, seen[0]

    def head(self, states: ModelOutput, hidden: torch.Tensor, **options: Any) -> ModelOutput:
        """The model's output for hidden states ``[M, D]``, by its own forward without its backbone.

        ``states`` is the output of the backbone that they come from. What hooks of it do was done to them then.
        ``options`` are what its forward takes besides.
        """
        states = copy.copy(states)
        states.last_hidden_state = hidden[None]
        with self.replaced(lambda *args, **kwargs: states), running(AsBefore()):  # nothing of this call is to be packed
            options.update(per_layer_inputs(self.searching, torch.zeros_like(hidden[None, :, 0], dtype=torch.int64)))
            return self.base(inputs_embeds=hidden[None], return_dict=True, **options)

    @contextmanager
    def replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """While the block runs, calls of the backbone are calls of ``forward``, without its hooks."""
        changed = ("forward", "_forward_hooks", "_forward_pre_hooks")
        module = self.backbone.__dict__
        before = {name: module[name] for name in changed if name in module}
        try:
            module.update(forward=forward, _forward_hooks={}, _forward_pre_hooks={})
            yield
        finally:
            for name in changed:
                module.pop(name, None)
            module.update(before)

    @contextmanager
    def packed_backbone(
        self,
        plan: RowPlan,
        inputs: Inputs,
        shared: SharedState | None = None,
        finish: Callable[[ModelOutput], None] | None = None,
        recorded: Recorded | None = None,
    ) -> Iterator[None]:
        """While the block runs, a call of the backbone runs the plan's rows, and gives back padded ``[B, W, D]``
        states.

        So a model's own forward, with whatever comes behind its backbone, can run on packed rows.

        Args:
            plan: a RowPlan.
            inputs: ``{argument: rows}``, ``[R, D]`` ``inputs_embeds`` or ``[R]`` ``input_ids`` and others; or a
                function that makes it from the arguments the backbone is called with.
            shared: the learned keys and values in front of the sequences, or None.
            finish: called with the backbone's output at the end.
            recorded: see :meth:`logits`.
        """
        signature = inspect.signature(self.backbone.forward)
        blocks = []

        def enter(module, args, kwargs):
            given = dict(signature.bind(*args, **kwargs).arguments)
            given.update(given.pop("kwargs", {}))
            rows = inputs(given) if callable(inputs) else inputs
            for name in ("input_ids", "inputs_embeds", "attention_mask", *CACHE_NAMES):
                given.pop(name, None)
            block = ExitStack()
            blocks.append(block)
            given.update(block.enter_context(self._running(module, plan, rows, shared, recorded)))
            return (), given

        def leave(module, args, kwargs, output):
            if output is not None:
                self._check_mixers(active())
            if blocks:
                blocks.pop().close()
            if output is None:
                return None
            output = _unpacked(plan, module, output)
            if finish is not None:
                finish(output)
            return output

        hooks = []
        try:
            hooks.append(self.backbone.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(self.backbone.register_forward_hook(leave, with_kwargs=True, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            while blocks:  # torch calls no hook after a KeyboardInterrupt
                blocks.pop().close()

    @contextmanager
    def padded_backbone(self, plan: RowPlan) -> Iterator[None]:
        """While the block runs, a call of the backbone on ``[B, W]`` rows gives the states that the grid picks."""
        hook = self.backbone.register_forward_hook(lambda module, args, output: _unpacked(plan, module, output))
        try:
            yield
        finally:
            hook.remove()

    def _call(self, model, plan, rows, shared, recorded=None, wanted=None, sources=None, **extra):
        name = "inputs_embeds" if rows.is_floating_point() else "input_ids"
        first, last = self.first_layer, self.last_layer
        narrow = wanted is not None and len(wanted) > 0 and last is not None and last.is_plain(self.backbone)
        with (
            self._running(model, plan, {name: rows}, shared, recorded, sources) as inputs,
            last.on_rows(wanted) if narrow else nullcontext(),
            nullcontext() if first is None else first.led_back_to_prompts(self.backbone, plan, rows),
        ):
            output = model(**{**inputs, **extra})
            self._check_mixers(active())
            return output

    def _check_mixers(self, batch):
        """A layer with a state that runs in another way than it was taught would take all rows for one sequence."""
        replaced = [module for module in self.mixers if module not in batch.ran]
        if replaced:
            raise UnsupportedAttention(f"{type(replaced[0]).__name__} was given another forward")

    @contextmanager
    def _running(self, model, plan, rows, shared, recorded, sources=None):
        """The block that ``model``, all or its backbone, has to run in, and the keyword arguments for
        ``{argument: [R, ...]}``."""
        if not is_attached(self.base):  # set_attn_implementation was called meanwhile
            attach_again(self.base)
        for module in self._own_attention:
            if not is_patched(module):
                raise UnsupportedAttention(f"{type(module).__name__} was given another method")
        with ExitStack() as block:
            compiled = self._dtype_if_compiled(next(iter(rows.values())))
            if shared is not None and any(x.requires_grad for x in shared.tensors()):
                bridge = None
                if checkpoints_reentrantly(self.base):
                    shared, bridge = through_reentrant_checkpoints(shared)
                elif compiled is not None and not torch.compiler.is_compiling():
                    bridge = _with_gradient
                if bridge is not None:
                    rows = self._through(bridge, rows, block)
            inputs = {name: _batch_of_one(x) for name, x in rows.items()}
            if plan.ids is not None and "inputs_embeds" in rows:
                inputs.update(per_layer_inputs(self.searching, plan.ids[None]))
            if self._takes_positions:
                inputs["position_ids"] = self._positions(plan)[None]
            for module in self._position_embeddings:
                block.callback(tell_positions(module, self._positions(plan)).remove)
            inputs["return_dict"] = True
            if self._takes_use_cache:
                inputs["use_cache"] = recorded is not None
                if recorded is not None:
                    cache = RecordingCache(recorded, self.base.config)
                    inputs.update(cache_argument(model.forward, cache))
            given = shared, recorded, sources, self.shapes, compiled
            packed = PackedRows(plan, self.layout == "shared", *given)
            batch = block.enter_context(running(packed))
            if compiled is not None:
                block.enter_context(handed_out(self.backbone, packed.shared))
            batch.run_again_by_others = others_checkpoint(self.base)
            block.enter_context(recomputing(self.base, batch))
            yield inputs
            self.asked = self.asked or batch.asked
            self.has_window = self.has_window or batch.has_window

    def _through(self, bridge, rows, block):
        """The rows, whose embeddings pass a function before the first layer while a block runs."""
        if "inputs_embeds" in rows:
            return {**rows, "inputs_embeds": bridge(rows["inputs_embeds"])}
        table = getattr(self.backbone, "get_input_embeddings", self.base.get_input_embeddings)()
        block.callback(table.register_forward_hook(lambda module, args, output: bridge(output)).remove)
        return rows

    def _dtype_if_compiled(self, rows):
        """The dtype in which attention of compiled layers runs on rows; None if there are no such layers."""
        if not torch.compiler.is_compiling():
            if not self.compiled or set(self.compiled).isdisjoint(self.backbone.modules()):
                return None
        device = rows.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return rows.dtype if rows.is_floating_point() else self.base.dtype

    def _positions(self, plan):
        positions, padding = plan.position_ids, plan.padding()
        if self.compact_positions and padding is not None:
            seq = plan.sequences
            real = int(seq.host.lengths.sum())
            padding = torch.repeat_interleave(padding, seq.lengths, output_size=real)
            positions = positions - nn.functional.pad(padding, (0, len(positions) - real))  # behind them dead rows
        return positions + self.position_offset


def gathered(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[index]``, with a gradient that adds up what repeats in a fixed order, on every device."""
    return prompt_concat(index.to(rows.device), rows, rows[:0])


def unpacked(plan: RowPlan, rows: torch.Tensor) -> torch.Tensor:
    """``plan.unpack`` of ``[R, D]``, with a gradient that adds up what several cells show as :func:`gathered` does."""
    cells = prompt_concat(plan.grid.flatten().to(rows.device), rows, rows.new_zeros(1, rows.shape[1]))
    return cells.unflatten(0, plan.grid.shape)


def _unpacked(plan, backbone, output):
    """A backbone's output with padded in place of packed states, and what it pools from them pooled again."""
    output.last_hidden_state = unpacked(plan, output.last_hidden_state.flatten(0, 1))
    return pooled_again(backbone, output)


def pooled_again(backbone: Any, output: Any) -> Any:
    """A backbone's output with what it pools from its hidden states, if anything, made of those it has now."""
    if output.get("pooler_output") is not None:
        output.pooler_output = backbone.pooler(output.last_hidden_state)
    return output


def _with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """Rows that require a gradient, as those behind the first layer do: without, it would have graphs of its own."""
    return rows if rows.requires_grad or not torch.is_grad_enabled() else rows.detach().requires_grad_()


def _batch_of_one(rows: torch.Tensor) -> torch.Tensor:
    """``[R, ...]`` -> ``[1, R, ...]``, no copy, and no view for autograd.

    A compiled layer tells views from other tensors, so the first layer would have a graph of its own.
    """
    return torch.ops.aten._unsafe_view(rows, (1, *rows.shape))
