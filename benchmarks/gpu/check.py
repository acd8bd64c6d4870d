"""``python -m benchmarks.gpu.check``: everything that only a GPU can tell, in under ten minutes.

Correctness first: the Triton tests on the GPU, compute-sanitizer where it is installed, and every operator at real sizes against
the float64 reference. Then times: the operators beside SDPA, FlexAttention, flash-attn and nn.LSTM (cuDNN), and whole training
steps beside PEFT, with their peak memory. A speed-up is printed only next to a passed check. Writes one JSON and one markdown
table with the device's name into ``benchmarks/gpu/results/``. Exits with 1 if a check failed, with 2 where there is no GPU.
"""

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch import nn

import fastprompt
from fastprompt import native
from fastprompt.ops.prefix_attention import reference

from .. import models, report, step
from ..budget import Budget
from ..workloads import Workload, uneven_lengths
from .rivals import Attention, ours, providers, uneven

HERE = Path(__file__).parent
DRAWS = 2  # for a budget: at these sizes the mean of their squares is known well, and they take time
OPPONENT = {"attention": "SDPA", "step": "PEFT"}
# A step of a one-billion-parameter Llama's shape, with half its layers.
STEP_SIZES = dict(models.SIZES, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=32,
                  num_key_value_heads=8)  # fmt: skip


@dataclass
class Row:
    """One measurement.

    Attributes:
        section, case, provider: what was measured.
        error: how far its worst result is from the float64 reference, over the budget; None: nothing to check.
        ms: milliseconds of every round; empty for a check alone.
        mib: peak memory in MiB, where it was measured.
        note: why it did not run, or anything to add.
    """

    section: str
    case: str
    provider: str
    error: float | None = None
    ms: list = field(default_factory=list)
    mib: float | None = None
    note: str = ""

    @property
    def right(self):
        return self.error is not None and self.error <= 1  # False for nan


def results_of(run, inputs, grad):
    """The output and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def seconds(call, device, rounds=7, calls=10):
    """Seconds of one call, a value a round. Calls follow one another without a wait, as in training."""

    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    call()
    found = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        found.append((time.perf_counter() - start) / calls)
    return found


def peak_mib(call, device):
    """MiB that a call allocates beyond what was there before; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def exactly(reference, inputs, grad):
    """What :class:`Budget` evaluates: :func:`results_of` of the reference in float64."""
    inputs, grad = [x.detach().double() for x in inputs], grad.double()
    return lambda stored: results_of(reference, inputs, grad)


def compare(section, case, functions, exactly, inputs, grad, device, **timing):
    """Check each provider against ``exactly`` (see :class:`Budget`), and time it, forward and forward with backward."""
    rows, budget = [], Budget.of(exactly, grad.dtype, draws=DRAWS)
    for name, run in functions.items():
        try:
            error = budget.ratio(results_of(run, inputs, grad))
            inputs = [x.detach().requires_grad_() for x in inputs]

            def both(run=run):
                torch.autograd.grad(run(*inputs), inputs, grad)

            def forward(run=run):
                with torch.no_grad():
                    run(*inputs)

            for kind, call in {"forward": forward, "forward + backward": both}.items():
                rows.append(
                    Row(
                        section,
                        f"{case}, {kind}",
                        name,
                        error,
                        [1e3 * s for s in seconds(call, device, **timing)],
                        peak_mib(call, device),
                    )
                )
        except (
            RuntimeError,
            NotImplementedError,
            ImportError,
        ) as problem:  # a rival that cannot run here is no failure of ours
            if name == "fastprompt":
                raise
            rows.append(Row(section, case, name, note=f"does not run: {str(problem).splitlines()[0][:120]}"))
    return rows


def attention(device, problems=None, chosen=providers, **timing):
    """Rows of prefix_attention and its rivals, those that ``chosen`` gives for a problem."""
    rows = []
    for problem in problems or _attention_problems(device):
        inputs, grad = problem.tensors()
        rows += compare(
            "attention",
            f"{problem.name}, {str(problem.dtype)[6:]}",
            chosen(problem),
            _exact_attention(problem, inputs, grad),
            inputs,
            grad,
            device,
            **timing,
        )
    return rows


def _exact_attention(problem, inputs, grad):
    q, k, v, prefix_k, prefix_v = (x.detach().double() for x in inputs)
    tensors = q, k, v, prefix_k[None], prefix_v[None]
    options = dict(causal=True, window=None, softcap=None, sinks=None, scale=problem.head_dim**-0.5)

    def results(stored):
        out, lse = reference.forward(*tensors, problem.seq, **options)
        grads = reference.backward(grad.double(), *tensors, stored(out), lse, problem.seq, **options)
        return [out, *grads[:3], *(x[0] for x in grads[3:5])]

    return results


