"""TRL's trainers with their default settings: the same losses, metrics and adapter as with PEFT, all calls packed."""

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")  # noqa: E402

import peft  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny_llama import ANIMALS, PLANTS, save_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import fastprompt  # noqa: E402
from fastprompt.peft.renamed_cache import right_generation  # noqa: E402

METHODS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    found = AutoTokenizer.from_pretrained(folder)
    found.pad_token = found.eos_token
    return found


def rows():
    words = [(word, kind) for kind, those in (("animal", ANIMALS), ("plant", PLANTS)) for word in those]
    return [(f"Word: {' '.join([word] * (1 + i % 4))} kind:", f" {kind}") for i, (word, kind) in enumerate(words * 4)]


def model_of(folder, method):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    return peft.get_peft_model(base, METHODS[method]())


def arguments(kind, tmp_path, batch=4, **changes):
    return kind(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        learning_rate=0.05,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        seed=3,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **changes,
    )


def run(trainer):
    """Every line of the log, and the adapter."""
    torch.manual_seed(5)
    with right_generation(trainer.model):  # GRPO samples its completions
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    adapter = peft.get_peft_model_state_dict(trainer.accelerator.unwrap_model(trainer.model))
    return lines, {name: value.clone() for name, value in adapter.items()}


def assert_same(plain, fast):
    (lines, adapter), (our_lines, our_adapter) = plain, fast
    assert len(lines) == len(our_lines) == STEPS
    for line, ours in zip(lines, our_lines):
        # The share of positive margins is not told where these are roundings; they are compared themselves.
        for name in line.keys() - {"step_time", "rewards/accuracies"}:
            value = line[name]
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert adapter.keys() == our_adapter.keys()
    for name, value in adapter.items():
        torch.testing.assert_close(our_adapter[name], value, rtol=2e-3, atol=2e-4)


def assert_all_packed(model):
    found = fastprompt.stats(model)
    assert found.packed >= STEPS and found.padded == {}, found


def assert_trains_alike(trainer, folder, method, plain=None):
    """Trainers that ``trainer(model)`` makes do the same with PEFT (there ``plain(model)``) and packed."""
    expected = run((plain or trainer)(model_of(folder, method)))
    model = fastprompt.accelerate(model_of(folder, method))
    assert_same(expected, run(trainer(model)))
    assert_all_packed(model)


@pytest.mark.parametrize("method, checkpointing", [*((method, True) for method in METHODS), ("prefix tuning", False)])
def test_sft(method, checkpointing, folder, tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows()])

    def trainer(model, checkpointing=checkpointing):
        options = {} if checkpointing else {"gradient_checkpointing": False}  # TRL switches it on
        return trl.SFTTrainer(
            model, arguments(trl.SFTConfig, tmp_path, **options), train_dataset=data, processing_class=tokenizer
        )

    plain_checkpoints = checkpointing and method != "prefix tuning"  # PEFT's prefixes do not work with it
    assert_trains_alike(trainer, folder, method, plain=lambda model: trainer(model, plain_checkpoints))


def other(answer):
    return " plant" if answer == " animal" else " animal"


@pytest.mark.parametrize("method", METHODS)
def test_dpo(method, folder, tokenizer, tmp_path):
    data = [{"prompt": prompt, "chosen": answer, "rejected": other(answer)} for prompt, answer in rows()]

    def trainer(model):
        options = arguments(trl.DPOConfig, tmp_path, gradient_checkpointing=False)
        return trl.DPOTrainer(model, args=options, train_dataset=Dataset.from_list(data), processing_class=tokenizer)

    assert_trains_alike(trainer, folder, method)


@pytest.mark.parametrize("method", METHODS)
def test_kto(method, folder, tokenizer, tmp_path):
    data = [
        {"prompt": prompt, "completion": answer if i % 2 else other(answer), "label": bool(i % 2)}
        for i, (prompt, answer) in enumerate(rows())
    ]

    def trainer(model):
        options = arguments(trl.KTOConfig, tmp_path, gradient_checkpointing=False)
        return trl.KTOTrainer(model, args=options, train_dataset=Dataset.from_list(data), processing_class=tokenizer)

    assert_trains_alike(trainer, folder, method)


