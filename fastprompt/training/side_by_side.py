"""Many runs at once, side by side in the same batches; each is what it would be alone."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastprompt import accelerate

from ..layout import CannotPack
from ..peft.stack import AdapterStack, Values, values_of
from . import adapters
from .config import TrainingConfig
from .encoding import collate
from .errors import InputError
from .evaluation import evaluate
from .files import RUN_FILE, checkpoints, delete_checkpoint, staged, write_json
from .identity import fingerprint
from .member import Member, Progress
from .output import versions
from .run_data import world_size
from .stacked_adamw import StackedAdamW, gradient_norms
from .trainer import LOG_FILE, deterministic

# Packed rows up to which several prompts meet in a batch: enough for matrix products to be as fast as they get.
ROWS_PER_STEP = {"cpu": 1024}
ROWS_ELSEWHERE = 4096
CARD = "README.md"  # beside an adapter
METHODS = ("prompt-tuning", "prefix-tuning", "p-tuning")


def check_side_by_side(config: TrainingConfig) -> None:
    """Raise an `InputError` if runs like this one cannot train side by side."""
    if config.method not in METHODS:
        raise InputError("method", f"expected one of {', '.join(METHODS)} side by side, got {config.method!r}")
    if config.precision == "fp16":
        raise InputError("precision", "fp16 scales the loss of all prompts at once; expected fp32 or bf16")
    if world_size() > 1:
        raise InputError("method", f"prompts train side by side in one process, got {world_size()}")


class SideBySide:
    """Runs that differ in their rows, their seeds and their learning rates, and share model, method and sizes.

    They take their steps in rounds. In round k each run takes its own step k, on the rows that it would take alone; a
    few meet in one packed batch. The update, its clipping, the schedule, the evaluations and the end are each run's
    own: a run that has ended leaves the batches. A run whose loss or gradient is not finite ends as "diverged".

    Args:
        config: what the runs have in common.
        members: the runs, their rows encoded.
        tokenizer: the model's.
        folder: where checkpoints are kept.
        halve_at: rounds after which the half of the runs with the higher held-out loss is dropped.

    Attributes:
        model: the PEFT model; its own adapter is where a run is put to be evaluated or saved.
        stack: the prompts of all runs.
        base: the fingerprint of the frozen model.

    Raises:
        InputError: the model cannot run packed rows, a row is too long for it, or runs like these cannot be mixed.
    """

    def __init__(
        self,
        config: TrainingConfig,
        members: Sequence[Member],
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        halve_at: Sequence[int] = (),
    ) -> None:
        check_side_by_side(config)
        self.config, self.members, self.tokenizer, self.folder = config, list(members), tokenizer, folder
        self.halve_at = frozenset(halve_at)
        base = adapters.load_base(config.model, config.gguf_file, config.precision)
        for data in {id(member.data): member.data for member in members}.values():
            data.check_context(base)
        self.base = fingerprint(base)
        starts: dict[int, Values] = {}
        for member in self.members:
            if member.config.seed not in starts:
                self.model = adapters.new_adapter(base, member.config, tokenizer)
                starts[member.config.seed] = values_of(self.model)
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        accelerate(self.model)
        try:
            self.stack = AdapterStack(self.model, [starts[member.config.seed] for member in self.members])
        except CannotPack as reason:
            raise _cannot_pack(config, reason) from None
        self.optimizer = StackedAdamW(
            self.stack.values, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm
        )
        self.best: Values = {}
        if config.keeps_best:
            self.best = {name: x.clone() for name, x in self.stack.values.items()}
        self.round = 0
        self._card: bytes | None = None  # the same for all

    @property
    def active(self) -> list[int]:
        """The runs that still train."""
        return [i for i, member in enumerate(self.members) if member.progress.left is None]

    def train(self, record: dict[str, Any]) -> None:
        """Write ``run.json``, go on from the newest checkpoint, if there is one, and train until every run has ended.

        ``record`` is what stands in ``run.json`` beside what is known here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known = {"verbaliser": None, "tasks": None, "base": self.base, "versions": versions()}
        write_json(self.folder / RUN_FILE, {**record, **known})
        found = checkpoints(self.folder)
        total = sum(member.data.steps for member in self.members)
        with ExitStack() as block:
            block.enter_context(deterministic())
            if found:
                self._load(found[-1])
            done = sum(member.step for member in self.members)
            bar = block.enter_context(tqdm(total=total, initial=done, desc="training", unit="step"))
            self.model.train()
            while self.active:
                self._take_round(bar)
                if self.round % self.config.save_steps == 0 or not self.active:
                    self._save()

    def put(self, index: int) -> None:
        """Make a run's prompt the model's own adapter: the best or the last, as its configuration says."""
        best = bool(self.best) and self.members[index].progress.best_step is not None
        self.stack.load(self.best if best else self.stack.values, index)

    def save_adapter(self, index: int, folder: Path, record: dict[str, Any]) -> None:
        """Write a run's adapter (PEFT's format), ``run.json`` and ``log.json`` into ``folder``.

        ``record`` is what stands in ``run.json`` beside what is known here.
        """
        member = self.members[index]
        folder.mkdir(parents=True, exist_ok=True)
        task = member.data.task
        own = {"config": member.config.to_dict(), "verbaliser": task.verbaliser, "tasks": task.tasks}
        write_json(folder / RUN_FILE, {**record, **own, "base": self.base, "versions": versions()})
        self.put(index)
        with staged(folder) as staging:
            if self._card is not None:  # PEFT takes longer for a card than a small prompt for its training
                self.model.__dict__["create_or_update_model_card"] = self._write_card
            self.model.save_pretrained(str(staging), save_embedding_layers=False)
            self._card = (staging / CARD).read_bytes()
        write_json(folder / LOG_FILE, {"finished": True, "history": member.history})

    def _write_card(self, folder):
        Path(folder, CARD).write_bytes(self._card)

    def groups(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Runs that meet in a batch of this round: so many as the configuration says, or as have enough rows."""
        limit = ROWS_PER_STEP.get(self.model.device.type, ROWS_ELSEWHERE)
        group: list[int] = []
        rows = 0
        for i in indices:
            more = self.members[i].packed_rows(self.round)
            full = rows + more > limit
            if self.config.prompts_per_step is not None:
                full = len(group) == self.config.prompts_per_step
            if group and full:
                yield group
                group, rows = [], 0
            group.append(i)
            rows += more
        if group:
            yield group

    def _take_round(self, bar):
        """Every run's next step, its evaluation if one is due, and who ends."""
        started = self.active
        for group in list(self.groups(started)):
            self._step(group)
            bar.update(len(group))
        self.round += 1
        for i in self.active:
            member = self.members[i]
            if member.evaluates_at(self.round) or self.round in self.halve_at:
                self._evaluate(i)
            if member.progress.left is None and self.round == member.data.steps:
                self._end(i, "finished")
        if self.round in self.halve_at:
            self._halve()
        losses = [self.members[i].progress.losses[-1] for i in started if self.members[i].step == self.round]
        bar.set_postfix(prompts=len(self.active), loss=sum(losses) / max(1, len(losses)))

    def _step(self, group):
        """One step of each run of a group, in one packed batch."""
        rows = [self.members[i].rows(self.round) for i in group]
        owners = torch.arange(len(group)).repeat_interleave(torch.tensor([len(own) for own in rows]))
        leaves = self.stack.leaves(torch.tensor(group, device=self.model.device))
        try:
            losses = self.stack.losses(leaves, collate([row for own in rows for row in own]), owners)
        except CannotPack as reason:
            raise _cannot_pack(self.config, reason) from None
        gradients = dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values()))))
        norms = gradient_norms(gradients)
        numbers = torch.stack([losses.detach(), norms]).cpu()
        if not numbers.isfinite().all():
            # What is not a number may have spread inside of the batch: each run alone tells whose it is.
            if len(group) == 1:
                self.members[group[0]].progress.left = "diverged"
                return
            for i in group:
                self._step([i])
            return
        rates = [self.members[i].learning_rate(self.round) for i in group]
        self.optimizer.step(group, gradients, norms, rates)
        for i, loss, norm in zip(group, *numbers.tolist()):
            self.members[i].progress.losses.append(loss)
            self.members[i].progress.grad_norms.append(norm)

    def _evaluate(self, index):
        """A run's evaluation, and whether it ends with it."""
        member = self.members[index]
        config, progress = member.config, member.progress
        last = self.round == member.data.steps
        self.stack.load(self.stack.values, index)
        # Losses that are compared are losses of the same rows.
        result = self._result(member, None if last and not config.keeps_best else config.eval_rows)
        if not torch.isfinite(torch.tensor(result["eval_loss"])):
            progress.left = "diverged"
            return
        better = member.note({**result, "step": self.round})
        if better and self.best:
            for name, x in self.stack.values.items():
                self.best[name][index] = x[index]
        if config.patience is not None and progress.waited >= config.patience and not last:
            self._end(index, "stopped early")

    def _result(self, member, rows):
        data = member.data
        result = evaluate(self.model, self.tokenizer, data.task, data.held_out[:rows], data.held_out_ids[:rows])
        return {f"eval_{name}": value for name, value in result.items()}

    def _end(self, index, why):
        """Let a run leave; where its best prompt is kept, that one is evaluated on all held-out rows."""
        member = self.members[index]
        member.progress.left = why
        if self.best and member.progress.best_step is not None:
            self.put(index)
            kept = {"kept_step": member.progress.best_step, "step": self.round}
            member.progress.evaluations.append({**self._result(member, None), **kept})

    def _halve(self):
        """Drop the half of the runs with the higher held-out loss; of an odd number the smaller half."""
        active = sorted(self.active, key=lambda i: self.members[i].progress.evaluations[-1]["eval_loss"])
        for i in active[(len(active) + 1) // 2 :]:
            self.members[i].progress.left = "dropped"

    def _tensors(self):
        """Everything that changes, by name; views of what trains."""
        optimizer = self.optimizer
        of_names = {
            "values": self.stack.values,
            "exp_avg": optimizer.exp_avg,
            "exp_avg_sq": optimizer.exp_avg_sq,
            "best": self.best,
        }
        tensors = {f"{kind}.{name}": x for kind, stacked in of_names.items() for name, x in stacked.items()}
        return {**tensors, "steps": optimizer.steps}

    def _save(self):
        """A checkpoint, which is complete or not there."""
        with staged(self.folder) as staging:
            checkpoint = staging / f"checkpoint-{self.round}"
            checkpoint.mkdir()
            generators = {"random.cpu": torch.get_rng_state()}
            if self.model.device.type != "cpu":
                generators["random.device"] = torch.get_device_module(self.model.device).get_rng_state()
            save_file({**self._tensors(), **generators}, checkpoint / "state.safetensors")
            progress = [asdict(member.progress) for member in self.members]
            write_json(checkpoint / "progress.json", [_without_infinity(x) for x in progress])
        for old in checkpoints(self.folder)[: -self.config.keep_checkpoints]:
            delete_checkpoint(old)

    @torch.no_grad()
    def _load(self, checkpoint):
        saved = load_file(checkpoint / "state.safetensors")
        for name, x in self._tensors().items():
            x.copy_(saved[name])
        torch.set_rng_state(saved["random.cpu"])
        if "random.device" in saved:
            torch.get_device_module(self.model.device).set_rng_state(saved["random.device"])
        for member, progress in zip(self.members, json.loads((checkpoint / "progress.json").read_text("utf-8"))):
            member.progress = Progress(**{name: x for name, x in progress.items() if x is not None})
        self.round = int(checkpoint.name.split("-")[1])


def _cannot_pack(config, reason):
    expected = "expected one that can; only_task trains one value by itself"
    return InputError(
        "model", f"{config.model!r} cannot run several prompts in one packed batch ({reason}); {expected}"
    )


def _without_infinity(progress):
    """JSON has none; the default of a field that is left out is that."""
    return {name: None if x == float("inf") else x for name, x in progress.items()}
