"""Compiled layers: few graphs whatever the shapes of batches, equal results, nothing read on the way."""

import pytest
import torch
from needs import cases, needs
from parity import VOCABULARY, batch, peft_model
from torch._dynamo.testing import CompileCounterWithBackend

import fastprompt
from fastprompt import Sequences, prefix_attention
from fastprompt.peft.state import state_of

pytestmark = pytest.mark.usefixtures("fresh_graphs")
needs_experts = needs("transformers", "5.23", "reads tensors in the backward of compiled experts")


def step(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def shapes(count):
    """Batches whose sizes and lengths differ."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        size, width = torch.randint(2, 9, (2,), generator=generator).tolist()
        ids = torch.randint(3, VOCABULARY, (size, width), generator=generator)
        lengths = torch.randint(1, width + 1, (size, 1), generator=generator)
        real = torch.arange(width) < lengths
        yield {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}


def pair(*arguments, pad_rows_to=None, **options):
    """An accelerated model, and one with the same weights whose layers are compiled, each as one graph."""
    eager, compiled = (
        fastprompt.accelerate(peft_model(*arguments, **options), pad_rows_to=n) for n in (None, pad_rows_to)
    )
    counter = CompileCounterWithBackend("aot_eager")
    for layer in compiled.base_model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    return eager, compiled, counter


def assert_same(eager, compiled, inputs):
    (loss, gradients), (found, found_gradients) = step(eager, inputs), step(compiled, inputs)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for gradient, expected in zip(found_gradients, gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_twenty_shapes_take_two_graphs():
    eager, compiled, counter = pair("llama")
    for inputs in shapes(20):
        assert_same(eager, compiled, inputs)
    assert fastprompt.stats(compiled).packed == 20
    assert counter.frame_count == 2  # of the first shape, and of any


def test_nothing_is_read_from_the_device_inside_of_layers(monkeypatch):
    """Sequences are read when they are made: in a step of compiled layers as often as in one of others."""
    models, reads = pair("llama")[:2], []
    read = Sequences.__post_init__
    monkeypatch.setattr(Sequences, "__post_init__", lambda seq: [read(seq), reads.append(seq)])
    for inputs in shapes(3):
        counts = []
        for model in models:
            reads.clear()
            step(model, inputs)
            counts.append(len(reads))
        assert counts[0] == counts[1] > 0


def test_direct_calls_of_any_shape_take_two_graphs():
    """With whatever attention is asked for: distances, keys of other rows, dropout, a cache."""
    counter, generator = CompileCounterWithBackend("aot_eager"), torch.Generator().manual_seed(0)
    slopes, table = torch.tensor([0.5, 0.25]), torch.randn(2, 9, generator=generator)

    def layers(x, other, cache, seq, key_seq, decode):
        for options in (dict(alibi_slopes=slopes), dict(position_bias=table, window=3)):
            x = prefix_attention(x, x.cos(), x.sin(), None, None, seq, **options)[0]
        cross = dict(causal=False, key_seq=key_seq, dropout_p=0.5, dropout_seed=3)
        x = prefix_attention(x, other.cos(), other, None, None, seq, **cross)[0]
        return prefix_attention(x, cache.cos(), cache, None, None, decode)[0]

    compiled = torch.compile(layers, fullgraph=True, backend=counter)
    for _ in range(20):
        batch = int(torch.randint(2, 7, (), generator=generator))
        lengths, others = torch.randint(1, 6, (2, batch), generator=generator)
        room = int(lengths.max()) + 1
        sizes = (int(lengths.sum()), 2, 4), (int(others.sum()), 2, 4), (batch, 2, room, 4)
        inputs = [torch.randn(size, generator=generator, requires_grad=True) for size in sizes]
        of_rows, of_others = (Sequences.packed(torch.cat([n[:1] * 0, n.cumsum(0)])) for n in (lengths, others))
        batch_of = of_rows, of_others, Sequences.decode(lengths, queries=lengths)
        (expected, grads), (found, found_grads) = (
            (out := run(*inputs, *batch_of), torch.autograd.grad(out.sin().sum(), inputs)) for run in (layers, compiled)
        )
        for x, y in zip([found, *found_grads], [expected, *grads], strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 2  # of the first shape, and of any


@pytest.mark.parametrize("model", cases(["gemma2", "gpt_oss"], {"gpt_oss": needs_experts}))
def test_windows_softcaps_and_sinks(model):
    eager, compiled, _ = pair(model)
    assert_same(eager, compiled, batch("right"))


def test_a_learned_prefix_takes_two_graphs():
    eager, compiled, counter = pair("llama", method="prefix")
    for inputs in shapes(4):
        assert_same(eager, compiled, inputs)
    assert counter.frame_count == 2


def test_text_in_common_runs_once():
    eager, compiled, counter = pair("llama")
    for model in (eager, compiled):
        state_of(model).engine.node_cost = 1
    for common in (0, 2, 3):
        assert_same(eager, compiled, batch("right", common=common))
    tree = batch("right", common=2)
    tree["input_ids"][1:3, :5] = tree["input_ids"][1, :5]
    assert_same(eager, compiled, tree)
    assert counter.frame_count == 2


def test_batches_of_as_many_rows_take_one_graph():
    eager, compiled, counter = pair("llama", pad_rows_to=64)
    for inputs in shapes(3):
        assert_same(eager, compiled, inputs)
    assert counter.frame_count == 1


def test_left_padding_and_evaluation():
    eager, compiled, _ = pair("llama")
    assert_same(eager, compiled, batch("left"))
    with torch.no_grad():
        inputs = batch("left")
        torch.testing.assert_close(compiled.eval()(**inputs).logits, eager.eval()(**inputs).logits)


def test_the_last_layer_runs_uncompiled_on_labelled_rows():
    eager, compiled, counter = pair("llama")
    rows = []
    hook = compiled.base_model.model.layers[-1].mlp.register_forward_hook(lambda *a: rows.append(a[1][0].shape[-2]))
    assert_same(eager, compiled, batch("right", "last"))
    assert rows == [4]
    hook.remove()
    for labels in ("all", "last"):
        assert_same(eager, compiled, batch("right", labels))
    assert counter.frame_count <= 2


def test_a_whole_model_is_compiled_twice_at_most():
    eager, compiled = (fastprompt.accelerate(peft_model("llama", num_hidden_layers=2)) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    run, counts = torch.compile(compiled, backend=counter), []
    for inputs in shapes(6):
        run.zero_grad()
        loss = run(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, step(eager, inputs)[0], rtol=1e-5, atol=0)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 2 * counts[0]


def test_logits_of_a_compiled_step():
    """Read or not, and in the step behind the first in which they are."""
    inputs, gradients = batch("left", "last"), []
    eager, compiled = (fastprompt.accelerate(peft_model("llama")) for _ in range(2))
    run = torch.compile(compiled, backend="eager")
    for model in (eager, run):
        output = model(**inputs)
        (output.loss + output["logits"].sin().sum()).backward()
        gradients.append(next(p.grad for p in model.parameters() if p.requires_grad))
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()
    expected = eager(**inputs)
    for found in zip(run(**inputs, return_dict=False), expected.to_tuple()):
        torch.testing.assert_close(*(x * 1 for x in found), rtol=1e-4, atol=1e-5)
