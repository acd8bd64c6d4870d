"""Compiled prompts: right behind every method and layer, one file, refused by another model, exported."""

import base64
import io
import json

import pytest
import torch
import transformers as hf
from needs import cases, needs_states
from parity import METHODS, PREFIXES, P, peft_model
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from serving_models import frozen, ready
from test_mla import LATENT, NEWER
from test_mla import base as latent_model
from tiny_models import T5

import fastprompt
from benchmarks.tiny_families import families
from fastprompt import CompiledPrompt, PromptTuning, SoftPromptModel, compile_prompt
from fastprompt.hf.cache_names import cache_argument
from fastprompt.hf.fingerprint import fingerprint
from fastprompt.integrations.vllm import PromptFolder, embed_prompt, encode_prompt_embeds
from fastprompt.serving.export import prompt_embeds, save_prompt_embeds, to_peft

IDS = torch.tensor([[5, 9, 11, 20, 8, 41]])


@torch.no_grad()
def behind(compiled, base):
    """The logits of the text behind a compiled prompt, as anybody would run it."""
    cache = compiled.to_past_key_values(base)
    mask = torch.ones(1, compiled.length + IDS.shape[1], dtype=torch.int64)
    positions = {"position_ids": torch.arange(compiled.length, mask.shape[1])[None]}
    positions = positions if "position_ids" in base.forward.__code__.co_varnames else {}
    return base(input_ids=IDS, attention_mask=mask, **cache_argument(base.forward, cache), **positions).logits


@torch.no_grad()
def by_peft(model, **options):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options).logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, accelerated, tmp_path):
    model = peft_model("mistral_window", method).eval()
    task, given = (1, {"task_ids": torch.tensor([1])}) if method == "multitask" else (None, {})
    expected = by_peft(model, **given)
    if accelerated:
        fastprompt.accelerate(model)
    compiled = compile_prompt(model, task_id=task)
    compiled.save(tmp_path / "prompt.safetensors")
    loaded = CompiledPrompt.load(tmp_path / "prompt.safetensors")
    fastprompt.restore(model)
    torch.testing.assert_close(behind(loaded, model.base_model), expected, rtol=1e-4, atol=1e-5)
    assert loaded.length == P and len(loaded.layers) == 3 and loaded.layers[0].keys.shape == (P, 2, 8)
    assert (loaded.method, loaded.dtype, loaded.fingerprint) == (
        compiled.method,
        torch.float32,
        fingerprint(model.base_model),
    )
    folder = PromptFolder(tmp_path)  # vLLM's side reads the file by itself
    for (keys, values), layer in zip(folder.layers(folder.info("prompt")), loaded.layers, strict=True):
        assert keys.equal(layer.keys) and values.equal(layer.values)


HYBRIDS = ["qwen3_5_text", "lfm2", "falcon_h1", "zamba2", "mamba2"]