@pytest.mark.parametrize("method", METHODS)
def test_grpo(method, folder, tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": prompt} for prompt, _ in rows()])

    def reward(completions, **kwargs):
        return [float(len(set(completion))) for completion in completions]

    def trainer(model):
        options = arguments(
            trl.GRPOConfig, tmp_path, gradient_checkpointing=False, num_generations=2, max_completion_length=6
        )
        return trl.GRPOTrainer(model, reward_funcs=reward, args=options, train_dataset=data, processing_class=tokenizer)

    assert_trains_alike(trainer, folder, method)


def test_an_adapter_that_the_trainer_makes(folder, tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows()])

    def trainer():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(1)
        return trl.SFTTrainer(
            base,
            arguments(trl.SFTConfig, tmp_path),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=METHODS["prompt tuning"](),
        )

    plain, fast = trainer(), trainer()
    fastprompt.accelerate(fast.model)
    assert_same(run(plain), run(fast))
    assert_all_packed(fast.model)


@pytest.mark.parametrize("method", METHODS)
def test_sft_without_padding_is_sft_with_padding(method, folder, tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows()])

    def trainer(model, padding_free=True):
        options = arguments(
            trl.SFTConfig, tmp_path, gradient_checkpointing=False, max_length=None, padding_free=padding_free
        )
        return trl.SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer)

    with pytest.warns(UserWarning, match="packed samples are kept apart"):
        assert_trains_alike(trainer, folder, method, plain=lambda model: trainer(model, padding_free=False))


@pytest.mark.parametrize("method", METHODS)
def test_sft_with_packing_keeps_samples_apart(method, folder, tokenizer, tmp_path):
    """The first loss is that of all samples in the batch, one by one."""
    data = Dataset.from_list([{"text": prompt + answer} for prompt, answer in rows()])
    model = fastprompt.accelerate(model_of(folder, method))
    reference = model_of(folder, method)
    options = arguments(trl.SFTConfig, tmp_path, gradient_checkpointing=False, packing=True, max_length=32)
    trainer = trl.SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    lines, _ = run(trainer)
    batch = seen[0]
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 5
    total, count = 0.0, 0
    for start, end in zip(starts, starts[1:]):
        ids, labels = batch["input_ids"][:, start:end], batch["labels"][:, start:end]
        if (labels != -100).any():
            logits = reference(input_ids=ids).logits[:, -(end - start) :][:, :-1].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()
            count += int((labels[:, 1:] != -100).sum())
    assert lines[0]["loss"] == pytest.approx(total / count, rel=1e-4)
    assert_all_packed(model)


def lora_of(folder):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))


def dpo(model, data, tokenizer, tmp_path):
    options = arguments(trl.DPOConfig, tmp_path, gradient_checkpointing=False)
    return trl.DPOTrainer(model, args=options, train_dataset=Dataset.from_list(data), processing_class=tokenizer)


def grpo(model, data, tokenizer, tmp_path):
    options = arguments(
        trl.GRPOConfig, tmp_path, gradient_checkpointing=False, num_generations=4, max_completion_length=6,
        batch=8,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in data])
    reward = lambda completions, **kwargs: [float(len(set(x))) for x in completions]  # noqa: E731
    return trl.GRPOTrainer(model, reward_funcs=reward, args=options, train_dataset=prompts, processing_class=tokenizer)


@pytest.mark.parametrize("make", [dpo, grpo])
@pytest.mark.parametrize("method", ["lora", "prompt tuning"])
def test_groups_run_their_prompt_once(make, method, folder, tokenizer, tmp_path):
    """Pairs of DPO and completions of GRPO are trees of rows, behind a prompt and without."""
    data = [{"prompt": prompt * 2, "chosen": answer, "rejected": other(answer)} for prompt, answer in rows()]
    if method == "lora":
        plain, fast = lora_of(folder), fastprompt.share_prefixes(lora_of(folder))
    else:
        plain, fast = model_of(folder, method), fastprompt.accelerate(model_of(folder, method))
    assert_same(run(make(plain, data, tokenizer, tmp_path)), run(make(fast, data, tokenizer, tmp_path)))
    assert_all_packed(fast)
    assert fastprompt.stats(fast).rows < 0.7 * fastprompt.stats(fast).rows_padded
