"""nn.DataParallel: nothing to it on one device, refused on several, where it would run copies in threads."""

import copy
from importlib import import_module

import pytest
import torch
from parity import batch, peft_model
from tiny_models import build

import fastprompt
from fastprompt import PromptTuning, SoftPromptModel, patch_attention, unpatch_attention

# torch.nn.parallel.replicate by name is the function.
replicate = import_module("torch.nn.parallel.replicate")


@pytest.fixture
def replicate_twice(monkeypatch):
    """What nn.DataParallel does before a forward on two devices, with parameters that stay where they are."""
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach: [tensors] * 2)
    return lambda model: replicate.replicate(model, [0, 1])


def patched():
    model = build("llama")
    patch_attention(model)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastprompt.accelerate(peft_model("llama")),
        lambda: copy.deepcopy(fastprompt.accelerate(peft_model("llama", "prefix"))),
        lambda: SoftPromptModel(build("llama"), PromptTuning(5, 48)),
        patched,
    ],
    ids=["accelerated", "a copy of one", "SoftPromptModel", "patch_attention"],
)
def test_several_devices_are_refused(make, replicate_twice):
    with pytest.raises(NotImplementedError, match="nn.DataParallel cannot copy .* torchrun"):
        replicate_twice(make())


@pytest.mark.filterwarnings("ignore:fastprompt runs PEFT's own padded forward")
def test_a_model_that_is_never_packed_is_refused_too(replicate_twice):
    with pytest.raises(NotImplementedError, match="nn.DataParallel cannot copy"):
        replicate_twice(fastprompt.accelerate(peft_model("openai_gpt")))


def test_a_model_that_was_given_back_is_copied(replicate_twice):
    model = fastprompt.restore(fastprompt.accelerate(peft_model("llama")))
    assert len(replicate_twice(model)) == 2
    base = SoftPromptModel(build("llama"), PromptTuning(5, 48)).release()
    assert len(replicate_twice(base)) == 2
    base = patched()
    unpatch_attention(base)
    assert len(replicate_twice(base)) == 2


def test_one_device_is_the_model_itself():
    model, inputs = peft_model("llama"), batch("right")
    plain = model(**inputs).loss
    wrapped = torch.nn.DataParallel(fastprompt.accelerate(model))
    torch.testing.assert_close(wrapped(**inputs).loss, plain, rtol=1e-5, atol=0)
    assert fastprompt.stats(wrapped).packed == 1
