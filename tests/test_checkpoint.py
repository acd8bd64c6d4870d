"""Checkpoints: PEFT reads what we write and gives the same logits, and we read what PEFT writes."""

import json

import pytest
import torch
import transformers as hf
from needs import needs
from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny_models import GEMMA4_E, VOCABULARY, build
from transformers import AutoModelForCausalLM, DynamicCache

from fastprompt.methods import MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning
from fastprompt.peft.checkpoint import load, save

P, D, L, B, S = 4, 48, 3, 2, 5
SHAPES = {"llama": (2, 8), "gpt2": (6, 8), "qwen3": (2, 8)}  # key/value heads and their width


def ids():
    return torch.randint(0, VOCABULARY, (B, S), generator=torch.Generator().manual_seed(5))


def by_hand(base, method, index=0, tasks=None):
    """The base model's own logits ``[B, S, V]`` of the text behind prompt ``index`` (or behind each row's task)."""
    base = base.eval()
    mask = torch.ones(B, P + S, dtype=torch.int64)
    if isinstance(method, PrefixTuning):
        cache = DynamicCache(config=base.config)
        for layer, prefix in zip(method.layers, method()[:, :, index]):
            cache.update(*prefix.transpose(1, 2)[:, None].expand(-1, B, -1, -1, -1), layer)
        return base(ids(), attention_mask=mask, past_key_values=cache).logits
    prompts = method().unflatten(0, (-1, P))[[index] * B if tasks is None else tasks]
    return base(inputs_embeds=torch.cat([prompts, base.get_input_embeddings()(ids())], 1)).logits[:, P:]


def by_peft(folder, name="llama", **inputs):
    """Logits ``[B, S, V]`` of PEFT's model with the adapter in ``folder``."""
    model = PeftModel.from_pretrained(build(name), folder).eval()
    return model(ids(), attention_mask=torch.ones(B, S, dtype=torch.int64), labels=None, **inputs).logits[:, -S:]


def prefix(name="llama", **options):
    return PrefixTuning(P, L, *SHAPES[name], **options)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


PEFT_FILES = ["adapter_config.json", "adapter_model.safetensors"]