def _attention_problems(device):
    base = Attention(32, 8, 128, 100, uneven(8192), torch.bfloat16, device)
    small = replace(base, heads=9, kv_heads=3, head_dim=64)
    return [
        base,
        replace(base, lengths=(512,) * 16),
        replace(base, prefix=20),
        replace(base, prefix=500),
        small,
        replace(small, dtype=torch.float16),
        replace(small, dtype=torch.float32, lengths=uneven(2048)),
    ]


def decoding(
    device, batch=64, room=1024, heads=32, kv_heads=8, head_dim=128, prefix=100, dtype=torch.bfloat16, **timing
):
    """Rows of one token a sequence, against SDPA over caches that hold the prefix too, padded, and masked."""
    generator = torch.Generator(device).manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
    lengths = [max(1, room * (i + 8) // (batch + 8)) for i in range(batch)]
    seq = fastprompt.Sequences.decode(torch.tensor(lengths, device=device))
    q, k, v = new(batch, heads, head_dim), new(batch, kv_heads, room, head_dim), new(batch, kv_heads, room, head_dim)
    bank = [new(1, prefix, kv_heads, head_dim) for _ in range(2)]
    full = [torch.cat([shared.transpose(1, 2).expand(batch, -1, -1, -1), own], 2) for shared, own in zip(bank, (k, v))]
    places = torch.arange(prefix + room, device=device)
    mask = (places < prefix + torch.tensor(lengths, device=device)[:, None])[:, None, None]

    def run(backend="auto", q=q, k=k, v=v, bank=bank):
        return fastprompt.prefix_attention(q, k, v, *bank, seq, backend=backend)[0]

    def sdpa():
        repeated = (x.repeat_interleave(heads // kv_heads, 1) for x in full)
        return nn.functional.scaled_dot_product_attention(q[:, :, None], *repeated, attn_mask=mask)[:, :, 0]

    doubled = q.double(), k.double(), v.double(), [x.double() for x in bank]
    budget = Budget.of(lambda _: [run("reference", *doubled)], dtype, draws=DRAWS)
    return [
        Row(
            "decode",
            f"{heads}/{kv_heads} heads of {head_dim}, P = {prefix}, {batch} caches of up to {room}",
            name,
            budget.ratio([call()]),
            [1e3 * s for s in seconds(call, device, **timing)],
            peak_mib(call, device),
        )
        for name, call in {"fastprompt": run, "SDPA": sdpa}.items()
    ]


def rows_and_prompts(device, tokens=8192, width=4096, vocabulary=32768, prompt=100, dtype=torch.bfloat16, **timing):
    """Rows of prompt_concat and multitask_prompt beside plain PyTorch."""
    generator = torch.Generator(device).manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
    ids = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    source = torch.cat([-1 - torch.arange(prompt, device=device), ids])
    table, learned = new(vocabulary, width), new(prompt, width)

    def concat(backend):
        return lambda learned: fastprompt.prompt_concat(source, table.to(learned.dtype), learned, backend=backend)

    def plain(learned):
        return torch.cat([learned, nn.functional.embedding(ids, table.to(learned.dtype))])

    grad_of_rows = new(prompt + tokens, width)
    rows = compare(
        "prompt_concat",
        f"{prompt} + {tokens} rows of {width}",
        {"fastprompt": concat("auto"), "cat + embedding": plain},
        exactly(concat("reference"), [learned], grad_of_rows),
        [learned],
        grad_of_rows,
        device,
        **timing,
    )

    tasks = torch.arange(4, device=device)
    shared, left, right = new(prompt, width), new(8, prompt, 4), new(8, 4, width)

    def multitask(backend):
        return lambda *x: fastprompt.multitask_prompt(*x, tasks, backend=backend)

    def matmul(shared, left, right):
        return shared * (left[tasks] @ right[tasks])

    grad = new(4, prompt, width)
    return rows + compare(
        "multitask_prompt",
        f"4 of 8 tasks, {prompt} x {width}, rank 4",
        {"fastprompt": multitask("auto"), "matmul": matmul},
        exactly(multitask("reference"), [shared, left, right], grad),
        [shared, left, right],
        grad,
        device,
        **timing,
    )


def lstm(device, widths=(128, 256, 512, 1024), lengths=(20, 100), dtype=torch.float32, **timing):
    """Rows of prompt_lstm beside nn.LSTM, which is cuDNN's on a GPU; of the CUDA kernels, where they are compiled, in fp32 and
    bf16."""
    rows = []
    for width, length in itertools.product(widths, lengths):
        for backend, kind in (
            ("auto", dtype),
            *((("cuda", dtype), ("cuda", torch.bfloat16)) if has_cuda_kernels(device) else ()),
        ):
            torch.manual_seed(0)
            module = nn.LSTM(width, width, num_layers=2, bidirectional=True).to(device, kind)
            weights = [w.detach() for w in module.parameters()]
            x, grad = (torch.randn(length, n * width, device=device, dtype=kind) for n in (1, 2))

            def fused(backend):
                return lambda x, *weights: fastprompt.prompt_lstm(x, list(weights), num_layers=2, backend=backend)

            case = f"{length} steps of {width}, two layers" + (
                f", CUDA kernels, {str(kind)[6:]}" if backend == "cuda" else ""
            )
            rows += compare(
                "prompt_lstm",
                case,
                {"fastprompt": fused(backend), "nn.LSTM": fused("torch")},
                exactly(fused("reference"), [x, *weights], grad),
                [x, *weights],
                grad,
                device,
                **timing,
            )
    return rows


def has_cuda_kernels(device):
    return device == "cuda" and native.missing_cuda is None


class _Synchronised:
    """A step of :mod:`benchmarks.step` on a device, finished when it returns."""

    def __init__(self, one, device, dtype):
        one.model.to(device, dtype)
        if isinstance(one, step.Training):
            one.batch = {name: x.to(device) for name, x in one.batch.items()}
        else:
            one.inputs, one.labels = one.inputs.detach().to(device, dtype).requires_grad_(), one.labels.to(device)
        self.step, self.device = one, device

    @property
    def gradient(self):
        return self.step.gradient.float()

    def __call__(self):
        loss = self.step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return loss


def steps(
    device,
    workloads=None,
    sizes=STEP_SIZES,
    methods=("Prompt Tuning", "Prefix-Tuning"),
    dtypes=(torch.float32, torch.bfloat16),
    rounds=5,
):
    """Rows of whole training steps: PEFT, accelerated, LoRA, the floor.

    Checked against PEFT's own step in fp32: fp32 by the limits of :mod:`benchmarks.step`, lower precisions may be twice as far
    from it as PEFT's own in that precision.
    """
    rows, usual = [], [Workload(100, uneven_lengths(100, 64, 128), all_labels) for all_labels in (False, True)]
    for method in methods:
        prompts = 0 if method == "Prefix-Tuning" else 1
        for workload in workloads or usual:
            workload, exact = replace(workload, prompts=prompts), None
            for dtype in dtypes:
                built = {
                    name: _Synchronised(one, device, dtype)
                    for name, one in step.providers(workload, sizes, method).items()
                }
                found = {name: (float(built[name]()), built[name].gradient) for name in ("PEFT", "fastprompt")}
                exact = exact or found["PEFT"]
                errors = {name: _step_errors(got, exact) for name, got in found.items()}
                limits = (step.LOSS_TOLERANCE, step.GRAD_TOLERANCE)
                if dtype != torch.float32:
                    limits = [2 * (error + torch.finfo(dtype).eps) for error in errors["PEFT"]]
                result = step.measure(workload, rounds, built)
                labels = "all tokens" if workload.all_labels else "one a row"
                case = f"{method}, {workload.name}, labels on {labels}, {str(dtype)[6:]}"
                for name, times in result.times.items():
                    error = max(e / limit for e, limit in zip(errors[name], limits)) if name in errors else None
                    rows.append(Row("step", case, name, error, [1e3 * s for s in times], peak_mib(built[name], device)))
                del built
    return rows


def _step_errors(got, exact):
    (loss, gradient), (expected, reference) = got, exact
    return abs(loss - expected) / abs(expected), float((gradient - reference).norm() / reference.norm())


def outside(name, command, timeout):
    """One row for a program that checks: its exit status, and the last line it wrote."""
    try:
        done = subprocess.run(
            command, cwd=HERE.parents[1], timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired:
        return Row("checks", name, "fastprompt", float("inf"), note=f"not finished after {timeout} s")
    lines = done.stdout.strip().splitlines()
    return Row(
        "checks",
        name,
        "fastprompt",
        0.0 if done.returncode == 0 else float("inf"),
        note=lines[-1][:160] if lines else "",
    )


def programs():
    """Rows of the Triton tests on the GPU, and of compute-sanitizer over small calls of every kernel."""
    rows = [outside("Triton tests", [sys.executable, "-m", "pytest", "-q", "tests/gpu"], 180)]
    if tool := shutil.which("compute-sanitizer"):
        for kind in ("memcheck", "racecheck"):
            command = [
                tool,
                "--tool",
                kind,
                "--error-exitcode",
                "1",
                sys.executable,
                "-m",
                "benchmarks.gpu.check",
                "--small",
            ]
            rows.append(outside(f"compute-sanitizer {kind}", command, 90))
    else:
        rows.append(Row("checks", "compute-sanitizer", "fastprompt", note="not installed, not run"))
    return rows


def small(device, chosen=providers):
    """Every operator at sizes that are done in a moment: what the sanitizer and the CPU tests run."""
    timing = dict(rounds=1, calls=1)
    problem = Attention(4, 2, 16, 5, (7, 3, 12), torch.float32, device)
    return [
        *attention(device, [problem], chosen, **timing),
        *decoding(device, 4, 16, 4, 2, 16, 5, torch.float32, **timing),
        *rows_and_prompts(device, 20, 24, 40, 5, torch.float32, **timing),
        *lstm(device, (8,), (5,), **timing),
    ]


def speed_ups(rows):
    """``{(section, case): (opponent, times faster)}`` where ours and the opponent are right: the opponent that the section
    names, or the fastest."""
    found = {}
    for row in rows:
        if row.provider != "fastprompt" or not row.right or not row.ms:
            continue
        others = [
            r
            for r in rows
            if (r.section, r.case) == (row.section, row.case)
            and r is not row
            and r.ms
            and (r.right and r.provider not in ("floor", "LoRA"))
        ]
        chosen = next((r for r in others if r.provider == OPPONENT.get(row.section)), None) or min(
            others, key=lambda r: median(r.ms), default=None
        )
        if chosen:
            found[row.section, row.case] = chosen.provider, median(chosen.ms) / median(row.ms)
    return found


def failures(rows):
    """Our rows that were checked and are wrong."""
    return [row for row in rows if row.provider == "fastprompt" and row.error is not None and not row.right]


def markdown(rows, header):
    faster = speed_ups(rows)
    lines = [
        f"# {header['device']}",
        "",
        ", ".join(f"{name} {value}" for name, value in header.items() if name != "device"),
        "",
        "Error: of output and gradients against float64, over the budget; at most 1 is right. "
        "Speed-ups only where both are right.",
        "",
        "| section | case | provider | error / budget | ms (min to max) | peak MiB | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = f"{median(row.ms):.3f} ({min(row.ms):.3f} to {max(row.ms):.3f})" if row.ms else row.note
        error = "not checked" if row.error is None else f"{row.error:.2f}" if row.right else f"WRONG {row.error:.2g}"
        gain = ""
        if row.provider == "fastprompt" and row.ms:
            opponent, ratio = faster.get((row.section, row.case), ("", 0.0))
            gain = f"{ratio:.2f}x over {opponent}" if opponent else "none given"
        mib = "" if row.mib is None else f"{row.mib:.0f}"
        lines.append(f"| {row.section} | {row.case} | {row.provider} | {error} | {ms} | {mib} | {gain} |")
    return "\n".join(lines) + "\n"


def versions():
    found = {"Python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(rows, header, out):
    """``<device>.json`` and ``<device>.md``; returns the latter's text."""
    out.mkdir(parents=True, exist_ok=True)
    name, text = header["device"].replace(" ", "_").replace("/", "_"), markdown(rows, header)
    records = [vars(row) | {"right": row.right} for row in rows]
    (out / f"{name}.json").write_text(json.dumps({"header": header, "rows": records}, indent=1))
    (out / f"{name}.md").write_text(text)
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check", description="Correctness and speed on a GPU."
    )
    parser.add_argument("--small", action="store_true", help="only small calls of every operator, nothing is written")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "This check needs a GPU that torch can use, and there is none here. Without one: make gpu-evidence.",
            file=sys.stderr,
        )
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is compared with float64
    if options.small:
        rows = small("cuda", lambda problem: {"fastprompt": ours(problem)})  # not the compilation of a rival
    else:
        start = time.perf_counter()
        rows = []
        for part in (programs, *(lambda f=f: f("cuda") for f in (attention, decoding, rows_and_prompts, lstm, steps))):
            rows += part()
            print(f"{len(rows)} results after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        header = {
            "device": torch.cuda.get_device_name(),
            **versions(),
            "CUDA": torch.version.cuda,
            "host": report.header().splitlines()[0],
            "took": f"{time.perf_counter() - start:.0f} s",
        }
        print(write(rows, header, options.out))
    for row in failures(rows):
        print(f"FAILED {row.section}: {row.case}, error {row.error:.2g} of its budget {row.note}", file=sys.stderr)
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
