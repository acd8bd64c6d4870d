"""fastprompt.inspect: nearest tokens, norms, similarities of every kind of soft prompt, in numbers and in pictures."""

import json
import sys

import pytest
import torch
from peft import (
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_llama import save_model, save_words
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastprompt.inspect
from fastprompt.cli import main
from fastprompt.inspect import inspect_prompt
from fastprompt.training import InputError, TrainingConfig, train

TEXT = "Word: cat dog kind: plant"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("inspect") / "model")


@pytest.fixture(scope="module")
def ids(model):
    return AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]


@pytest.fixture
def save(model, tmp_path):
    """Save an adapter of PEFT and return its folder and its model."""

    def save(config, change=None):
        torch.manual_seed(0)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        if change is not None:
            with torch.no_grad():
                change(adapted.prompt_encoder["default"])
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return str(tmp_path / "adapter"), adapted

    return save


def text_config(ids, model, **changes):
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(ids), prompt_tuning_init="TEXT", prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=model, **changes,
    )  # fmt: skip


def definition(prompt, table):
    """Ids of all tokens by their cosine to each virtual token, and that cosine, ``[P, V]``."""
    cosine = torch.nn.functional.cosine_similarity(prompt[:, None].double(), table[None].double(), dim=-1)
    return cosine.sort(descending=True)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_a_prompt_from_text_is_nearest_to_that_text(save, model, ids, chunk, monkeypatch):
    monkeypatch.setattr(fastprompt.inspect, "CHUNK", chunk)
    folder, adapted = save(text_config(ids, model))
    report = inspect_prompt(folder, top=3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert report.ids[0, :, 0].tolist() == ids
    assert [tokens[0] for tokens in report.tokens[0]] == tokenizer.convert_ids_to_tokens(ids)
    assert "".join(texts[0] for texts in report.texts[0]) == TEXT
    assert report.similarities[0, :, 0] == pytest.approx(torch.ones(len(ids)))

    table = adapted.get_input_embeddings().weight.detach()
    cosines, order = definition(table[ids], table)
    assert torch.equal(report.ids[0], order[:, :3])
    assert torch.allclose(report.similarities[0].double(), cosines[:, :3])
    assert torch.allclose(report.vocabulary_norms, table.norm(dim=1))
    assert torch.allclose(report.norms[0], table[ids].norm(dim=1))
    smaller = (table.norm(dim=1) < table[ids].norm(dim=1, keepdim=True)).double().mean(1) * 100
    assert report.percentiles[0] == pytest.approx(smaller, abs=0.5)
    assert torch.allclose(report.similarity[0].double(), definition_of_maps(table[ids]))


def definition_of_maps(rows):
    return torch.nn.functional.cosine_similarity(rows[:, None].double(), rows[None].double(), dim=-1)


CONFIGS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8),
    "cpt": CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 9, 27, 81, 243], cpt_tokens_type_mask=[1, 2, 3, 4, 1]),
    "multitask": MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_looks_at_the_prompt_that_the_model_is_given(save, config):
    def change(encoder):
        if hasattr(encoder, "delta_embedding"):
            encoder.delta_embedding.weight.normal_()

    folder, adapted = save(config, change)
    count = getattr(config, "num_tasks", 1)
    with torch.no_grad():
        prompts = adapted.get_prompt(batch_size=count, task_ids=torch.arange(count))
    report = inspect_prompt(folder)
    assert torch.allclose(report.norms, prompts.norm(dim=-1), rtol=1e-4)
    for n in range(count):
        cosines, _ = definition(prompts[n], adapted.get_input_embeddings().weight.detach())
        assert torch.allclose(report.similarities[n].double(), cosines[:, :5], atol=1e-5)
    assert report.tasks == (["task 0", "task 1", "task 2"] if count == 3 else None)


def test_vocabulary_is_what_the_embedding_module_puts_out(save, model, ids, monkeypatch):
    folder, _ = save(text_config(ids, model))
    load = fastprompt.inspect.load_base

    def scaling(*arguments):
        base = load(*arguments)
        base.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * 2)
        return base

    plain = inspect_prompt(folder)
    monkeypatch.setattr(fastprompt.inspect, "load_base", scaling)
    assert torch.allclose(inspect_prompt(folder).vocabulary_norms, 2 * plain.vocabulary_norms)


