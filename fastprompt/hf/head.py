"""What comes behind the layers of a causal LM: the head on labelled rows, the loss, and logits for who reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ..layout import IGNORE, CannotPack, RowPlan
from ..ops import linear_cross_entropy
from .abilities import Abilities, loss_of_logits
from .later import later
from .request import Request
from .runner import Runner, gathered
from .snapshot import Snapshot
from .structure import is_plain_linear

# What logits are computed of when they are read, how, and by which model.
Whole = tuple[Sequence[torch.Tensor], Callable[..., torch.Tensor], Snapshot]

# Labelled rows up to which the loss is left to the model: logits so few are small, and its roundings are its own.
ROWS = 256


@dataclass(frozen=True)
class LanguageHead:
    """The head of an attached causal LM."""

    base: PreTrainedModel
    runner: Runner
    abilities: Abilities

    @property
    def is_cross_entropy(self) -> bool:
        """Is the model's loss the mean cross-entropy of its labels?"""
        return self.base.loss_function is ForCausalLMLoss

    def step(
        self, request: Request, plan: RowPlan, rows: torch.Tensor, whole: Whole | None = None
    ) -> CausalLMOutputWithPast:
        """The output of a training step: the loss, of labelled rows alone, and logits for who reads them.

        Args:
            request, plan, rows: what was asked, its plan, and the rows.
            whole: see :data:`Whole`, if the plan leaves rows out; then the last layer runs on labelled rows alone, too.
        """
        if torch.compiler.is_compiling():  # what is behind the layers runs as it is: hooks would break the graph
            return self._of_states(request, plan, rows, self.runner.states(plan, rows, request.shared), whole)
        if self._chunked_loss(request, plan, rows):
            wanted = None if whole is None else _if_few(each_once(request, plan)[0], rows)
            return self._of_states(request, plan, rows, self.runner.states(plan, rows, request.shared, wanted), whole)
        # The last row of a prompt may predict the first token of every sequence: it goes through the head once.
        keep, places = each_once(request, plan)
        wanted = None if whole is None else _if_few(keep, rows)
        logits, states = self.runner.logits_and_states(plan, rows, request.shared, keep, wanted)
        loss = self.loss_of_logits(request, plan, gathered(logits, places))
        return CausalLMOutputWithPast(loss, self._logits_later(plan, states, logits.shape[-1], logits.dtype, whole))

    @torch.compiler.disable
    def _of_states(self, request, plan, rows, states, whole):
        """The output of a step whose layers have run."""
        hidden, head = states.last_hidden_state[0], self.base.get_output_embeddings()
        if self._chunked_loss(request, plan, rows):
            label_rows, labels = _labelled(plan)
            labels, reduction = labels.to(hidden.device), "none" if request.each_label else "sum"
            loss = linear_cross_entropy(
                gathered(hidden, label_rows), head.weight, head.bias, labels, reduction=reduction
            )
            if not request.each_label:
                items = request.num_items_in_batch
                items = items.to(loss.device) if isinstance(items, torch.Tensor) else items
                loss = loss / (len(labels) if items is None else items)
            vocabulary, dtype = len(head.weight), hidden.dtype
        else:
            keep, places = each_once(request, plan)
            logits = self.runner.head(states, gathered(hidden, keep)).logits[0]
            loss = self.loss_of_logits(request, plan, gathered(logits, places))
            vocabulary, dtype = logits.shape[-1], logits.dtype
        return CausalLMOutputWithPast(loss, self._logits_later(plan, states, vocabulary, dtype, whole))

    def _logits_later(self, plan, states, vocabulary, dtype, whole):
        """The logits ``[B, W, vocabulary]`` of a step, computed when they are read."""
        if whole is not None:
            sources, compute, model = whole
            return logits_later(plan, sources, compute, vocabulary, dtype, states.last_hidden_state.device, model)

        def logits_of(hidden):
            return self.runner.head(states, hidden).logits[0]

        return logits_of_states(self.base, plan, states.last_hidden_state, logits_of, vocabulary, dtype)

    def loss_of_logits(self, request: Request, plan: RowPlan, logits: torch.Tensor) -> torch.Tensor:
        """The loss of the labelled rows' logits ``[M, V]``."""
        if request.loss is not None:
            return request.loss(plan, logits)
        labels = _labelled(plan)[1].to(logits.device)
        if request.each_label:
            return nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        return loss_of_logits(self.base, logits, labels, request.num_items_in_batch)

    def _chunked_loss(self, request, plan, rows):
        head = self.base.get_output_embeddings()
        return (
            request.loss is None
            and len(plan.labels) > ROWS
            and self.abilities.plain_head
            and is_plain_linear(head)  # still
            and self.is_cross_entropy
            and head.weight.dtype == torch.float32  # else the model's own loss decides about casts
            and (rows.dtype == torch.float32 or not rows.is_floating_point())
            and not torch.is_autocast_enabled(rows.device.type)
        )

    def fused(self, request: Request, plan: RowPlan, rows: torch.Tensor, **options: Any) -> ModelOutput:
        """The output of a head that takes shifted labels and gives a number for each of them: TRL's fused head.

        It sees labelled rows only, and its results stand where it would have put them: ``[B, W - 1]``, 0 elsewhere.

        Raises:
            CannotPack: it gives something else.
        """
        labels = request.labels
        if labels is None or not len(_labelled(plan)[1]):
            raise CannotPack("a fused head without labels")
        label_rows, targets = _labelled(plan)
        front = plan.grid.shape[1] - labels.shape[1]
        mask = nn.functional.pad(labels, (front, 0), value=IGNORE)[:, 1:] != IGNORE
        wanted = _if_few(each_once(request, plan)[0], rows) if plan.to_last_label else None
        states = self.runner.states(plan, rows, request.shared, wanted)
        hidden = gathered(states.last_hidden_state[0], label_rows)
        output = self.runner.head(states, hidden, shift_labels=targets[None], **options)
        for name, x in output.items():
            if x.shape == (1, len(hidden)):
                output[name] = x.new_zeros(mask.shape).masked_scatter(mask.to(x.device), x)
            elif x.dim():
                raise CannotPack(f"the head's {name} is not a number for each label")
        return output


