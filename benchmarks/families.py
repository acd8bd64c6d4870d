"""Every causal language model of the installed transformers, tiny and random: how Prompt Tuning runs, and is it right?

Loss, gradient of the prompt and logits of an accelerated PEFT model against PEFT's own, on batches of several shapes.
``docs/families.md`` is written by this. Nothing here is timed.
"""

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from tqdm import tqdm

import fastprompt

from . import report
from .tiny_families import NEEDS, VOCABULARY, check_size, families, tiny_model

PROMPT, ROWS, WIDTH = 5, 4, 14
# Relative differences in fp32. A gradient may differ by what PEFT's own differs from that in float64, if that is more.
LOSS, GRADIENT = 1e-5, 1e-4
DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"

# Those that are fine-tuned most, for a quick look and for the tests.
COMMON = (
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5_text gemma gemma2 gemma3_text "
    "gemma3n_text gemma4_text gpt2 gpt_neox gpt_oss phi phi3 olmo2 olmo3 granite granitemoehybrid falcon falcon_h1 "
    "starcoder2 cohere2 glm4 deepseek_v3 llama4_text"
).split()
# Configs that run otherwise than their family's default: an indexer that chooses fewer keys than the longest row sees,
# no layers that choose experts by token id, Falcon's first models, the E models of Gemma 4.
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v32": dict(index_topk=32),
    "deepseek_v4": dict(num_hash_layers=0),
    "falcon": dict(alibi=True),
    "gemma4_text": dict(hidden_size_per_layer_input=4),
}


# How a family can come out, and what that means.
PATHS = {
    "packed": "the prompt runs once, and all is equal to PEFT's",
    "PEFT's forward": "its own padded forward runs, as without fastprompt, for the reason given",
    "PEFT fails": "the model itself runs the batches, and raises behind a prompt of PEFT's",
    "not tried": "the model itself runs no batch of text alone, without PEFT",
    "no sizes": "its tiny model does not run: the survey lacks its sizes",
    "wrong": "it differs from PEFT's",
    "crash": "it raises where PEFT's runs",
}


@dataclass(frozen=True)
class Outcome:
    """How one family came out.

    Attributes:
        family: its model type.
        path: one of PATHS.
        reason: why not packed, what is wrong, or the error.
        loss, gradient: the largest relative differences.
    """

    family: str
    path: str
    reason: str = ""
    loss: float = 0.0
    gradient: float = 0.0


def batches():
    """Batches: no padding, on the right, on the left; all tokens labelled, or the last; rows of one token; one row."""
    generator = torch.Generator().manual_seed(1)
    for padding, lengths, labelled in (
        ("none", [WIDTH] * ROWS, "all"),
        ("none", [WIDTH] * ROWS, "last"),
        ("right", [14, 3, 9, 6], "all"),
        ("right", [14, 3, 9, 6], "last"),
        ("left", [14, 3, 9, 6], "all"),
        ("left", [5, 14, 2, 11], "last"),
        ("right", [1, 14, 1, 2], "all"),
        ("none", [1] * ROWS, "all"),
        ("none", [WIDTH], "all"),
        ("right", [40, 12, 23, 31], "all"),
    ):
        width = max(lengths)
        column, size = torch.arange(width), torch.tensor(lengths)[:, None]
        mask = (column < size if padding != "left" else column >= width - size).long()
        ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
        labels = ids.masked_fill(mask == 0, -100)
        if padding == "left":  # a padding token would have to predict the first label
            labels[torch.arange(len(lengths)), mask.argmax(1)] = -100
        if labelled == "last":
            last = width - 1 - mask.flip(1).argmax(1)
            labels = torch.full_like(ids, -100).scatter(1, last[:, None], ids.gather(1, last[:, None]))
        yield dict(input_ids=ids * mask, attention_mask=mask, labels=labels)


def step(model, inputs):
    """Loss and gradient of a training step, logits of an evaluation."""
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradient = next(p.grad for p in model.prompt_encoder.parameters() if p.grad is not None).clone()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return loss.detach(), gradient, logits[:, -inputs["input_ids"].shape[1] :][inputs["attention_mask"].bool()]


def peft_model(family, **changes):
    """A tiny model behind a prompt of PEFT's, the same every time."""
    check_size(family, **changes)
    model = tiny_model(family, **changes)
    # PEFT looks these up in the config, under names that not all families have; a prompt needs its width alone.
    sizes = dict(token_dim=model.get_input_embeddings().weight.shape[1], num_layers=1, num_attention_heads=1)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, **sizes)
    return get_peft_model(model, config)