@pytest.mark.parametrize("name", cases(["gemma3", "gpt2", "bloom", *HYBRIDS], dict.fromkeys(HYBRIDS, needs_states)))
def test_every_kind_of_layer(name, tmp_path):
    base = frozen(name)
    model = peft_model(None, base=base).eval()
    expected = by_peft(model)
    compile_prompt(model).save(tmp_path / "prompt.safetensors")
    loaded = CompiledPrompt.load(tmp_path / "prompt.safetensors")
    torch.testing.assert_close(behind(loaded, base), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", cases(LATENT, NEWER))
def test_latent_attention(name):
    base = ready(latent_model(LATENT[name]))
    model = peft_model(None, base=base).eval()
    torch.testing.assert_close(behind(compile_prompt(model), base), by_peft(model), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("deepseek_v32" not in families(), reason="this transformers does not have DeepSeek V3.2")
def test_an_indexer_s_keys_have_no_place():
    model = peft_model(None, base=frozen("deepseek_v32")).eval()
    with pytest.raises(ValueError, match="keeps more in its cache than keys and values"):
        compile_prompt(model)


def test_one_of_several_adapters_and_prompts():
    model = peft_model("llama").eval()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    expected = by_peft(model)
    model.set_adapter("default")
    compiled = compile_prompt(model, "second")
    torch.testing.assert_close(behind(compiled, model.base_model), expected, rtol=1e-4, atol=1e-5)
    assert model.active_adapter == "default" and not model.training
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        compile_prompt(model, "nobody")
    own = SoftPromptModel(frozen("llama"), PromptTuning(3, 48, num_prompts=2, init=torch.randn(2, 3, 48)))
    with pytest.raises(ValueError, match="task_id must be one of the 2 prompts 0 to 1 of the method, got None"):
        compile_prompt(own)
    with pytest.raises(ValueError, match="adapter_name must be None"):
        compile_prompt(own, "default", task_id=1)
    with torch.no_grad():
        expected = own(input_ids=IDS, prompt_ids=[1]).logits[:, -IDS.shape[1] :]
    compiled = compile_prompt(own, task_id=1)
    torch.testing.assert_close(behind(compiled, own.release()), expected, rtol=1e-4, atol=1e-5)


def test_other_models_are_refused_by_name():
    base = frozen("llama")
    with pytest.raises(TypeError, match="model must be a PeftModel or a SoftPromptModel, got LlamaForCausalLM"):
        compile_prompt(base)
    seq2seq = hf.AutoModelForSeq2SeqLM.from_config(hf.T5Config(**T5))
    with pytest.raises(ValueError, match="model must be a decoder, got the encoder-decoder"):
        compile_prompt(SoftPromptModel(seq2seq, PromptTuning(3, 48)))
    head = hf.AutoModelForSequenceClassification.from_config(hf.LlamaConfig(**base.config.to_dict()))
    with pytest.raises(ValueError, match="model must be a causal LM, got a LlamaForSequenceClassification"):
        compile_prompt(SoftPromptModel(head, PromptTuning(3, 48)))
    with pytest.raises(TypeError, match="model must be a causal LM of PEFT's"):
        compile_prompt(peft_model(None, task_type="FEATURE_EXTRACTION", base=base))


@pytest.mark.parametrize("change", ["weight", "one number of a small one", "config", "dtype"])
def test_a_prompt_of_another_model_is_refused_with_both_fingerprints(change):
    base = frozen("llama")
    compiled = compile_prompt(peft_model(None, base=base).eval())
    before, other = compiled.fingerprint, frozen("llama")
    with torch.no_grad():
        if change == "weight":
            other.lm_head.weight.add_(1e-3)
        elif change == "one number of a small one":
            other.model.norm.weight[7] += 1e-6
        elif change == "config":
            other.config.rms_norm_eps = 1e-3
        else:
            other = other.to(torch.bfloat16)
    after = fingerprint(other)
    assert after != before == fingerprint(frozen("llama"))
    with pytest.raises(ValueError, match=f"fingerprint {before}.*this one has {after}"):
        compiled.to_past_key_values(other)


def test_the_fingerprint_does_not_depend_on_how_a_model_is_run(tmp_path):
    base = frozen("gemma3")
    before = fingerprint(base)
    model = fastprompt.accelerate(peft_model(None, base=base))
    assert fingerprint(base) == before
    fastprompt.restore(model)
    base.config.use_cache = False
    base.save_pretrained(tmp_path)
    assert fingerprint(type(base).from_pretrained(tmp_path, attn_implementation="eager")) == before


@needs_states
def test_the_file(tmp_path):
    base = frozen("qwen3_5_text")
    compile_prompt(peft_model(None, base=base).eval()).save(tmp_path / "a" / "prompt.safetensors")
    with safe_open(tmp_path / "a" / "prompt.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == {"layers.1.keys", "layers.1.values"} | {
        f"layers.{i}.{kind}_state" for i in (0, 2) for kind in ("conv", "recurrent")
    }
    expected = dict(
        format="fastprompt-compiled-prompt", version="1", method="prompt-tuning", length=str(P), dtype="float32"
    )
    assert metadata == expected | dict(fingerprint=fingerprint(base), base_model="")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["prompt.safetensors"]


def test_files_that_are_none_are_refused(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"layers.0.keys": torch.zeros(2, 1, 4)}
    with pytest.raises(FileNotFoundError, match="path must name a compiled prompt"):
        CompiledPrompt.load(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="path must name a safetensors file"):
        CompiledPrompt.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="must hold a fastprompt-compiled-prompt of version 1, got None None"):
        CompiledPrompt.load(path)
    metadata = dict(
        format="fastprompt-compiled-prompt", version="1", method="p", length="2", dtype="float32", fingerprint="f"
    )
    for wrong in (
        tensors,  # no values
        {"layers.0.keys": torch.zeros(3, 1, 4), "layers.0.values": torch.zeros(3, 1, 4)},
        {"layers.0.other": torch.zeros(2)},
    ):
        save_file(wrong, path, metadata)
        with pytest.raises(ValueError, match="must hold a whole fastprompt-compiled-prompt"):
            CompiledPrompt.load(path)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt2"])
@pytest.mark.parametrize("method", ["p_tuning_mlp", "multitask", "prefix"])
def test_any_method_as_an_adapter_of_prefix_tuning(name, method, tmp_path):
    model = peft_model(name, method).eval()
    task = 1 if method == "multitask" else None
    expected = by_peft(model, **({} if task is None else {"task_ids": torch.tensor([1])}))
    compiled, base = compile_prompt(model, task_id=task), model.base_model
    to_peft(compiled, base, tmp_path)
    as_prefix = PeftModel.from_pretrained(base, tmp_path).eval()
    assert as_prefix.active_peft_config.peft_type == "PREFIX_TUNING"
    torch.testing.assert_close(by_peft(as_prefix), expected, rtol=1e-4, atol=1e-5)


@needs_states
def test_what_a_prefix_cannot_hold_is_refused(tmp_path):
    base = frozen("qwen3_5_text")
    with pytest.raises(ValueError, match="its layers keep a recurrent or convolution state"):
        to_peft(compile_prompt(peft_model(None, base=base).eval()), base, tmp_path)
    base = ready(latent_model(LATENT["deepseek_v3"]))
    with pytest.raises(ValueError, match="its cache holds latents"):
        to_peft(compile_prompt(peft_model(None, base=base).eval()), base, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_for_other_engines(method, tmp_path):
    model = peft_model("llama", method).eval()
    task = 1 if method == "multitask" else None
    if method in PREFIXES:
        with pytest.raises(ValueError, match="the prompt must have embeddings"):
            prompt_embeds(model, task_id=task)
        return
    embeds = prompt_embeds(model, task_id=task)
    save_prompt_embeds(embeds, tmp_path / "embeds.safetensors")
    assert load_file(tmp_path / "embeds.safetensors")["prompt_embeds"].shape == (P, 48)
    request = embed_prompt(tmp_path / "embeds.safetensors", IDS[0].tolist(), model.base_model.get_input_embeddings())
    sent = torch.load(io.BytesIO(base64.b64decode(encode_prompt_embeds(request))), weights_only=True)
    expected = by_peft(model, **({} if task is None else {"task_ids": torch.tensor([1])}))
    with torch.no_grad():
        got = model.base_model(inputs_embeds=sent[None]).logits[:, P:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A model and three adapters of it, one with two tasks."""
    folder = tmp_path_factory.mktemp("adapters")
    frozen("llama").save_pretrained(folder / "model")
    for name, method in (("plain", "prompt_tuning"), ("learned", "prefix"), ("tasks", "multitask")):
        base = hf.AutoModelForCausalLM.from_pretrained(folder / "model")
        peft_model(None, method, base=base).save_pretrained(folder / name)
    return folder


def command(capsys, *arguments):
    from fastprompt.cli import main

    status, captured = main(["compile", *map(str, arguments)]), capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_the_command_compiles_several_at_once(adapters, tmp_path, capsys):
    folders = [adapters / name for name in ("plain", "learned", "tasks")]
    status, written, _ = command(capsys, "--adapter", *folders, "--output", tmp_path)
    assert status == 0
    assert [line["method"] for line in written] == ["prompt-tuning", "prefix-tuning"] + ["multitask-prompt-tuning"] * 3
    names = {"plain", "learned", "tasks.0", "tasks.1", "tasks.2"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.safetensors" for name in names}
    base = hf.AutoModelForCausalLM.from_pretrained(adapters / "model").eval()
    model = PeftModel.from_pretrained(base, adapters / "tasks").eval()
    got = behind(CompiledPrompt.load(tmp_path / "tasks.2.safetensors"), base)
    torch.testing.assert_close(got, by_peft(model, task_ids=torch.tensor([2])), rtol=1e-4, atol=1e-5)


def test_the_command_writes_one_file_and_other_formats(adapters, tmp_path, capsys):
    one = tmp_path / "one.safetensors"
    assert command(capsys, "--adapter", adapters / "tasks", "--task", "1", "--output", one)[0] == 0
    assert CompiledPrompt.load(one).length == P
    arguments = ["--adapter", adapters / "plain", "--output", tmp_path / "out", "--format"]
    assert command(capsys, *arguments, "embeds")[0] == 0 and command(capsys, *arguments, "peft")[0] == 0
    assert load_file(tmp_path / "out" / "plain.safetensors").keys() == {"prompt_embeds"}
    assert (tmp_path / "out" / "plain" / "adapter_config.json").is_file()


def test_wrong_arguments_of_the_command(adapters, tmp_path, capsys):
    (adapters / "folder.safetensors").mkdir()
    (adapters / "file").write_text("")
    for arguments, message in (
        (["--adapter", tmp_path, "--output", tmp_path], "argument --adapter:"),
        (
            ["--adapter", adapters / "plain", adapters / "learned", "--output", "o.safetensors"],
            "expected a folder for 2",
        ),
        (["--adapter", adapters / "plain", adapters / "plain", "--output", tmp_path], "several adapters would be"),
        (
            ["--adapter", adapters / "tasks", "--task", "9", "--output", tmp_path],
            "argument --task: expected one of",
        ),
        (["--adapter", adapters / "learned", "--format", "embeds", "--output", tmp_path], "and has no embeddings"),
        (["--adapter", adapters / "plain", "--model", tmp_path / "no", "--output", tmp_path], "argument --model:"),
        (["--adapter", adapters / "plain", "--output", adapters / "folder.safetensors"], "got the folder"),
        (["--adapter", adapters / "plain", "--output", adapters / "file" / "o.safetensors"], "below the file"),
        (["--adapter", adapters / "plain", "--output", adapters / "file" / "o"], "below the file"),
    ):
        status, written, error = command(capsys, *arguments)
        assert status == 2 and not written and message in error
    assert not list(tmp_path.iterdir())
