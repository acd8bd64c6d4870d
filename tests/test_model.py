"""SoftPromptModel: forward on every kind of batch, checkpoints in both directions with PEFT, generation."""

import json

import pytest
import torch
from parity import B, P, S, batch, peft_model
from peft import PeftModel, get_peft_model
from tiny_models import build

from fastprompt import PromptTuning, SoftPromptModel
from fastprompt.layout import CannotPack
from fastprompt.peft.renamed_cache import right_generation


def soft_prompt_model(name="llama", num_prompts=1, **changes):
    """The prompt of ``peft_model(name)`` as prompt 0 of a bank."""
    init = next(peft_model(name, **changes).prompt_encoder.parameters()).detach()
    bank = torch.stack([init * (1 + 0.5 * i) for i in range(num_prompts)])
    return SoftPromptModel(build(name, **changes), PromptTuning(P, init.shape[1], num_prompts, bank)).train()


def loss_and_gradient(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), model.method.prompt.grad.clone()


def assert_close(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
    assert (got[1] - expected[1]).norm() <= tolerance * expected[1].norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "openai_gpt"])
@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.filterwarnings("ignore:fastprompt runs the model's own padded forward")
def test_same_loss_gradient_and_logits_as_peft(name, padding):
    inputs = batch(padding)
    plain = peft_model(name)
    loss = plain(**inputs).loss
    loss.backward()
    model = soft_prompt_model(name)
    assert_close(
        loss_and_gradient(model, **inputs), (loss.detach(), next(plain.prompt_encoder.parameters()).grad[None])
    )
    real = (
        torch.ones(B, P + S, dtype=torch.bool)
        if padding == "none"
        else torch.cat([torch.ones(B, P), inputs["attention_mask"]], 1).bool()
    )
    del inputs["labels"]
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(**inputs).logits[real], plain.eval()(**inputs).logits[real], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "openai_gpt"])
@pytest.mark.filterwarnings("ignore:fastprompt runs the model's own padded forward")
def test_a_batch_of_several_prompts_is_the_sum_of_its_rows(name):
    model, inputs, ids = soft_prompt_model(name, num_prompts=4), batch("right"), torch.tensor([3, 0, 3, 1])
    count = int((inputs["labels"] != -100).sum())
    together = loss_and_gradient(model, **inputs, prompt_ids=ids)
    model.zero_grad()
    total = 0
    for row in range(B):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        loss = model(**one, prompt_ids=ids[row : row + 1], num_items_in_batch=count).loss
        loss.backward()
        total += loss.detach()
    assert_close(together, (total, model.method.prompt.grad))
    assert not together[1][2].any()  # nobody asked for prompt 2


def test_packed_input_equals_the_padded_batch():
    model, inputs = soft_prompt_model(num_prompts=2), batch("right")
    ids, real = torch.tensor([1, 0, 0, 1]), inputs["attention_mask"].bool()
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)])
    packed = dict(input_ids=inputs["input_ids"][real][None], labels=inputs["labels"][real][None], cu_seqlens=cu)
    padded = loss_and_gradient(model, **inputs, prompt_ids=ids)
    assert_close(loss_and_gradient(model, **packed, prompt_ids=ids), padded)
    model.eval()
    logits = model(**inputs, prompt_ids=ids).logits
    torch.testing.assert_close(model(**packed, prompt_ids=ids).logits, logits)


def test_packed_input_needs_a_model_that_packs():
    with pytest.warns(UserWarning, match="fastprompt runs the model's own padded forward"):
        model = soft_prompt_model("openai_gpt")
    with pytest.raises(CannotPack, match="cu_seqlens needs packed rows, but"):
        model(torch.zeros(1, 4, dtype=torch.int64), cu_seqlens=[0, 4])


