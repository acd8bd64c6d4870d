"""Gated MLPs that save less: the same output and gradients, fewer bytes, no trace afterwards, and no other MLPs."""

import pickle

import pytest
import torch
import transformers as hf
from parity import batch, peft_model
from tiny_models import GEMMA3N, VOCABULARY, build
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMLP
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaMlp
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaMLP

import fastprompt
from fastprompt.hf.mlp import GATED_MLPS


def kept_bytes(model, inputs):
    """What autograd saves in a forward, each storage once, the parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**inputs).loss
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    loss.backward()
    return total


def test_a_step_keeps_less():
    inputs = batch("right")
    model = fastprompt.accelerate(peft_model("llama"))
    rows = 5 + int(inputs["attention_mask"].sum()) - len(inputs["labels"])  # no label depends on a last token
    less = kept_bytes(model, inputs)
    for module in model.base_model.modules():
        if isinstance(module, LlamaMLP):
            vars(module).pop("forward", None)
    more = kept_bytes(model, inputs)
    assert more - less == 3 * rows * 80 * 4  # of 3 layers the activation, 80 wide


def test_nothing_is_left_behind():
    model, inputs = peft_model("llama"), batch("right")
    mlp = model.base_model.model.layers[0].mlp
    fastprompt.accelerate(model)
    assert "forward" in vars(mlp)
    x = torch.randn(2, 3, 48)
    assert torch.equal(mlp(x), type(mlp).forward(mlp, x))
    fastprompt.restore(model)
    assert "forward" not in vars(mlp)
    model.base_model.model.layers[0].mlp.act_fn = torch.nn.Identity()  # another MLP than its class has elsewhere
    plain = model(**inputs).loss
    torch.testing.assert_close(fastprompt.accelerate(model)(**inputs).loss, plain)


def test_an_mlp_with_its_own_forward_is_left_alone():
    base = build("llama")
    mlp = base.model.layers[1].mlp

    def own(x):
        return 2 * type(mlp).forward(mlp, x)

    mlp.forward = own
    model, inputs = peft_model(None, base=base), batch("right")
    plain = model(**inputs).loss
    torch.testing.assert_close(fastprompt.accelerate(model)(**inputs).loss, plain)
    fastprompt.restore(model)
    assert mlp.forward is own


# Which MLPs are patched.


class Plain(nn.Module):
    def __init__(self, act_fn=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(Plain):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """With a docstring, annotations and another order."""
        return self.down_proj(self.up_proj(hidden_states) * self.act_fn(self.gate_proj(hidden_states)))


class OtherNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3, self.act = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.GELU()

    def forward(self, x):
        y = self.act(self.w1(x)) * self.w3(x)
        return self.w2(y)


class DropsAround(Plain):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Limited(Plain):
    limit = 0.1

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x)).clamp(max=self.limit)
        return self.down_proj(gate * self.up_proj(x))


class GateTwice(Plain):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.gate_proj(x))


class UpActivated(Plain):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.act_fn(self.gate_proj(x)))


class Scaled(Plain):
    def forward(self, x, scale=2.0):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * scale


class Counting(Plain):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Louder(nn.SiLU):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class WithDropout(nn.SiLU):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(super().forward(x))


def from_config(kind, **changes):
    text = dict(vocab_size=VOCABULARY, hidden_size=6, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    return kind(hf.LlamaConfig(**text, **changes))


def llama4():
    return Llama4TextMLP(hf.Llama4TextConfig(hidden_size=6, intermediate_size=8))


def with_hook():
    mlp = Plain()
    mlp.act_fn.register_forward_hook(lambda module, inputs, output: 2 * output)
    return mlp


def with_own_activation_forward():
    mlp = Plain()
    mlp.act_fn.forward = torch.relu
    return mlp


def without_source():
    """A class that no file holds the source of, as in a notebook or a compiled package."""
    scope = {}
    exec(
        "def forward(self, x):\n    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\n    return y",
        scope,
    )
    return type("Compiled", (Plain,), {"forward": scope["forward"]})()


PATCHED = {
    "Llama": lambda: from_config(LlamaMLP),
    "Gemma": lambda: from_config(GemmaMLP, hidden_act="gelu_pytorch_tanh"),
    "Llama 4": llama4,
    "RecurrentGemma": lambda: RecurrentGemmaMlp(hf.RecurrentGemmaConfig(hidden_size=6, intermediate_size=16)),
    "up first": UpFirst,
    "other names": OtherNames,
    "without source": without_source,
    **{
        f"act {name}": lambda name=name: Plain(ACT2FN[name])
        for name in ("gelu", "quick_gelu", "relu2", "swish", "linear")
    },
    "act function": lambda: Plain(nn.functional.silu),
}
LEFT_ALONE = {
    "SeedOss": lambda: SeedOssMLP(hf.SeedOssConfig(hidden_size=6, intermediate_size=8, residual_dropout=0.5)),
    "T5Gemma": lambda: T5GemmaMLP(hf.T5GemmaConfig().decoder),
    "drops around its parent": DropsAround,
    "limit": Limited,
    "gate twice": GateTwice,
    "up activated": UpActivated,
    "scaled": Scaled,
    "counts its calls": Counting,
    "activation of another kind in training": lambda: Plain(Louder()),
    "activation with dropout": lambda: Plain(WithDropout()),
    "activation in place": lambda: Plain(nn.SiLU(inplace=True)),
    "activation in a sequence": lambda: Plain(nn.Sequential(nn.SiLU(), nn.Dropout(0.5))),
    "activation with a parameter": lambda: Plain(nn.PReLU()),
    "activation that is random": lambda: Plain(nn.RReLU()),
    "activation along a row": lambda: Plain(nn.Softmax(-1)),
    "activation with a hook": with_hook,
    "activation with a forward of its own": with_own_activation_forward,
    "activation by a lambda": lambda: Plain(lambda x: x / x.norm()),
}


@pytest.mark.parametrize("name", PATCHED)
def test_a_plain_gated_mlp_is_patched_and_gives_the_same(name):
    torch.manual_seed(0)
    mlp, x = PATCHED[name](), torch.randn(2, 3, 6)
    results = []
    for patched in (False, True):
        if patched:
            GATED_MLPS.apply(mlp)
        assert GATED_MLPS.is_on(mlp) == patched
        leaf = x.clone().requires_grad_()
        output = mlp(leaf)
        output.sum().backward()
        results.append((output.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    GATED_MLPS.undo(mlp)
    assert "forward" not in vars(mlp)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_any_other_mlp_is_left_alone(name):
    mlp = LEFT_ALONE[name]()
    for mode in (True, False):
        GATED_MLPS.apply(mlp.train(mode))
        assert not GATED_MLPS.is_on(mlp)


def test_layers_of_one_class_are_looked_at_one_by_one():
    base = build("llama")
    base.model.layers[1].mlp.act_fn = WithDropout()
    base.model.layers[2].mlp.act_fn = nn.GELU()
    GATED_MLPS.apply(base)
    assert [GATED_MLPS.is_on(layer.mlp) for layer in base.model.layers] == [True, False, True]


def test_sparsity_by_layer_is_left_alone():
    config = hf.Gemma3nTextConfig(
        **GEMMA3N,
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.5, 0.0],
        layer_types=["full_attention"] * 2,
    )
    base = hf.AutoModelForCausalLM.from_config(config)
    GATED_MLPS.apply(base)
    assert not any(GATED_MLPS.is_on(module) for module in base.modules())


def test_what_changes_after_the_patch_is_seen(monkeypatch):
    mlp, x = Plain(), torch.randn(2, 6)
    GATED_MLPS.apply(mlp)
    seen = []
    mlp.act_fn.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    mlp(x).sum().backward()
    assert seen == [True]  # once, as part of the graph
    mlp.act_fn = WithDropout()
    assert (mlp.act_fn(mlp.gate_proj(x)) == 0).any() and GATED_MLPS.is_on(mlp)
    torch.manual_seed(3)
    dropped = mlp(x)
    torch.manual_seed(3)
    assert torch.equal(dropped, Plain.forward(mlp, x))
    monkeypatch.setattr(Plain, "forward", lambda self, x: x)
    assert mlp(x) is x


def test_projections_of_two_dtypes_are_multiplied_as_before():
    mlp, x = Plain(), torch.randn(2, 6)
    mlp.gate_proj.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    plain = mlp(x)
    GATED_MLPS.apply(mlp)
    assert GATED_MLPS.is_on(mlp) and torch.equal(mlp(x), plain)


def test_a_pickled_mlp_comes_back_unpatched():
    mlp, x = Plain(), torch.randn(2, 6)
    GATED_MLPS.apply(mlp)
    loaded = pickle.loads(pickle.dumps(mlp))
    assert not GATED_MLPS.is_on(loaded) and torch.equal(loaded(x), mlp(x))
    GATED_MLPS.apply(loaded)
    assert GATED_MLPS.is_on(loaded)


def test_dropout_in_a_model_s_mlps_stays():
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80
    )
    config = hf.SeedOssConfig(**sizes, num_key_value_heads=2, head_dim=8, attention_dropout=0.0, residual_dropout=0.5)
    base = hf.AutoModelForCausalLM.from_config(config)
    fastprompt.accelerate(peft_model(None, base=base))
    mlp = base.train().model.layers[0].mlp
    assert (mlp(torch.randn(1, 4, 48)) == 0).any()
