"""How well a model with an adapter does on rows it was not trained on."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedTokenizerBase

from ..hf.attachment import evaluation_mode
from ..hf.cache_names import cache_argument, cache_in
from ..hf.per_layer import per_layer_inputs, searching_part
from .data import Example, Task
from .encoding import Encoded, encode

TOKENS_PER_FORWARD = 1024


@torch.no_grad()
def completion_log_probs(model: PeftModel, pairs: Sequence[Encoded], task_id: int = 0) -> torch.Tensor:
    """Natural-log probability of each completion given its prompt, ``[len(pairs)]``, fp32 on the CPU.

    ``task_id`` picks the soft prompt of a multitask model.

    The soft prompt is run once, rows of equal length share a forward, so nothing is padded, and logits are computed
    only where a completion is predicted. The last token of a completion need not be fed to the model: completions of
    one prompt that differ in that token alone, such as one-token label words, cost one forward together.
    """
    readers: dict[tuple[int, ...], list[int]] = {}  # input ids -> the pairs whose completion they predict
    for i, (prompt, completion) in enumerate(pairs):
        readers.setdefault((*prompt, *completion[:-1]), []).append(i)

    with evaluation_mode(model):
        return _completion_log_probs(model, pairs, readers, task_id)


def _completion_log_probs(
    model: PeftModel, pairs: Sequence[Encoded], readers: dict[tuple[int, ...], list[int]], task_id: int
) -> torch.Tensor:
    base: Any = model.get_base_model()
    soft_prompt = _soft_prompt(model, task_id)
    scores = torch.empty(len(pairs))
    with tqdm(total=len(readers), desc="evaluating", unit="row", leave=None) as bar:
        for batch in _equal_lengths(readers, TOKENS_PER_FORWARD):
            keep = max(len(pairs[i].completion) for sequence in batch for i in readers[sequence])
            cache = copy.deepcopy(soft_prompt)
            if cache is not None:
                cache.batch_repeat_interleave(len(batch))
            ids = torch.tensor(batch, device=base.device)
            given = cache_argument(base.forward, cache)
            logits = base(input_ids=ids, logits_to_keep=keep, **given).logits  # [B, keep, V]
            for row, sequence in zip(logits[:, -keep:].float().log_softmax(-1), batch):
                for i in readers[sequence]:
                    tokens = torch.tensor(pairs[i].completion, device=base.device)
                    scores[i] = row[-len(tokens) :].gather(-1, tokens[:, None]).sum()
            bar.update(len(batch))
    return scores


def _soft_prompt(model: PeftModel, task_id: int) -> Any:
    """A cache with the soft prompt's keys and values, the same in front of every row; None for another adapter."""
    if not model.active_peft_config.is_prompt_learning:
        return None
    base: Any = model.get_base_model()
    prompt: Any = model.get_prompt(batch_size=1, task_ids=torch.tensor([task_id], device=base.device))
    if isinstance(prompt, Cache):  # Prefix-Tuning learns keys and values
        return prompt
    prompt = prompt.to(base.get_input_embeddings().weight.dtype)  # [1, P, D]
    ids = torch.full(prompt.shape[:2], -1, device=prompt.device)
    looked_up = per_layer_inputs(searching_part(base), ids)
    return cache_in(base(inputs_embeds=prompt, use_cache=True, logits_to_keep=1, **looked_up))


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
) -> dict:
    """``loss`` (mean over completion tokens, natural log), ``rows``, and for labelled rows ``accuracy``: how often the
    most probable of the task's label words is the right one. ``encoded`` are the token ids of ``examples``.

    Where rows belong to several tasks these are over all rows, and ``tasks`` holds the same for each task.
    """
    if task.tasks is None:
        return _means([_sums(model, tokenizer, task, None, examples, encoded)])
    sums = {}
    for name in task.tasks:
        rows = [i for i, example in enumerate(examples) if example.task == name]
        if rows:
            sums[name] = _sums(model, tokenizer, task, name, [examples[i] for i in rows], [encoded[i] for i in rows])
    return {**_means(list(sums.values())), "tasks": {name: _means([values]) for name, values in sums.items()}}


def _means(sums: Sequence[dict]) -> dict:
    total = {name: sum(values[name] for values in sums) for name in sums[0]}
    result = {"loss": -total["log_prob"] / total["tokens"]}
    if "right" in total:
        result["accuracy"] = total["right"] / total["rows"]
    return {**result, "rows": total["rows"]}


def _sums(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    name: str | None,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
) -> dict:
    """Sums over the rows of one task: ``log_prob`` of the completions, their ``tokens``, ``rows``, and how many labels
    are ``right``."""
    task_id = task.task_id(name)
    sums = {"tokens": sum(len(row.completion) for row in encoded), "rows": len(encoded)}
    if not task.is_classification:
        return {**sums, "log_prob": completion_log_probs(model, encoded, task_id).sum().item()}

    labels = task.labels(name)
    words = encode(
        tokenizer,
        [example.prompt for example in examples for _ in labels],
        [task.completion(example.prompt, label) for example in examples for label in labels],
    )
    # The prompts of `encoded` may have been shortened; the words are scored behind the same.
    pairs = [Encoded(encoded[i // len(labels)].prompt, word.completion) for i, word in enumerate(words)]
    scores = completion_log_probs(model, pairs, task_id).view(len(encoded), len(labels))
    right = torch.tensor([labels.index(str(example.label)) for example in examples])
    return {
        **sums,
        "log_prob": scores.gather(1, right[:, None]).sum().item(),
        "right": (scores.argmax(1) == right).sum().item(),
    }


def _equal_lengths(sequences: Iterable[tuple[int, ...]], tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Lists of equally long sequences, each list with at most ``tokens`` tokens or one sequence."""
    batch: list[tuple[int, ...]] = []
    for sequence in sorted(sequences, key=len):
        if batch and (len(sequence) != len(batch[0]) or len(sequence) * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
