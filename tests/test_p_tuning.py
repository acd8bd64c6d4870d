"""P-Tuning against PEFT's encoder with the same parameters, and its cached output."""

import copy
import pickle

import pytest
import torch
from method_sizes import COMMON, HEADS, D, P, backward
from peft import PromptEncoder, PromptEncoderConfig
from torch import nn

from fastprompt.methods import PTuning


def peft_encoder(encoder, hidden=7, num_layers=2, dropout=0.0):
    return PromptEncoder(
        PromptEncoderConfig(
            token_dim=D,
            num_attention_heads=HEADS,
            encoder_reparameterization_type=encoder.upper(),
            encoder_hidden_size=hidden,
            encoder_num_layers=num_layers,
            encoder_dropout=dropout,
            **COMMON,
        )
    )


ENCODERS = [("lstm", 7, 2), ("lstm", 12, 1), ("lstm", 4, 3), ("mlp", 7, 2)]


@pytest.mark.parametrize("encoder, hidden, num_layers", ENCODERS)
def test_p_tuning_equals_peft_s_encoder(encoder, hidden, num_layers):
    torch.manual_seed(0)
    theirs = peft_encoder(encoder, hidden, num_layers)
    torch.manual_seed(0)
    ours = PTuning(P, D, encoder=encoder, hidden_size=hidden, num_layers=num_layers)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    expected, got = theirs(torch.arange(P)), ours()
    assert got.shape == (P, D)
    torch.testing.assert_close(got, expected)
    expected = backward(theirs, expected)
    for name, grad in backward(ours, got).items():
        torch.testing.assert_close(grad, expected[name])
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(), theirs.eval()(torch.arange(P)))


def test_p_tuning_drops_in_training_only():
    method = PTuning(P, D, dropout=0.5)
    assert not torch.equal(method(), method())
    torch.manual_seed(0)
    first = method()
    torch.manual_seed(0)
    assert torch.equal(method(), first)
    assert torch.equal(method.eval()(), method.train().encode())


def test_p_tuning_without_an_encoder_is_its_embedding():
    init = torch.randn(P, D)
    method = PTuning(P, D, encoder=None, init=init)
    assert method() is method.embedding.weight and torch.equal(method(), init)
    assert len(list(method.parameters())) == 1


@pytest.fixture
def cached():
    """A method in evaluation mode that has its output cached."""
    torch.manual_seed(0)
    method = PTuning(P, D, hidden_size=3).eval()
    with torch.no_grad():
        assert method() is method()
    return method


def write_weight(method, write):
    with torch.no_grad():
        write(method.mlp_head[0].weight)


def fused_step(method):
    """A training step in evaluation mode, with a look at the prompt before its backward and after it."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1, fused=True)  # counts no version up
    prompt = method()
    with torch.no_grad():
        method()
    prompt.sum().backward()
    with torch.no_grad():
        method()
    optimizer.step()
    optimizer.zero_grad()


CHANGES = {
    "in place": lambda m: write_weight(m, lambda w: w.add_(1)),
    "one element": lambda m: write_weight(m, lambda w: w[0, 0].fill_(9)),
    "lstm": lambda m: nn.init.zeros_(m.lstm_head.bias_hh_l1_reverse),
    "embedding": lambda m: nn.init.zeros_(m.embedding.weight),
    "data replaced": lambda m: setattr(m.embedding.weight, "data", torch.zeros(P, D)),
    "parameter replaced": lambda m: setattr(m.embedding, "weight", nn.Parameter(torch.zeros(P, D))),
    "load_state_dict": lambda m: m.load_state_dict(PTuning(P, D, hidden_size=3).state_dict()),
    "load_state_dict assign": lambda m: m.load_state_dict(PTuning(P, D, hidden_size=3).state_dict(), assign=True),
    "cast and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "double": lambda m: m.double(),
    "data and eval": lambda m: (m.embedding.weight.data.zero_(), m.eval()),
    "data and a part of a model": lambda m: (m.embedding.weight.data.zero_(), nn.Sequential(m).eval()),
    "fused optimizer": fused_step,
}


@pytest.mark.parametrize("change", CHANGES)
def test_cached_output_is_never_stale(cached, change):
    with torch.no_grad():
        before = cached().clone()
        with torch.enable_grad():
            CHANGES[change](cached)
        got = cached()
        assert torch.equal(got, cached.encode()) and not torch.equal(got.float(), before)
        assert cached() is got


def test_memory_given_to_another_tensor_is_not_taken_for_the_parameter():
    method = PTuning(500, D, encoder="mlp").eval()
    with torch.no_grad():
        before, weight = method(), method.embedding.weight
        address = weight.data_ptr()
        weight.data = torch.empty(0)
        taken = [torch.zeros(500, D) for _ in range(100)]  # an allocator soon hands out again what was set free
        weight.data = next((x for x in taken if x.data_ptr() == address), taken[0])
        assert torch.equal(method(), method.encode()) and not torch.equal(method(), before)


def test_a_caller_s_write_on_the_output_stays_his_own(cached):
    with torch.no_grad():
        cached().zero_()
        assert torch.equal(cached(), cached.encode()) and cached().any()


def test_cached_output_has_the_dtype_autocast_asks_for(cached):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert cached().dtype == cached.encode().dtype == torch.bfloat16
    with torch.no_grad():
        assert cached().dtype == torch.float32


def test_nothing_is_cached_where_a_gradient_is_wanted(cached):
    assert cached().requires_grad and cached() is not cached()
    cached.train()
    with torch.no_grad():
        assert cached() is not cached()


def test_output_cached_in_inference_mode_serves_a_gradient_later(cached):
    cached.eval()
    with torch.inference_mode():
        inside = cached()
    with torch.no_grad():
        assert cached() is inside
    scale = torch.ones((), requires_grad=True)
    (inside * scale).sum().backward()
    torch.testing.assert_close(scale.grad, inside.sum())


def test_the_cache_is_not_pickled(cached):
    pickled = pickle.dumps(cached)
    cached.eval()
    assert len(pickled) == len(pickle.dumps(cached))
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickled)(), cached())


def test_a_copy_has_a_cache_of_its_own(cached):
    other = copy.deepcopy(cached)
    with torch.no_grad():
        for a, b in zip(cached.parameters(), other.parameters()):
            while b._version < a._version:  # a copy counts from 0 again
                b.add_(1)
        assert torch.equal(other(), other.encode()) and torch.equal(cached(), cached.encode())
        assert not torch.equal(other(), cached())


@pytest.mark.parametrize("encoder", ["lstm", "mlp", None])
@pytest.mark.parametrize("training", [True, False])
def test_p_tuning_compiles_whole(encoder, training):
    method = PTuning(P, D, encoder=encoder).train(training)
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(), method())
    if training:
        compiled().sum().backward()
        assert all(p.grad.any() for p in method.parameters())