def survey(family: str, **changes: Any) -> Outcome:
    """Try one family on all batches, with changes of its config."""
    given, model = list(batches()), None
    try:
        model = peft_model(family, **changes)
        plain = [step(model, inputs) for inputs in given]
        if not all(loss.isfinite() and gradient.isfinite().all() for loss, gradient, _ in plain):
            raise ValueError("its loss or gradient is no number")
    except Exception as error:
        ours = why_no_text(family, changes, given)
        if ours is None:
            lost = model is not None and model.word_embeddings is None
            why = " (PEFT found no table of vocab_size embeddings)" if lost else ""
            return Outcome(family, "PEFT fails", _one_line(error) + why)
        return Outcome(family, "not tried", NEEDS[family]) if family in NEEDS else Outcome(family, "no sizes", ours)
    try:
        fastprompt.accelerate(model)
        fast = [step(model, inputs) for inputs in given]
    except Exception as error:
        return Outcome(family, "crash", _one_line(error))
    loss = max(_difference(a[0], b[0]) for a, b in zip(fast, plain))
    gradient = max(_difference(a[1], b[1]) for a, b in zip(fast, plain))
    logits = max(_difference(a[2], b[2]) for a, b in zip(fast, plain))
    stats = fastprompt.stats(model)
    reason = "; ".join(stats.padded)
    limit = GRADIENT if gradient <= GRADIENT else max(GRADIENT, rounding(family, changes, given, plain))
    if not (loss <= LOSS and gradient <= limit and logits <= GRADIENT):
        return Outcome(family, "wrong", f"logits differ by {logits:.0e}; {reason}", loss, gradient)
    if not stats.packed:
        return Outcome(family, "PEFT's forward", reason, loss, gradient)
    return Outcome(family, "packed", f"but for: {reason}" if reason else "", loss, gradient)


def why_no_text(family, changes, given):
    """The error of the model itself, without PEFT, on the batches; None if it runs them."""
    try:
        check_size(family, **changes)
        model = tiny_model(family, **changes).train()
        for inputs in given:
            model(**inputs).loss.backward()
    except Exception as error:
        return _one_line(error)
    return None


def rounding(family, changes, given, plain):
    """How far PEFT's own gradient is from that in float64; 0 if the model cannot be run in it."""
    try:
        model = peft_model(family, **changes)
        if hasattr(model.base_model, "set_experts_implementation"):
            model.base_model.set_experts_implementation("eager")  # torch's grouped products know no float64
        exact = [step(model.double(), inputs)[1] for inputs in given]
    except Exception:
        return 0.0
    return max(_difference(gradient, x) for (_, gradient, _), x in zip(plain, exact))


def _difference(got, expected):
    return float((got.to(expected) - expected).norm() / expected.norm().clamp(min=1e-30))


def _one_line(error):
    return f"{type(error).__name__}: {shorten(str(error), 120, placeholder=' ...')}"


def run(out, quick=False):
    """Run, print, write ``families.csv`` into ``out`` and the document; False if one is wrong, breaks, has no sizes."""
    warnings.filterwarnings("ignore")
    names = [name for name in (COMMON if quick else sorted(families())) if name in families()]
    outcomes = [x for name in tqdm(names, desc="families") for x in _with_variant(name)]
    found = Counter(x.path for x in outcomes)
    counts = {path: found[path] for path in PATHS if path in found}
    print(", ".join(f"{path}: {number}" for path, number in counts.items()))
    rows = [[x.family, x.path, f"{x.loss:.0e}", f"{x.gradient:.0e}", x.reason[:90]] for x in outcomes]
    print(report.table(["family", "path", "loss diff", "gradient diff", "reason"], rows), flush=True)
    report.write_csv(out / "families.csv", [vars(x) for x in outcomes])
    if not quick:
        DOCUMENT.write_text(document(outcomes, counts))
    return not any(x.path in ("wrong", "crash", "no sizes") for x in outcomes)


def _with_variant(family):
    """The outcomes of a family, and of its variant."""
    yield survey(family)
    changes = VARIANTS.get(family)
    if changes is not None:
        told = ", ".join(f"{name}={value}" for name, value in changes.items())
        yield replace(survey(family, **changes), family=f"{family} ({told})")


def document(outcomes, counts):
    """The table as Markdown."""
    lines = [
        "# Model families",
        "",
        "Prompt Tuning through PEFT and `fastprompt.accelerate`, on tiny random models of all causal language models",
        "of transformers. Loss, gradient and logits are compared with PEFT's on ten kinds of batches. Written by",
        "`python -m benchmarks families`. Where PEFT fails there is nothing to compare with; Gemma 4's E models, which",
        "look embeddings of every layer up by token id, run packed behind prompts even so (`tests/test_per_layer.py`).",
        "",
        *(f"- {path} ({counts[path]}): {meaning}" for path, meaning in PATHS.items() if path in counts),
        "",
        f"{report.header().splitlines()[1]}.",
        "",
        "| family | runs | why |",
        "|---|---|---|",
    ]
    lines += [f"| {x.family} | {x.path} | {x.reason.replace('|', '/')} |" for x in outcomes]
    return "\n".join(lines) + "\n"
