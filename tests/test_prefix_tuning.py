"""Prefix-Tuning against PEFT's encoders with the same parameters, and its starting values."""

import pytest
import torch
from method_sizes import COMMON, DH, HEADS, L, P, backward
from peft import CartridgeConfig, PrefixTuningConfig
from peft.tuners.cartridge import CartridgeEncoder
from peft.tuners.prefix_tuning import PrefixEncoder

from fastprompt.methods import PrefixTuning


def peft_prefix(projection=None, init=None):
    return PrefixEncoder(
        PrefixTuningConfig(
            token_dim=HEADS * DH,
            num_attention_heads=HEADS,
            prefix_projection=projection is not None,
            encoder_hidden_size=projection,
            init_weights=init,
            **COMMON,
        )
    )


def keys_and_values(flat, layer, prompt=0):
    """``[P, Hkv, Dh]`` twice, cut out of PEFT's flat prefix value by value."""
    cells = flat[prompt].reshape(P, L * 2, HEADS, DH)
    return cells[:, 2 * layer], cells[:, 2 * layer + 1]


def test_prefix_is_peft_s_layout_and_a_view():
    torch.manual_seed(0)
    method = PrefixTuning(P, L, HEADS, DH, num_prompts=2)
    out = method()
    assert out.shape == (L, 2, 2, P, HEADS, DH)
    assert out._base is method.prefix and out.data_ptr() == method.prefix.data_ptr()
    for layer in range(L):
        for prompt in range(2):
            keys, values = keys_and_values(method.prefix, layer, prompt)
            assert torch.equal(out[layer, 0, prompt], keys) and torch.equal(out[layer, 1, prompt], values)
    grads = backward(method, out)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(keys_and_values(grads["prefix"], 1, 1)[0], weight[1, 0, 1])


@pytest.mark.parametrize("init", [None, "zero"])
def test_projected_prefix_equals_peft_s_encoder(init):
    torch.manual_seed(0)
    theirs = peft_prefix(projection=6, init=init)
    torch.manual_seed(0)
    ours = PrefixTuning(P, L, HEADS, DH, projection=6, init=init)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    expected, got = theirs(torch.arange(P)), ours()
    torch.testing.assert_close(got.permute(2, 3, 0, 1, 4, 5).flatten(2)[0], expected)
    assert got.any() == (init is None)
    expected = backward(theirs, expected.reshape(P, L, 2, HEADS, DH).permute(1, 2, 0, 3, 4)[:, :, None])
    for name, grad in backward(ours, got).items():
        torch.testing.assert_close(grad, expected[name])


def test_prefix_starts_as_peft_s():
    torch.manual_seed(0)
    theirs = peft_prefix().embedding.weight
    torch.manual_seed(0)
    assert torch.equal(PrefixTuning(P, L, HEADS, DH).prefix[0], theirs)
    assert not PrefixTuning(P, L, HEADS, DH, init="zero").prefix.any()


def test_prefix_from_keys_and_values():
    bank = torch.randn(L, 2, 2, P, HEADS, DH, dtype=torch.float64)
    method = PrefixTuning(P, L, HEADS, DH, num_prompts=2, init=bank)
    assert method.prefix.dtype == torch.float32 and torch.equal(method(), bank.float())
    one = PrefixTuning(P, L, HEADS, DH, num_prompts=2, init=bank[:, :, 1])
    assert torch.equal(one(), bank[:, :, [1, 1]].float())
    with torch.no_grad():
        one.prefix[0] += 1
    assert torch.equal(one()[:, :, 1], bank[:, :, 1].float())  # the prompts of a bank are apart


def test_frozen_tokens_equal_peft_s_cartridge():
    torch.manual_seed(0)
    config = CartridgeConfig(token_dim=HEADS * DH, num_attention_heads=HEADS, num_frozen_tokens=2, **COMMON)
    theirs = CartridgeEncoder(config)
    init = theirs.weight.detach().reshape(P, L, 2, HEADS, DH).permute(1, 2, 0, 3, 4)
    ours = PrefixTuning(P, L, HEADS, DH, init=init, frozen_tokens=2)
    assert torch.equal(ours()[:, :, 0], init)
    assert [n for n, _ in ours.named_parameters()] == ["prefix"] and ours.prefix.shape == (1, P - 2, L * 2 * HEADS * DH)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.5)
    ours().square().sum().backward()
    optimizer.step()
    assert torch.equal(ours()[:, :, 0, :2], init[:, :, :2]) and not (ours()[:, :, 0, 2:] == init[:, :, 2:]).any()
    out = theirs(torch.zeros(1, P)).reshape(P, L, 2, HEADS, DH).permute(1, 2, 0, 3, 4)[:, :, None]
    expected = backward(theirs, out)
    assert torch.equal(backward(ours, ours())["prefix"][0], expected["trainable_embedding"])


def test_prefix_layers():
    assert PrefixTuning(P, L, HEADS, DH).layers == (0, 1, 2)
    assert PrefixTuning(P, L, HEADS, DH, layers=[0, 2, 5]).layers == (0, 2, 5)
