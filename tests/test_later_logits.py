"""The logits of a training step are computed when they are read, in whatever way that is, and are PEFT's."""

import copy
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils.operations import convert_outputs_to_fp32
from parity import B, P, batch, peft_model
from tiny_models import build
from transformers.trainer_pt_utils import LabelSmoother

import fastprompt


class Squares(torch.autograd.Function):
    """Takes its argument past torch's own operations, as other people's kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x / x.numel() * grad


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def twice(output):
    with torch.no_grad():
        best = output.logits.argmax(-1)  # read without a graph first
    return output.logits.gather(-1, best[..., None])


def changed_in_place(output):
    output.logits.mul_(2)
    return output.logits + 1


def replaced(output):
    output.logits = output.logits / 2
    return output["logits"]


def after_the_backward(output):
    output.loss.backward(retain_graph=True)
    return output.logits


def with_a_hook(output):
    output.logits.register_hook(lambda grad: 3 * grad)
    return output.logits.sin()


READS = {
    "attribute": lambda o: o.logits,
    "key": lambda o: o["logits"],
    "get": lambda o: o.get("logits"),
    "index": lambda o: o[1],
    "slice": lambda o: o[:2][1],
    "to_tuple": lambda o: o.to_tuple()[1],
    "values": lambda o: list(o.values())[1],
    "items": lambda o: dict(o.items())["logits"],
    "keywords": lambda o: dict(**o)["logits"],
    "unpacked": lambda o: (lambda loss, logits, *others: logits)(*o.to_tuple()),
    "method": lambda o: o.logits.log_softmax(-1),
    "function": lambda o: F.softmax(o.logits, -1),
    "part": lambda o: o.logits[..., :-1, :],
    "one of a list": lambda o: torch.stack([o.logits, o.logits]),
    "operator": lambda o: 2 - o.logits,
    "rows": lambda o: next(iter(o.logits)),
    "einsum": lambda o: torch.einsum("bwv->bv", o.logits),
    "autograd function": lambda o: Squares.apply(o.logits),
    "autograd function behind float": lambda o: Squares.apply(o.logits.float()),
    "double": lambda o: o.logits.double(),
    "reshape": lambda o: o.logits.view(-1, o.logits.size(-1)),
    "detach": lambda o: o.logits.detach(),
    "numpy": lambda o: torch.from_numpy(o.logits.detach().numpy()),
    "list": lambda o: torch.tensor(o.logits.tolist()),
    "pickle": lambda o: pickle.loads(pickle.dumps(o.logits.detach())),
    "torch.save": lambda o: saved(o.logits.detach()),
    "deepcopy": lambda o: copy.deepcopy(o.logits.detach()),
    "label smoothing": lambda o: LabelSmoother(0.1)(o, torch.full(o.logits.shape[:2], 5), shift_labels=True),
    "converted": lambda o: convert_outputs_to_fp32(lambda: o)().logits,
    "twice": twice,
    "changed in place": changed_in_place,
    "replaced": replaced,
    "after the backward": after_the_backward,
    "with a hook": with_a_hook,
}


def read(model, inputs, how):
    """What is read, and the gradient of a loss of it."""
    model.zero_grad()
    got = how(model(**inputs))
    if got.requires_grad:
        got.sin().sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    return got.detach(), gradients


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
@pytest.mark.parametrize("name", READS)
def test_reading_logits(name, method):
    model, inputs = peft_model("gpt2", method, dtype=torch.float64), batch("right")
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])  # padding's logits are of no row
    inputs["labels"] = inputs["input_ids"]
    expected, gradients = read(model, inputs, READS[name])
    got, ours = read(fastprompt.accelerate(model), inputs, READS[name])
    assert fastprompt.stats(model).packed == 1
    assert type(got) is torch.Tensor and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    for x, y in zip(ours, gradients, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x - y).norm() <= 1e-8 * y.norm()


@pytest.mark.parametrize("name", ["gemma2", "granite", "mixtral", "opt"])
def test_what_a_model_does_to_its_logits(name):
    model, inputs = peft_model(name), batch("right")
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    expected, (gradient,) = read(model, inputs, READS["attribute"])
    got, (ours,) = read(fastprompt.accelerate(model), inputs, READS["attribute"])
    assert fastprompt.stats(model).packed == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (ours - gradient).norm() <= 1e-4 * gradient.norm()


def counted(model):
    """A list that grows by the rows of every call of the head."""
    rows = []
    model.base_model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    return rows


def test_what_is_known_is_not_computed():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right", "last")
    rows = counted(model)
    logits = model(**inputs).logits
    computed = len(rows)
    assert isinstance(logits, torch.Tensor) and logits.requires_grad and logits.grad_fn is not None
    assert logits.shape == (*logits.size(),) and logits.dim() == logits.ndim == 3 and logits.is_floating_point()
    assert logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.numel() == logits.shape.numel()
    assert len(rows) == computed
    assert logits.sum() == logits.sum() and len(rows) == computed + 1  # once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_converts_what_is_not_computed_yet(dtype):
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right", "last")
    rows = counted(model)

    def forward():
        with torch.autocast("cpu", dtype=dtype):
            return model(**inputs)

    output = convert_outputs_to_fp32(forward)()
    assert output.logits.dtype == torch.float32 and len(rows) == 1
    model.zero_grad()
    output.logits.square().sum().backward()
    ours = next(model.prompt_encoder.parameters()).grad.clone()
    fastprompt.restore(model)
    model.zero_grad()
    expected = convert_outputs_to_fp32(forward)().logits
    real = torch.cat([torch.ones(B, P), inputs["attention_mask"]], 1)[..., None]
    (expected * real).square().sum().backward()
    theirs = next(model.prompt_encoder.parameters()).grad
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_hidden_states_live_as_long_as_the_output():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    states = []
    model.base_model.model.norm.register_forward_hook(lambda m, args, output: states.append(weakref.ref(output)))
    output = model(**inputs)
    output.loss.backward()
    assert states[0]() is None  # of labelled rows only
    output.logits.sum()  # from now on those of all rows are kept
    states.clear()
    output = model(**inputs)
    output.loss.backward()
    assert states[0]() is not None
    output.logits.sum()
    del output
    assert states[0]() is None


def test_logits_of_a_head_that_has_changed_are_refused():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    output = model(**inputs)
    with torch.no_grad():
        model.base_model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="the head has changed since the step"):
        output.logits.sum()


def test_a_hook_of_the_backbone_is_called_once_a_step():
    base = build("llama")
    calls = []
    base.model.register_forward_hook(lambda module, args, output: calls.append(1))
    base.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    model = fastprompt.accelerate(peft_model(None, base=base))
    calls.clear()
    model(**batch("right")).logits.sum()
    assert len(calls) == 2


def test_a_soft_prompt_model():
    model = fastprompt.SoftPromptModel(build("llama"), fastprompt.PromptTuning(3, 48))
    inputs = batch("right")
    logits = model(**inputs).logits
    del inputs["labels"]
    torch.testing.assert_close(logits * 1, model(**inputs).logits, rtol=1e-5, atol=1e-6)
