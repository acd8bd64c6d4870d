"""One training step of Prompt Tuning in front of an encoder-decoder, PEFT's and the same accelerated.

Measured as in :mod:`benchmarks.step`, with targets beside the sources. The prompt sees the text here, so that it runs
in every row, and what is saved is padding: in the encoder, the decoder, cross-attention and the head. How much that is
is counted: ``rows say`` is the multiply-adds with weights of PEFT's padded rows over those of the real ones.
"""

from dataclasses import dataclass
from statistics import geometric_mean

import torch
import transformers as hf
from peft import PromptTuningConfig, get_peft_model
from tqdm import tqdm

from . import report, step
from .workloads import IGNORE, uneven_lengths

SIZES = dict(width=512, inner=2048, layers=6, heads=8, vocabulary=32128)
# Quantiles of the tokens of a question in examples/quickstart.py, in a random order each.
QUESTIONS = (14, 18, 28, 11, 15, 20, 13, 16, 10, 23, 15, 12, 19, 14, 21, 17)
ANSWERS = (12, 15, 20, 14, 23, 10, 17, 28, 19, 13, 15, 21, 11, 14, 16, 18)


@dataclass(frozen=True)
class Pairs:
    """P prompt vectors in front of sources, and their targets: the tokens of every row."""

    prompt: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def name(self):
        return f"({self.prompt}, {len(self.sources)}, {max(self.sources)} -> {max(self.targets)})"

    def batch(self, vocabulary):
        """input_ids and attention_mask ``[B, S]``, labels ``[B, T]``, padded on the right."""
        generator = torch.Generator().manual_seed(0)
        ids, labels = (
            torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=generator)
            for lengths in (self.sources, self.targets)
        )
        real, labelled = (
            torch.arange(max(lengths)) < torch.tensor(lengths)[:, None] for lengths in (self.sources, self.targets)
        )
        labels = labels.masked_fill(~labelled, IGNORE)
        return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long(), "labels": labels}

    def ratio(self, model):
        """What the rows say."""
        batch = len(self.sources)
        encoder, decoder, sources, head = _weights(model)
        padded = batch * (self.prompt + max(self.sources)), batch * max(self.targets)
        real = batch * self.prompt + sum(self.sources), sum(self.targets)
        cost = [source * (encoder + sources) + target * (decoder + head) for source, target in (padded, real)]
        return cost[0] / cost[1]


def _weights(model):
    """How many weights a row of the encoder meets, one of the decoder, one of the encoder in it, and a label."""
    encoder, decoder = (
        sum(p.numel() for name, p in part.named_parameters() if p.dim() > 1 and ".embed" not in f".{name}")
        for part in (model.get_encoder(), model.get_decoder())
    )
    cross = [m for name, m in model.get_decoder().named_modules() if name.endswith(("EncDecAttention", "encoder_attn"))]
    projections = (getattr(m, name, None) for m in cross for name in ("k", "v", "k_proj", "v_proj"))
    sources = sum(projection.weight.numel() for projection in projections if projection is not None)
    return encoder, decoder - sources, sources, model.get_output_embeddings().weight.numel()


def t5(sizes=SIZES):
    """A T5 of the shape of t5-small, without dropout, with random weights; every call gives the same.

    With GELU in place of ReLU: at the corner of that a rounding decides about a whole number of the gradient, and PEFT
    itself is 2e-4 from float64.
    """
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=sizes["vocabulary"],
        d_model=sizes["width"],
        d_kv=sizes["width"] // sizes["heads"],
        d_ff=sizes["inner"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        feed_forward_proj="gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config).requires_grad_(False)


def bart(sizes=SIZES):
    """A BART of the same sizes."""
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=sizes["vocabulary"],
        d_model=sizes["width"],
        dropout=0.0,
        **{f"{part}_{name}": sizes[size] for part in ("encoder", "decoder") for name, size in _OF_BART.items()},
    )
    return hf.BartForConditionalGeneration(config).requires_grad_(False)


_OF_BART = {"layers": "layers", "ffn_dim": "inner", "attention_heads": "heads"}
MODELS = {"T5": t5, "BART": bart}


def workloads(quick=False):
    questions = Pairs(20, QUESTIONS, ANSWERS)
    if quick:
        return [questions]
    return [
        questions,
        Pairs(20, uneven_lengths(20, 16, 64), uneven_lengths(16, 16, 32)),
        Pairs(100, QUESTIONS, ANSWERS),
    ]


def providers(build, workload, sizes=SIZES):
    """Name -> step."""
    batch = workload.batch(sizes["vocabulary"])
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=workload.prompt)

    def tuned():
        base = build(sizes)
        torch.manual_seed(1)
        return get_peft_model(base, config)

    return step.peft_and_ours(tuned, batch)


def run(out, quick=False, sizes=SIZES):
    """Run, print, and write ``encoder_decoder.csv`` into ``out``; False if a result was wrong."""
    rounds = 3 if quick else 9
    cases = [(name, workload) for name in MODELS for workload in workloads(quick)]
    records, right = [], True
    with tqdm(total=2 * (rounds + 1) * len(cases), desc="encoder-decoders", unit="step") as progress:
        for name, workload in cases:
            steps = providers(MODELS[name], workload, sizes)
            said = workload.ratio(steps["PEFT"].model.get_base_model())
            result = step.measure(workload, rounds, steps, progress)
            right &= result.right
            records.append(_record(name, workload, result, said))
    print(report.table(list(records[0]), [list(map(str, record.values())) for record in records]))
    if right:
        means = (f"{name} {_mean(records, name)}" for name in MODELS)
        print(f"geometric means over PEFT and of what the rows say: {', '.join(means)}", flush=True)
    report.write_csv(out / "encoder_decoder.csv", records)
    return right


def _record(name, workload, result, said):
    ratio = result.ratio("PEFT", "fastprompt")
    times = {f"{key} ms": f"{result.seconds(key) * 1e3:.0f}" for key in result.times}
    record = {"model": name, "(P, B, longest)": workload.name, **times, "rows say": f"{said:.2f}"}
    record["over PEFT"] = f"{ratio:.2f}" if result.right else "WRONG"
    record["of the rows"] = f"{ratio / said:.2f}" if result.right else "WRONG"
    return record | {"loss diff": f"{result.loss_error:.0e}", "grad diff": f"{result.grad_error:.0e}"}


def _mean(records, name):
    of_model = [record for record in records if record["model"] == name]
    means = (geometric_mean(float(record[column]) for record in of_model) for column in ("over PEFT", "of the rows"))
    return " and ".join(f"{mean:.2f}" for mean in means)
