"""Faults that a kernel might have, planted into the reference: what an error budget has to find.

Each gives what a kernel would that has this one fault and makes no other error but the last rounding, so a budget that
finds it would find it in any kernel.
"""

from dataclasses import replace
from unittest import mock

import torch
from torch.nn.functional import pad

from fastprompt.ops.prefix_attention import reference


def attention_faults(inputs, grad, seq, **flags):
    """Name of a fault -> the eight results of prefix_attention with it, as ``benchmarks.budget.attention_budget``."""
    dtype = inputs[0].dtype
    *tensors, sinks = (x if x is None else x.detach().double() for x in inputs)
    options = dict(causal=True, window=None, softcap=None, scale=inputs[0].shape[-1] ** -0.5) | flags
    key_seq = options.get("key_seq")
    longest = int((seq if key_seq is None else key_seq).host.lengths.argmax())

    def run(tensors=tensors, scores=reference._Part.scores, **changes):
        changed = options | changes
        with mock.patch.object(reference._Part, "scores", scores):
            out, lse = reference.forward(*tensors, seq, sinks=sinks, **changed)
            grads = reference.backward(grad.double(), *tensors, out, lse, seq, sinks=sinks, **changed)
        return [None if x is None else x.to(torch.float32 if x is lse else dtype) for x in (out, lse, *grads)]

    original = reference._Part.scores

    def without_a_key(part, *arguments):
        score, slope = original(part, *arguments)
        if part.index == longest and score.shape[2] > 1:
            score[:, :, -2 if options["causal"] else -1] = -torch.inf
        return score, slope

    def one_position_on(part, *arguments):
        part.query_positions = part.query_positions + 1
        return original(part, *arguments)

    def without_gap(part, *arguments):
        gap = part.key_positions[part.prefix] - part.prefix
        part.key_positions[: part.prefix] += gap
        return original(part, *arguments)

    def without_scale_in_a_head(part, causal, window, softcap, scale, *biases):
        part.q[:, 0] /= scale
        result = original(part, causal, window, softcap, scale, *biases)
        part.q[:, 0] *= scale
        return result

    faults = {"a dropped key": run(scores=without_a_key), "a head without scale": run(scores=without_scale_in_a_head)}
    widths = [x.shape[-1] for x in (inputs[0], inputs[2])]
    if widths[0] != widths[1]:
        cut = [x if x is None else pad(x[..., : min(widths)], (0, x.shape[-1] - min(widths))) for x in tensors]
        faults["the wider rows cut off"] = run(cut)
        faults["a scale by the width of values"] = run(scale=widths[1] ** -0.5)
    if options["window"] is not None:
        faults["a window wrong by one"] = run(window=options["window"] + 1)
        faults["a shifted position"] = run(scores=one_position_on)
    elif options["causal"] and seq.kind != "decode":
        faults["a shifted position"] = run(scores=one_position_on)
    if (slopes := options.get("alibi_slopes")) is not None:
        wrong = slopes.clone()
        wrong[-1] *= 0.5
        faults["a wrong slope in a head"] = run(alibi_slopes=wrong)
    if (table := options.get("position_bias")) is not None:
        faults["a bias shifted by one"] = run(position_bias=table.roll(1, 1))
        faults["the bias of another head"] = run(position_bias=table.roll(1, 0))
    if (slopes is not None or table is not None) and seq.gaps is not None and tensors[3] is not None:
        faults["a gap left out of distances"] = run(scores=without_gap)
    if key_seq is not None:
        faults["the keys of a neighbour"] = run(key_seq=_with_a_neighbours_keys(key_seq))
    if dtype == torch.float32:
        rounded = [x if x is None else x.to(torch.bfloat16).double() for x in tensors]
        faults["bf16 for fp32"] = run(rounded)
    return faults


def _with_a_neighbours_keys(seq):
    """The longest sequence begins one row off."""
    starts, longest = seq.starts.clone(), int(seq.host.lengths.argmax())
    starts[longest] += -1 if starts[longest] else 1
    return replace(seq, starts=starts)


def lstm_faults(run, x, weights, grad):
    """Name of a fault -> what ``run(x, weights, grad)``, exact, gives with it, rounded once."""
    hidden = weights[1].shape[1]

    def changed(at, change):
        return [change(w.clone()) if i == at else w for i, w in enumerate(weights)]

    def without_a_column(w):
        w[:, -1] = 0
        return w

    def without_a_unit(w):
        w[hidden - 1] = 0
        return w

    still = x.clone()
    still[len(x) // 2] = 0
    faults = {
        "a step left out": (still, weights, grad),
        "shifted steps": (x.roll(1, 0), weights, grad),
        "a recurrent column left out": (x, changed(1, without_a_column), grad),
        "a bias left out": (x, changed(2, without_a_unit), grad),
        "a shifted gradient": (x, weights, grad.roll(1, 0)),
    }
    if x.dtype == torch.float32:
        faults["bf16 for fp32"] = (x, [w.to(torch.bfloat16) for w in weights], grad)
    return {name: [y.to(x.dtype) for y in run(*arguments)] for name, arguments in faults.items()}


def assert_found(budget, faults):
    """Every one of the planted faults is over the budget."""
    ratios = {name: budget.ratio(results) for name, results in faults.items()}
    missed = {name: ratio for name, ratio in ratios.items() if ratio <= 1}
    assert not missed, f"faults within the budget: {missed}"
    return ratios
