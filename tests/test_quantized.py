"""Frozen models in 4 and 8 bits by bitsandbytes: packed, with the loss and the gradient that PEFT gives."""

from importlib.util import find_spec

import peft
import pytest
import torch
from parity import batch, peft_model
from tiny_models import build
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastprompt
from fastprompt import PrefixTuning, PromptTuning, SoftPromptModel

pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is installed on Linux"),
    pytest.mark.filterwarnings("ignore:fastprompt runs the model's own padded forward. the model was released"),
]

BITS = {
    "4 bits": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "4 bits, scales quantised too": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
METHODS = ["prompt_tuning", "prefix"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("llama", hidden_size=64, num_attention_heads=4, intermediate_size=128).save_pretrained(path)
    return path


def quantised(folder, bits):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BITS[bits](), dtype=torch.float32, device_map="cpu"
    )


def train_step(model, inputs):
    model.zero_grad()
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(fast, plain, bits=None):
    """8 bits are those of activations, too: rounded to 1/254, as to bf16, where the last bit of fp32 may decide."""
    loss, gradient = (2e-3, 5e-2) if bits == "8 bits" else (1e-5, 1e-4)
    torch.testing.assert_close(fast[0], plain[0], rtol=loss, atol=0)
    assert plain[1] and fast[1].keys() == plain[1].keys()
    for name, expected in plain[1].items():
        assert (fast[1][name] - expected).norm() <= gradient * expected.norm(), name


@pytest.mark.parametrize("prepared", [False, True], ids=["as loaded", "prepared for k bits"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_a_step_is_peft_s(bits, method, prepared, folder):
    """Before anything else runs: evaluating 4 bits repacks them on some CPUs, and PEFT then has no gradient."""
    base = quantised(folder, bits)
    if prepared:  # PEFT's prefixes do not work with checkpointing
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=method != "prefix")
    model, inputs = peft_model("llama", method, base=base), batch("right")
    plain = train_step(model, inputs)
    assert_same_step(train_step(fastprompt.accelerate(model), inputs), plain, bits)
    found = fastprompt.stats(model)
    assert found.packed == 1 and found.padded == {}, found


@pytest.mark.parametrize("method", [PromptTuning(5, 64), PrefixTuning(5, 3, 2, 16)])
@pytest.mark.parametrize("bits", BITS)
def test_without_peft_s_wrapper(bits, method, folder):
    inputs, steps = batch("right"), []
    for released in (False, True):
        model = SoftPromptModel(quantised(folder, bits), method)
        if released:  # the model's own padded forward
            model.release().requires_grad_(False)
        steps.append(train_step(model, inputs))
        assert fastprompt.stats(model).packed == (not released)
    assert_same_step(*steps, bits)


def test_an_evaluation_is_peft_s(folder):
    model, inputs = peft_model("llama", base=quantised(folder, "8 bits")).eval(), batch("right")
    with torch.no_grad():
        plain = model(**inputs)
        fast = fastprompt.accelerate(model)(**inputs)
    torch.testing.assert_close(fast.loss, plain.loss, rtol=2e-3, atol=0)
    assert fast.logits.shape == plain.logits.shape and fastprompt.stats(model).packed == 1
