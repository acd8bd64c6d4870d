"""Several prompts in one folder: PEFT reads each of them, and no load mixes two saves."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, build

from fastprompt import SoftPromptModel
from fastprompt.methods import PrefixTuning, PromptTuning
from fastprompt.peft.checkpoint import load, save

P, D, L = 4, 48, 3
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def config():
    return build("llama").config


def bank(count, seed=0):
    return PromptTuning(P, D, count, torch.randn(count, P, D, generator=torch.Generator().manual_seed(seed)))


def folders(path):
    return sorted(x.name for x in path.iterdir() if x.is_dir())


def as_an_earlier_version(folder, method, config):
    """Several prompts as they were written before: in prompt_0, prompt_1, ..., without notes."""
    for index in range(method.num_prompts):
        save(folder / "new", PromptTuning(P, D, 1, method.prompt[[index]].detach()), config)
        target = folder / f"prompt_{index}"
        shutil.move(folder / "new", target)
        save_file(load_file(target / WEIGHTS), target / WEIGHTS, metadata={"format": "pt"})


def by_peft(folder, method, only=()):
    """What PEFT writes for the prompts of ``method``: the first in the folder, or those in ``only``."""
    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    names = ["default", *(f"prompt_{index}" for index in range(1, method.num_prompts))]
    for name, prompt in zip(names, method.prompt):
        if name != "default":
            model.add_adapter(name, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
        with torch.no_grad():
            model.prompt_encoder[name].embedding.weight.copy_(prompt)
    model.save_pretrained(folder, selected_adapters=only or names)


@pytest.mark.parametrize(
    "method", [bank(8), PrefixTuning(P, L, 2, 8, num_prompts=3, frozen_tokens=1)], ids=["prompts", "prefixes"]
)
@torch.no_grad()
def test_peft_reads_every_prompt(method, tmp_path):
    ours = SoftPromptModel(build("llama"), method).eval()
    ours.save_pretrained(tmp_path)
    assert folders(tmp_path) == [f"prompt_{index}" for index in range(1, method.num_prompts)]
    theirs = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    ids = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for index in range(method.num_prompts):
        if index:
            theirs.load_adapter(tmp_path / f"prompt_{index}", f"prompt_{index}")
            theirs.set_adapter(f"prompt_{index}")
        expected = theirs(input_ids=ids, attention_mask=mask).logits[:, -5:]
        got = ours(ids, mask, prompt_ids=[index] * 2).logits[:, -5:]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method", [bank(8), PrefixTuning(P, L, 2, 8, num_prompts=3, frozen_tokens=1)], ids=["prompts", "prefixes"]
)
def test_all_come_back(method, config, tmp_path):
    save(tmp_path, method, config)
    again = load(tmp_path)
    assert torch.equal(again(), method()) and getattr(again, "frozen_tokens", 0) == getattr(method, "frozen_tokens", 0)
    for index in range(1, method.num_prompts):  # each is an adapter of its own, too
        assert load(tmp_path / f"prompt_{index}").num_prompts == 1


@pytest.mark.parametrize("before, after", [(1, 3), (3, 1), (4, 2), (2, 2)])
def test_a_save_replaces_what_was_there(before, after, config, tmp_path):
    for count in (before, after):
        method = bank(count, seed=count)
        save(tmp_path, method, config)
    assert torch.equal(load(tmp_path).prompt, method.prompt)
    assert folders(tmp_path) == [f"prompt_{index}" for index in range(1, after)]


def test_earlier_folders_are_read_and_replaced(config, tmp_path):
    method = bank(3)
    as_an_earlier_version(tmp_path, method, config)
    assert folders(tmp_path) == ["prompt_0", "prompt_1", "prompt_2"] and not (tmp_path / CONFIG).exists()
    assert torch.equal(load(tmp_path).prompt, method.prompt)
    save(tmp_path, bank(2, seed=1), config)
    assert folders(tmp_path) == ["prompt_1"] and torch.equal(load(tmp_path).prompt, bank(2, seed=1).prompt)


def test_what_peft_wrote_again_is_read(config, tmp_path):
    save(tmp_path, bank(3), config)
    new = bank(3, seed=1)
    by_peft(tmp_path, new, only=["prompt_2"])
    assert torch.equal(load(tmp_path).prompt, torch.cat([bank(3).prompt[:2], new.prompt[2:]]))
    by_peft(tmp_path, new)
    assert torch.equal(load(tmp_path).prompt, new.prompt)


def test_an_adapter_in_front_of_other_prompts_is_not_taken_for_one_of_them(config, tmp_path):
    save(tmp_path / "new", bank(3), config)
    by_peft(tmp_path / "new", bank(1, seed=1))
    with pytest.raises(ValueError, match="must hold the prompts of one save, got .*prompt_1 of another"):
        load(tmp_path / "new")
    as_an_earlier_version(tmp_path / "old", bank(3), config)
    by_peft(tmp_path / "old", bank(1, seed=1))
    assert torch.equal(load(tmp_path / "old").prompt, bank(1, seed=1).prompt)


def test_a_prompt_that_is_missing_or_of_another_save_is_named(config, tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        save(tmp_path / name, bank(3, seed), config)
    shutil.copytree(tmp_path / "other" / "prompt_1", tmp_path / "one" / "prompt_1", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="got .*one.prompt_1 of another: a save was interrupted"):
        load(tmp_path / "one")
    shutil.rmtree(tmp_path / "other" / "prompt_2")
    with pytest.raises(ValueError, match="got .*other.prompt_2 of another"):
        load(tmp_path / "other")


BEFORE = {
    "nothing": lambda folder, config: None,
    "one prompt": lambda folder, config: save(folder, bank(1), config),
    "prompts": lambda folder, config: save(folder, bank(3), config),
    "more prompts": lambda folder, config: save(folder, bank(5), config),
    "an earlier version's": lambda folder, config: as_an_earlier_version(folder, bank(3), config),
    "PEFT's": lambda folder, config: by_peft(folder, bank(3)),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("before", BEFORE)
def test_an_interrupted_save_is_never_misread(before, count, config, tmp_path, monkeypatch):
    """Wherever it stops, the folder gives the prompts from before, or the new ones, or an error."""
    new, outcomes = bank(count, seed=9), []
    rename = os.replace
    for stop in range(100):
        folder = tmp_path / str(stop)
        folder.mkdir()
        BEFORE[before](folder, config)
        old = load(folder).prompt if before != "nothing" else None
        left = iter(range(stop))

        def rename_or_stop(*paths, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            rename(*paths)

        monkeypatch.setattr(os, "replace", rename_or_stop)
        try:
            save(folder, new, config)
            complete = True
        except KeyboardInterrupt:
            complete = False
        monkeypatch.setattr(os, "replace", rename)
        try:
            found = load(folder).prompt
            assert any(x is not None and torch.equal(found, x) for x in (old, new.prompt)), f"stopped after {stop}"
            outcomes.append(torch.equal(found, new.prompt))
        except (ValueError, FileNotFoundError):
            outcomes.append(None)
        if complete:
            break
    assert complete and outcomes[-1] and json.loads((folder / CONFIG).read_text())["num_virtual_tokens"] == P
    assert len(outcomes) == 2 * count + 1 and outcomes[0] is (None if before == "nothing" else False)
