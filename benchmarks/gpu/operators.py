"""Every operator at real sizes beside its rivals: SDPA, FlexAttention, flash-attn, plain PyTorch and nn.LSTM."""

from dataclasses import replace

import torch
from torch import nn

import fastprompt
from fastprompt import native
from fastprompt.layout import plan_padded_input
from fastprompt.ops.prefix_attention import reference

from ..budget import FEW, Budget
from .features import caches, features
from .layers import layers, loss
from .measure import compare, exactly, milliseconds, normal, peak_mib
from .record import Row
from .rivals import Attention, providers, uneven


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
        replace(base, heads=16, kv_heads=16, head_dim=192, value_dim=128),  # as DeepSeek V3
    ]


def decoding(
    device, batch=64, room=1024, heads=32, kv_heads=8, head_dim=128, prefix=100, dtype=torch.bfloat16, **timing
):
    """Rows of one token a sequence, against SDPA over caches that hold the prefix too, padded, and masked."""
    _, draw = normal(device, dtype)
    lengths = [max(1, room * (i + 8) // (batch + 8)) for i in range(batch)]
    seq = fastprompt.Sequences.decode(torch.tensor(lengths, device=device))
    q = draw(batch, heads, head_dim)
    k, v = (draw(batch, kv_heads, room, head_dim) for _ in range(2))
    bank = [draw(1, prefix, kv_heads, head_dim) for _ in range(2)]
    full = [torch.cat([shared.transpose(1, 2).expand(batch, -1, -1, -1), own], 2) for shared, own in zip(bank, (k, v))]
    places = torch.arange(prefix + room, device=device)
    mask = (places < prefix + torch.tensor(lengths, device=device)[:, None])[:, None, None]

    def run(backend="auto", q=q, k=k, v=v, bank=bank):
        return fastprompt.prefix_attention(q, k, v, *bank, seq, backend=backend)[0]

    def sdpa():
        repeated = (x.repeat_interleave(heads // kv_heads, 1) for x in full)
        return nn.functional.scaled_dot_product_attention(q[:, :, None], *repeated, attn_mask=mask)[:, :, 0]

    doubled = q.double(), k.double(), v.double(), [x.double() for x in bank]
    budget = Budget.of(lambda _: [run("reference", *doubled)], dtype, draws=FEW)
    return [
        Row(
            "decode",
            f"{heads}/{kv_heads} heads of {head_dim}, P = {prefix}, {batch} caches of up to {room}",
            name,
            budget.ratio([call()]),
            milliseconds(call, device, **timing),
            peak_mib(call, device),
        )
        for name, call in {"fastprompt": run, "SDPA": sdpa}.items()
    ]


def plans(device, batch=64, width=512, prompt=100):
    """One row: the row plan of a padded batch of groups that begin alike, as PyTorch's operations on a CPU make it."""
    ids = torch.randint(8, (batch, width), generator=torch.Generator().manual_seed(0))
    ids[1::2, : width // 2] = ids[::2, : width // 2]
    mask = torch.arange(width) < torch.tensor([width - i * width // (2 * batch) for i in range(batch)])[:, None]
    given = dict(token_ids=ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100))

    def tensors(device, backend):
        there = {name: x.to(device) for name, x in given.items()}
        plan = plan_padded_input(batch, width, prompt, **there, backend=backend)
        return {name: x.cpu() for name, x in vars(plan).items() if isinstance(x, torch.Tensor)}

    found, expected = tensors(device, "auto"), tensors("cpu", "reference")
    same = found.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in found.items())
    case = f"{batch} sequences of up to {width} tokens, P = {prompt}"
    return [Row("row_plan", case, "fastprompt", 0.0 if same else float("inf"))]


def rows_and_prompts(device, tokens=8192, width=4096, vocabulary=32768, prompt=100, dtype=torch.bfloat16, **timing):
    """Rows of prompt_concat and multitask_prompt beside plain PyTorch."""
    generator, draw = normal(device, dtype)
    ids = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    source = torch.cat([-1 - torch.arange(prompt, device=device), ids])
    table, learned = draw(vocabulary, width), draw(prompt, width)

    def concat(backend):
        return lambda learned: fastprompt.prompt_concat(source, table.to(learned.dtype), learned, backend=backend)

    def plain(learned):
        return torch.cat([learned, nn.functional.embedding(ids, table.to(learned.dtype))])

    grad = draw(prompt + tokens, width)
    rows = compare(
        "prompt_concat",
        f"{prompt} + {tokens} rows of {width}",
        {"fastprompt": concat("auto"), "cat + embedding": plain},
        exactly(concat("reference"), [learned], grad),
        [learned],
        grad,
        device,
        **timing,
    )

    tasks = torch.arange(4, device=device)
    shared, left, right = draw(prompt, width), draw(8, prompt, 4), draw(8, 4, width)

    def multitask(backend):
        return lambda *x: fastprompt.multitask_prompt(*x, tasks, backend=backend)

    def matmul(shared, left, right):
        return shared * (left[tasks] @ right[tasks])

    grad = draw(4, prompt, width)
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
    """Rows of prompt_lstm beside nn.LSTM, which is cuDNN's on a GPU.

    The CUDA kernels, where they are compiled, in fp32 and bf16.
    """
    kinds = [("auto", dtype)]
    if device == "cuda" and native.missing_cuda is None:
        kinds += [("cuda", dtype), ("cuda", torch.bfloat16)]
    rows = []
    for width in widths:
        for length in lengths:
            for backend, kind in kinds:
                rows += _lstm(device, width, length, backend, kind, timing)
    return rows


def _lstm(device, width, length, backend, dtype, timing):
    torch.manual_seed(0)
    module = nn.LSTM(width, width, num_layers=2, bidirectional=True).to(device, dtype)
    weights = [w.detach() for w in module.parameters()]
    x, grad = (torch.randn(length, n * width, device=device, dtype=dtype) for n in (1, 2))

    def fused(backend):
        return lambda x, *weights: fastprompt.prompt_lstm(x, list(weights), num_layers=2, backend=backend)

    case = f"{length} steps of {width}, two layers"
    if backend == "cuda":
        case += f", CUDA kernels, {str(dtype)[6:]}"
    return compare(
        "prompt_lstm",
        case,
        {"fastprompt": fused(backend), "nn.LSTM": fused("torch")},
        exactly(fused("reference"), [x, *weights], grad),
        [x, *weights],
        grad,
        device,
        **timing,
    )


def small(device, chosen=providers):
    """Every operator at sizes that are done in a moment: what the sanitizer and the CPU tests run."""
    timing = dict(rounds=1, calls=1)
    problem, heads = Attention(4, 2, 16, 5, (7, 3, 12), torch.float32, device), (4, 2, 16, 5)
    return [
        *attention(device, [problem, replace(problem, value_dim=8)], chosen, **timing),
        *features(device, *heads, 110, torch.float32),
        *decoding(device, 4, 16, *heads, torch.float32, **timing),
        *caches(device, *heads, 20, 4, torch.float32),
        *plans(device, 4, 8, 5),
        *rows_and_prompts(device, 20, 24, 40, 5, torch.float32, **timing),
        *layers(device, 5, 3, 16, 24, 40, torch.float32, **timing),
        *loss(device, 5, 24, 40, torch.float32, **timing),
        *lstm(device, (8,), (5,), **timing),
    ]