@pytest.mark.parametrize("projection", [False, True])
def test_keys_and_values_have_norms_and_no_tokens(save, projection, capsys):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection)
    folder, adapted = save(config)
    report = inspect_prompt(folder)
    with torch.no_grad():
        layers = adapted.get_prompt(batch_size=1).layers
    for name in ("key", "value"):
        states = [getattr(layer, f"{name}s")[0].transpose(0, 1) for layer in layers]  # [P, H, Dh]
        norms = torch.stack([state.norm(dim=-1).mean(1) for state in states])
        assert torch.allclose(getattr(report, f"{name}_norms"), norms)
        maps = torch.stack([definition_of_maps(state.flatten(1)) for state in states]).mean(0)
        assert torch.allclose(getattr(report, f"{name}_similarity").double(), maps, atol=1e-6)
    assert main(["inspect", "--adapter", folder]) == 0
    assert "they have no nearest tokens" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", "--adapter", folder, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert "no nearest tokens" in values["note"] and len(values["key_norms"]) == 2


@pytest.mark.parametrize("name", ["one", "many tasks", "prefix", "zero prefix"])
def test_pictures_replace_what_was_there(save, model, ids, name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    config = {
        "one": text_config(ids, model),
        "many tasks": MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=5),
    }.get(name, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    folder, _ = save(config, (lambda encoder: encoder.embedding.weight.zero_()) if name == "zero prefix" else None)
    output = tmp_path / "pictures"
    output.mkdir()
    (output / "norms.png").write_text("old")
    assert main(["inspect", "--adapter", folder, "--json", "--output", str(output)]) == 0
    pictures = json.loads(capsys.readouterr().out)["pictures"]
    expected = [output / "norms.png", output / "similarity.png"]
    assert sorted(pictures) == list(map(str, expected)) and sorted(output.iterdir()) == expected
    assert all(path.read_bytes().startswith(PNG) for path in expected)


def test_any_token_can_be_shown(save, model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    texts = ["[bold]", "$x", "\n", "漢", "\\"]
    decode = "transformers.PreTrainedTokenizerFast.decode"
    monkeypatch.setattr(decode, lambda self, ids, **_: texts[ids[0] % len(texts)])
    folder, _ = save(CONFIGS["prompt tuning"])
    assert main(["inspect", "--adapter", folder, "--top", "20", "--output", str(tmp_path / "pictures")]) == 0
    out = capsys.readouterr().out
    assert all(repr(text) in out for text in texts)


def test_a_run_names_its_tasks_and_its_model(model, tmp_path, capsys):
    data = save_words(tmp_path / "words.csv", rows=12)
    config = TrainingConfig(
        model=model, data=data, output=str(tmp_path / "run"), text_column="text", label_column="label",
        verbaliser={"A": "animal", "P": "plant"}, method="multitask", task_column="label", init="text", init_text=TEXT,
        num_virtual_tokens=4, steps=1,
    )  # fmt: skip
    train(config)
    assert inspect_prompt(config.output).tasks == ["A", "P"]
    assert main(["inspect", "--adapter", config.output, "--top", "2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [prompt["task"] for prompt in values["prompts"]] == ["A", "P"]
    token = values["prompts"][0]["virtual_tokens"][0]
    assert set(token) == {"norm", "norm_percentile", "nearest"} and len(token["nearest"]) == 2
    assert token["nearest"][0]["text"] == "Word" and token["nearest"][0]["similarity"] > 0.9
    assert values["vocabulary"]["tokens"] == 320 and values["pictures"] == []
    assert main(["inspect", "--adapter", config.output]) == 0
    out = capsys.readouterr().out
    assert "task A" in out and "task P" in out and "'Word'" in out


def test_more_tokens_than_there_are(save):
    folder, _ = save(CONFIGS["prompt tuning"])
    assert inspect_prompt(folder, top=10**6).ids.shape == (1, 5, 320)


def test_unusable_arguments_are_named(save, model, tmp_path, monkeypatch):
    def rejected(said, argument, *arguments, **options):
        with pytest.raises(InputError, match=said) as caught:
            inspect_prompt(*arguments, **options)
        assert caught.value.argument == argument

    rejected("holds no adapter_config.json", "adapter", str(tmp_path))
    folder, _ = save(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=16))
    rejected("its embeddings have 32 values, and the prompt's 16", "model", folder)
    rejected("at least 1, got 0", "top", folder, top=0)
    rejected("not a folder", "model", folder, model="./nowhere")
    folder, _ = save(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    rejected("holds a LORA adapter, which has no prompt", "adapter", folder)


def test_output_is_checked_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert main(["inspect", "--adapter", "nowhere", "--output", str(tmp_path / "file")]) == 2
    assert "--output" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(fastprompt.inspect, "find_spec", lambda name: None)
    assert main(["inspect", "--adapter", "nowhere", "--output", str(tmp_path / "new")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