METHODS = {
    "prompt": lambda name: PromptTuning(P, D),
    "lstm": lambda name: PTuning(P, D, hidden_size=7, num_layers=1),
    "lstm with dropout": lambda name: PTuning(P, D, hidden_size=7, dropout=0.5),
    "mlp": lambda name: PTuning(P, D, encoder="mlp", hidden_size=9),
    "no encoder": lambda name: PTuning(P, D, encoder=None),
    "prefix": lambda name: prefix(name),
    "projected prefix": lambda name: prefix(name, projection=6),
    "frozen prefix": lambda name: prefix(name, frozen_tokens=1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", METHODS)
@torch.no_grad()
def test_peft_gives_the_same_logits_from_what_we_wrote(tmp_path, kind, name):
    torch.manual_seed(0)
    method, base = METHODS[kind](name), build(name)
    save(tmp_path, method, base.config)
    again = load(tmp_path)
    assert type(again) is type(method) and list(again.state_dict()) == list(method.state_dict())
    for ours, read in zip(method.state_dict().values(), again.state_dict().values()):
        assert torch.equal(ours, read)
    for attribute in ("encoder", "hidden_size", "num_layers", "dropout", "projection", "frozen_tokens"):
        if kind != "no encoder":
            assert getattr(again, attribute, None) == getattr(method, attribute, None)
    expected = by_hand(base, method.eval())
    torch.testing.assert_close(by_peft(tmp_path, name), expected, rtol=1e-4, atol=1e-4)
    assert (by_hand(base, METHODS[kind](name).eval()) - expected).abs().max() > 1e-2  # another prompt, other logits


@torch.no_grad()
def test_peft_gives_the_same_logits_for_every_task(tmp_path):
    method, base = MultitaskPromptTuning(P, D, 3, num_ranks=2), build("llama")
    for parameter in method.parameters():
        parameter.normal_()
    save(tmp_path, method, base.config)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names == {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}
    again = load(tmp_path)
    for ours, read in zip(method.parameters(), again.parameters()):
        assert torch.equal(ours, read)
    tasks = torch.tensor([2, 0])
    expected = by_hand(base, method, tasks=tasks)
    torch.testing.assert_close(by_peft(tmp_path, task_ids=tasks), expected, rtol=1e-4, atol=1e-4)


def peft_config(kind):
    common = dict(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=P)
    return {
        "prompt": lambda: PromptTuningConfig(**common),
        "lstm": lambda: PromptEncoderConfig(encoder_reparameterization_type="LSTM", encoder_hidden_size=7, **common),
        "mlp": lambda: PromptEncoderConfig(encoder_hidden_size=7, **common),
        "prefix": lambda: PrefixTuningConfig(**common),
        "projected prefix": lambda: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=6, **common),
        "frozen prefix": lambda: CartridgeConfig(num_frozen_tokens=2, **common),
        "multitask": lambda: MultitaskPromptTuningConfig(num_tasks=3, num_ranks=2, **common),
        "cpt": lambda: CPTConfig(cpt_token_ids=[3, 9, 27, 81], task_type=TaskType.CAUSAL_LM),
    }[kind]()


@pytest.mark.parametrize(
    "kind, method",
    [
        ("prompt", PromptTuning),
        ("lstm", PTuning),
        ("mlp", PTuning),
        ("prefix", PrefixTuning),
        ("projected prefix", PrefixTuning),
        ("frozen prefix", PrefixTuning),
        ("multitask", MultitaskPromptTuning),
        ("cpt", PromptTuning),
    ],
)
@torch.no_grad()
def test_we_give_the_same_logits_from_what_peft_wrote(tmp_path, kind, method):
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), peft_config(kind)).eval()
    if kind == "cpt":
        model.prompt_encoder["default"].delta_embedding.weight.normal_()
    model.save_pretrained(tmp_path)
    got = load(tmp_path)
    assert type(got) is method and all(p.requires_grad and p.dtype == torch.float32 for p in got.parameters())
    extra = {"task_ids": torch.tensor([1, 1])} if kind == "multitask" else {}
    mask = torch.ones(B, S, dtype=torch.int64)
    expected = model(ids(), attention_mask=mask, labels=None, **extra).logits[:, -S:]
    got_logits = by_hand(build("llama"), got, index=1 if kind == "multitask" else 0)
    torch.testing.assert_close(got_logits, expected, rtol=1e-4, atol=1e-4)
    written = load_file(tmp_path / "adapter_model.safetensors")
    save(tmp_path / "back", got, build("llama").config)
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert set(back) == set(written) and all(torch.equal(back[name], x) for name, x in written.items())
    assert got.num_virtual_tokens == P and getattr(got, "frozen_tokens", 0) == (2 if kind == "frozen prefix" else 0)


@pytest.mark.parametrize(
    "kind, make",
    [
        ("prompt", lambda: PromptTuning(P, D)),
        ("lstm", lambda: PTuning(P, D, hidden_size=7)),
        ("mlp", lambda: PTuning(P, D, encoder="mlp", hidden_size=7)),
        ("prefix", lambda: prefix()),
        ("projected prefix", lambda: prefix(projection=6)),
        ("frozen prefix", lambda: prefix(frozen_tokens=2)),
        ("multitask", lambda: MultitaskPromptTuning(P, D, 3, num_ranks=2)),
    ],
)
def test_the_config_is_the_one_peft_writes(tmp_path, kind, make):
    get_peft_model(build("llama"), peft_config(kind)).save_pretrained(tmp_path / "peft")
    save(tmp_path / "ours", make(), build("llama").config)
    ours, theirs = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft"))
    theirs["base_model_name_or_path"] = theirs["base_model_name_or_path"] or None  # PEFT 0.20 writes "" for no name
    differ = {n: (ours.get(n), theirs.get(n)) for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)}
    assert differ == {}
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "peft"))
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}


@pytest.mark.parametrize("make", [lambda: PTuning(P, D, hidden_size=7), lambda: prefix(projection=6)])
def test_an_encoder_is_kept_beside_peft_s_files_and_trains_on(tmp_path, make):
    method, config = make(), build("llama").config
    save(tmp_path, method, config)
    assert files(tmp_path) == [*PEFT_FILES, "encoder.safetensors"]
    again = load(tmp_path)
    for one in (method, again):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
        one().square().sum().backward()
        optimizer.step()
    assert torch.equal(again(), method())