@pytest.mark.parametrize("name", ["llama", "openai_gpt"])
@pytest.mark.filterwarnings("ignore:fastprompt runs the model's own padded forward")
def test_virtual_tokens_inside_a_template(name):
    """Against the model's own forward on embeddings put together by hand."""
    model, inputs = soft_prompt_model(name), batch("right")
    virtual = torch.full((B, S), -1)
    virtual[0, [0, 2, 3]] = torch.tensor([0, 1, 2])
    virtual[1, [1, 3]] = torch.tensor([4, 0])
    got = loss_and_gradient(model, **inputs, virtual_tokens=virtual)
    leaf = model.method.prompt.detach().clone().requires_grad_()
    embeds = model.base.get_input_embeddings()(inputs["input_ids"])
    embeds = torch.where((virtual >= 0)[..., None], leaf[0][virtual.clamp(min=0)], embeds)
    loss = build(name)(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).loss
    loss.backward()
    assert_close(got, (loss.detach(), leaf.grad))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs = soft_prompt_model(), batch("right")
    plain = loss_and_gradient(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(loss_and_gradient(model, **inputs), plain)


def test_checkpoints_are_peft_s_in_both_directions(tmp_path):
    inputs = batch("right")
    plain = peft_model("llama")
    plain.save_pretrained(tmp_path / "peft")
    ours = SoftPromptModel.from_pretrained(build("llama"), tmp_path / "peft")
    assert torch.equal(ours.method.prompt[0], next(plain.prompt_encoder.parameters()))
    ours.save_pretrained(tmp_path / "ours")
    back = PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    torch.testing.assert_close(back.eval()(**inputs).loss, plain.eval()(**inputs).loss)
    names = {p.name for p in (tmp_path / "ours").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    ours_config, theirs = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft"))
    for key in ("peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"):
        assert ours_config[key] == theirs[key]


def test_a_bank_is_saved_as_several_adapters(tmp_path):
    model = soft_prompt_model(num_prompts=3)
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(again.method.prompt, model.method.prompt)
    one = PeftModel.from_pretrained(build("llama"), tmp_path / "prompt_2")
    assert torch.equal(next(one.prompt_encoder.parameters()), model.method.prompt[2])


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="directory must hold adapter_config.json"):
        SoftPromptModel.from_pretrained(build("llama"), tmp_path)
    from peft import LoraConfig

    get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a PROMPT_TUNING adapter, got LORA"):
        SoftPromptModel.from_pretrained(build("llama"), tmp_path)


def test_generation_equals_peft_s_and_mixes_prompts():
    ids = batch("none")["input_ids"][:3]
    options = dict(max_new_tokens=6, do_sample=False)
    model = soft_prompt_model(num_prompts=2)
    theirs = peft_model("llama").eval()
    with right_generation(theirs):
        expected = theirs.generate(input_ids=ids, **options)
    assert torch.equal(model.eval().generate(ids, **options), expected)
    mixed = model.generate(ids, prompt_ids=torch.tensor([1, 0, 1]), **options)
    assert torch.equal(mixed[1], expected[1])
    alone = model.generate(ids[:1], prompt_ids=torch.tensor([1]), **options)
    assert torch.equal(mixed[:1], alone)


@pytest.mark.parametrize("start", ["random", "text", "vocabulary"])
def test_initial_prompts(start):
    embedding = build("llama").get_input_embeddings()
    if start == "random":
        method = PromptTuning(3, 48, 2)
    elif start == "text":
        method = PromptTuning.from_text([5, 9], embedding, 3, 2)
        assert torch.equal(method.prompt[1], embedding.weight[[5, 9, 5]])
    else:
        method = PromptTuning.from_vocabulary(embedding, 3, 2, torch.Generator().manual_seed(0))
        assert all((embedding.weight == row).all(1).any() for row in method().detach())
    assert method.prompt.shape == (2, 3, 48) and method().shape == (6, 48)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PromptTuning(0, 48), "num_virtual_tokens must be an int >= 1, got 0"),
        (
            lambda: PromptTuning(3, 48, init=torch.zeros(3, 47)),
            r"init must have shape \[1, 3, 48\] or \[3, 48\], got \[3, 47\]",
        ),
        (
            lambda: PromptTuning.from_text([], build("llama").get_input_embeddings(), 3),
            "token_ids must hold at least one token",
        ),
        (lambda: SoftPromptModel(build("llama"), PromptTuning(3, 40)), "method must produce prompts of width 48"),
        (
            lambda: soft_prompt_model()(batch("right")["input_ids"], prompt_ids=torch.tensor([0, 0, 1, 0])),
            r"prompt_ids must lie in \[0, 1\), got values from 0 to 1",
        ),
        (lambda: soft_prompt_model()(), "exactly one of input_ids and inputs_embeds must be given"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