def logits_later(
    plan: RowPlan,
    sources: Sequence[torch.Tensor],
    compute: Callable[..., torch.Tensor],
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    model: Snapshot,
) -> torch.Tensor:
    """Logits ``[B, W, vocabulary]`` of a plan, ``compute(*sources)`` when they are read, by ``model`` as it is now and
    under the autocast of now."""
    kind = device.type
    autocast: dict[str, Any] = dict(enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind))

    def compute_as_now(*sources):
        with model.again(), torch.autocast(kind, **autocast):
            return compute(*sources)

    shape = torch.Size((*plan.grid.shape, vocabulary))
    return later(sources, compute_as_now, shape, dtype, device, trains=model.trains)


def logits_of_states(
    base: PreTrainedModel,
    plan: RowPlan,
    states: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Logits ``[B, W, vocabulary]`` that are computed when they are read.

    Args:
        base: whose head they are of.
        plan: of the rows.
        states: ``[1, R, D]``, what they are computed of.
        logits_of: ``[R, D]`` -> ``[R, vocabulary]``.
        vocabulary, dtype: what is known of them before.
    """

    def compute(hidden):
        return plan.unpack(logits_of(hidden[0]))

    head = Snapshot(base, part=base.get_output_embeddings())
    return logits_later(plan, [states], compute, vocabulary, dtype, states.device, head)


def _if_few(wanted: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """The rows that the last layer is to run on; None: all, which costs no more than to choose nearly all of them."""
    return wanted if len(wanted) <= 0.75 * len(rows) else None


def _labelled(plan: RowPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """``label_rows`` and ``labels`` of a batch that has labels."""
    if plan.label_rows is None or plan.labels is None:
        raise ValueError("the plan was made without labels")
    return plan.label_rows, plan.labels


def label_rows_of(request: Request, plan: RowPlan) -> torch.Tensor:
    """The rows whose logits the loss of a request is taken from."""
    if request.loss is None:
        return _labelled(plan)[0]
    rows, places = request.loss.rows(plan)
    return rows[places]


def each_once(request: Request, plan: RowPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """These rows, each once, and which of them each label is predicted by."""
    return plan.predicting_once if request.loss is None else request.loss.rows(plan)