@pytest.mark.parametrize("make", [lambda: PTuning(P, D, hidden_size=7), lambda: prefix(projection=6)])
def test_an_encoder_of_another_prompt_is_left_out(tmp_path, make):
    """PEFT loads the adapter, trains it and saves it again beside our encoder, which is out of date from then on."""
    method, config = make(), build("llama").config
    save(tmp_path, method, config)
    model = PeftModel.from_pretrained(build("llama"), tmp_path)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.add_(1)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="encoder.safetensors gives another prompt than adapter_model.safetensors has"):
        got = load(tmp_path)
    assert len(list(got.parameters())) == 1
    torch.testing.assert_close(got(), method() + 1)
    save(tmp_path, got, config)
    assert "encoder.safetensors" not in files(tmp_path)


def test_saving_draws_no_dropout(tmp_path):
    method = PTuning(P, D, dropout=0.5).train()
    save(tmp_path, method, build("llama").config)
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], method.eval()())
    assert method.train().training


def test_low_precision_is_kept(tmp_path):
    method = prefix(projection=6).bfloat16()
    save(tmp_path, method, build("llama").config)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].dtype == torch.bfloat16
    assert torch.equal(load(tmp_path).embedding.weight, method.embedding.weight.float())


def sharing_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(hf.Gemma4TextConfig(**GEMMA4_E))


@needs("transformers", "5.5", "has no Gemma 4")
@pytest.mark.parametrize("projection", [None, 6])
@pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers")
@torch.no_grad()
def test_layers_without_keys_of_their_own(tmp_path, projection):
    """PEFT's format has room for every layer; only those with a prefix come back."""
    base, method = sharing_model(), PrefixTuning(P, 2, 2, 8, projection=projection)
    save(tmp_path, method, base.config)
    flat = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].reshape(P, 4, 2, 2, 8)
    assert torch.equal(flat[:, :2].permute(1, 2, 0, 3, 4), method()[:, :, 0]) and not flat[:, 2:].any()
    again = load(tmp_path)
    assert again.layers == (0, 1) and again.projection == projection and torch.equal(again(), method())
    one = load(tmp_path, layers=[1])
    assert one.layers == (1,) and torch.equal(one(), method()[1:])
    model = PeftModel.from_pretrained(sharing_model(), tmp_path).eval()
    got = model(ids(), attention_mask=torch.ones(B, S, dtype=torch.int64)).logits
    torch.testing.assert_close(got, by_hand(base, method), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"method must have prefixes for the model's layers \[0, 1\], got \[0, 1, 2\]"):
        save(tmp_path, prefix(), base.config)


def test_layers_of_what_peft_wrote(tmp_path):
    get_peft_model(build("llama"), peft_config("prefix")).save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, layers=[0, 1])(), load(tmp_path)()[:2])
    with pytest.raises(ValueError, match=r"layers must be among those of the adapter, \[0, 1, 2\], got \[3\]"):
        load(tmp_path, layers=[3])


def save_as_peft(folder, config, count):
    get_peft_model(build("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=count)).save_pretrained(folder)


def test_errors_say_what_is_wrong(tmp_path):
    config = build("llama").config
    with pytest.raises(FileNotFoundError, match="directory must hold adapter_config.json"):
        load(tmp_path)
    with pytest.raises(TypeError, match="method must be a PromptTuning, .* got Linear"):
        save(tmp_path, torch.nn.Linear(1, 1), config)
    with pytest.raises(ValueError, match=r"method must have prefixes for the model's layers \[0, 1, 2\], got \[0, 2\]"):
        save(tmp_path, PrefixTuning(P, 2, 2, 8, layers=[0, 2]), config)
    assert files(tmp_path) == []
    for index, count in ((0, P), (1, P + 1)):
        save_as_peft(tmp_path / f"prompt_{index}", PromptTuningConfig, count)
    with pytest.raises(ValueError, match="must hold prompts of one method and shape, got .*'PROMPT_TUNING', 5, 48"):
        load(tmp_path)
    for index in range(2):
        save_as_peft(tmp_path / f"prompt_{index}", PromptEncoderConfig, P)
    with pytest.raises(ValueError, match="must hold one P_TUNING adapter, got 2"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"layers must be None for a P_TUNING adapter, got \[0\]"):
        load(tmp_path / "prompt_0", layers=[0])
    get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="must hold a PROMPT_TUNING adapter, got LORA"):
        load(tmp_path / "lora")
    save(tmp_path / "seq", PromptTuning(2 * P, D), config)
    path = tmp_path / "seq" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_transformer_submodules": 2}))
    with pytest.raises(ValueError, match="must hold an adapter of a decoder, got one of an encoder-decoder"):
        load(tmp_path / "seq")
