"""PEFT's P-Tuning encoder on prompt_lstm: the same numbers, other modules still run, nothing kept too long."""

import pytest
import torch
from parity import batch, peft_model
from peft import PromptEncoder, PromptEncoderConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastprompt
from fastprompt.hf.shared_state import SharedState
from fastprompt.methods import PrefixTuning, PTuning
from fastprompt.peft import encoder as module
from fastprompt.peft.encoder import fast_encoder

P, D = 5, 12


def make(kind, dropout=0.0):
    torch.manual_seed(0)
    return PromptEncoder(
        PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=P,
            num_transformer_submodules=1,
            num_layers=1,
            token_dim=D,
            num_attention_heads=2,
            encoder_reparameterization_type=kind,
            encoder_hidden_size=7,
            encoder_dropout=dropout,
        )
    )


def fast(encoder, outputs=None):
    with fast_encoder(encoder, {} if outputs is None else outputs):
        return encoder(torch.arange(P)[None])


def with_gradients(encoder, run):
    encoder.zero_grad()
    torch.manual_seed(4)  # the same dropout masks
    out = run(encoder)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    return out.detach(), {name: parameter.grad for name, parameter in encoder.named_parameters()}


@pytest.fixture
def runs(monkeypatch):
    """The calls of prompt_lstm."""
    calls = []
    monkeypatch.setattr(module, "prompt_lstm", lambda *a, **o: calls.append(a) or fastprompt.prompt_lstm(*a, **o))
    return calls


@pytest.mark.parametrize("kind, dropout", [("LSTM", 0.0), ("LSTM", 0.4), ("MLP", 0.0)])
def test_the_whole_encoder_is_peft_s(kind, dropout, runs):
    encoder = make(kind, dropout)
    keys = list(encoder.state_dict())
    expected, expected_grads = with_gradients(encoder, lambda e: e(torch.arange(P)[None]))
    got, grads = with_gradients(encoder, fast)
    assert list(encoder.state_dict()) == keys and "forward" not in vars(encoder)
    assert len(runs) == (kind == "LSTM") and got.shape == (1, P, D)
    torch.testing.assert_close(got, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])
    method = PTuning(P, D, encoder=kind.lower(), hidden_size=7)
    method.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(method.eval()(), fast(encoder.eval())[0])


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replace(encoder, name, new):
    old = encoder.get_submodule(name)
    new.load_state_dict(old.state_dict())
    encoder.set_submodule(name, new)


CHANGES = {
    "hook of the head": lambda e: e.mlp_head.register_forward_hook(lambda m, i, o: o + 1),
    "hook of a layer": lambda e: e.mlp_head[0].register_forward_hook(lambda m, i, o: o + 1),
    "hook before a layer": lambda e: e.mlp_head[2].register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "hook of the embedding": lambda e: e.embedding.register_forward_hook(lambda m, i, o: o + 1),
    "hook of the lstm": lambda e: e.lstm_head.register_forward_hook(lambda m, i, o: (o[0] + 1, o[1])),
    "hook of the encoder": lambda e: e.register_forward_hook(lambda m, i, o: o + 1),
    "forward of a layer": lambda e: setattr(e.mlp_head[0], "forward", lambda x: x + 1),
    "another layer": lambda e: replace(e, "mlp_head.2", Doubled(14, D)),
    "another activation": lambda e: e.mlp_head.__setitem__(1, nn.GELU()),
    "a parametrisation": lambda e: nn.utils.parametrizations.weight_norm(e.mlp_head[0]),
    "a parametrised lstm": lambda e: nn.utils.parametrizations.weight_norm(e.lstm_head, "weight_hh_l0"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_run_as_it_is(change, training):
    encoder = make("LSTM").train(training)
    before = encoder(torch.arange(P)[None])
    CHANGES[change](encoder)
    with torch.set_grad_enabled(training):
        outputs, expected = {}, encoder(torch.arange(P)[None])
        for _ in range(2):
            torch.testing.assert_close(fast(encoder, outputs), expected)
    changes_nothing = "parametris" in change
    assert torch.allclose(before, expected, atol=1e-6) == changes_nothing


def test_the_output_is_kept_while_nothing_trains(runs):
    model = fastprompt.accelerate(peft_model("llama", "p_tuning_lstm")).eval()
    inputs = batch("right")
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        first = model(**inputs).loss
        assert model(**inputs).loss == first and len(runs) == 1
        encoder.mlp_head[0].weight.mul_(2)
        assert model(**inputs).loss != first and len(runs) == 2
        encoder.mlp_head[0].weight.div_(2)
        assert model(**inputs).loss == first and len(runs) == 3
        model.train()
        model(**inputs), model(**inputs)
        assert len(runs) == 5
    model.eval()
    model(**inputs).loss.backward()
    assert len(runs) == 6
    handle = encoder.mlp_head[0].register_forward_hook(lambda m, i, o: None)
    encoder.zero_grad()
    with torch.no_grad():
        model(**inputs), model(**inputs)
        assert len(runs) == 8  # a hook wants to see every call
        handle.remove()
    fastprompt.restore(model)
    assert "forward" not in vars(encoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_writes_past_autograd_are_seen(dtype):
    """As an average of the weights is copied into them, ``p.data.copy_(average)``: in place, of one number, of rows."""
    torch.manual_seed(0)
    encoder = fastprompt.PTuning(6, 8, hidden_size=12).to(dtype).eval()
    writes = [
        lambda p: p.data.mul_(0.5),
        lambda p: p.data.view(-1)[-1:].add_(1),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: p.detach().numpy().__imul__(2) if dtype != torch.bfloat16 else p.data.mul_(2),
    ]
    with torch.no_grad():
        before = encoder()
        assert encoder() is before
        for parameter in encoder.parameters():
            for write in writes:
                write(parameter)
                torch.testing.assert_close(encoder(), encoder.encode(), rtol=0, atol=0)
        assert encoder() is encoder()


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_gradients_of_a_prefix_s_layers_are_stacked_not_added_up():
    method = PrefixTuning(P, 6, 2, 4, projection=7)
    layers = SharedState.of_tensor(method()).layers
    loss = sum((keys * values).sum() for keys, values in layers)
    with Ops() as ops:
        loss.backward()
    assert ops.names.count("stack") == 7  # two of each layer, and the layers
    assert not {"zeros", "new_zeros", "select_backward", "slice_backward"} & set(ops.names)


def test_a_prefix_is_read_where_it_lies():
    method = PrefixTuning(P, 3, 2, 4, projection=7)
    prefix = method()
    memory = prefix.untyped_storage().data_ptr()
    for layer in SharedState.of_tensor(prefix).layers:
        assert all(x.untyped_storage().data_ptr() == memory and x.stride(-1) == 1 for x in layer)
    model = fastprompt.accelerate(peft_model("llama", "prefix_mlp"))
    cache = model.get_prompt(batch_size=1)
    for layer, own in zip(SharedState.of_cache(cache, model.base_model.config).layers, cache.layers):
        assert layer[0].data_ptr() == own.keys.data_ptr() and layer[1].data_ptr() == own.values.data_ptr()
