"""A frozen model of which Accelerate keeps a layer on the disk: asked without a trace, and packed."""

import torch
from parity import batch, peft_model
from test_quantized import assert_same_step, train_step
from tiny_models import build
from transformers import AutoModelForCausalLM

import fastprompt


def test_a_layer_on_the_disk(tmp_path):
    build("llama").save_pretrained(tmp_path)
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"], "cpu")
    places |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=str(tmp_path / "disk"), dtype=torch.float32
    )
    model, inputs = peft_model("llama", base=base), batch("right")
    assert next(base.model.layers[1].parameters()).device.type == "meta"
    plain = train_step(model, inputs)
    fastprompt.accelerate(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_step(train_step(model, inputs), plain)
    assert fastprompt.stats(model).packed == 1
