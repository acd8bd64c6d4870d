"""Accelerated models in training loops: accumulation, autocast, compile, the Trainer."""

import pytest
import torch
from parity import B, assert_equal, batch, both, peft_model
from transformers import Trainer, TrainingArguments

import fastprompt


def test_gradient_accumulation_counts_items_as_peft_does():
    inputs = batch("right")
    assert_equal(*both(peft_model("llama"), dict(inputs, num_items_in_batch=37)), inputs)
    assert_equal(*both(peft_model("gemma2"), dict(inputs, num_items_in_batch=torch.tensor(37))), inputs)


def test_no_labels_at_all_gives_nan_as_peft_does():
    model, inputs = peft_model("llama"), batch("right")
    inputs["labels"][:] = -100
    assert model(**inputs).loss.isnan() and fastprompt.accelerate(model)(**inputs).loss.isnan()


def test_tuple_outputs():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    loss, logits = model(**inputs, return_dict=False)
    torch.testing.assert_close(loss, model(**inputs).loss)
    torch.testing.assert_close(logits * 1, model(**inputs).logits * 1)


def test_autocast_is_followed():
    model, inputs = peft_model("llama"), batch("right")
    with torch.autocast("cpu", torch.bfloat16):
        plain, fast = both(model, inputs)
    assert_equal(plain, fast, inputs, 2e-2, 5e-2, 5e-2)


def test_compile_gives_the_same():
    """Not one graph (the number of rows depends on the mask), but the same numbers."""
    model, inputs = peft_model("llama"), batch("right")
    plain = model(**inputs)
    plain.loss.backward()
    gradient = next(model.prompt_encoder.parameters()).grad.clone()
    model.zero_grad()
    fastprompt.accelerate(model)
    loss = torch.compile(model, backend="aot_eager")(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, plain.loss, rtol=1e-5, atol=0)
    fast = next(model.prompt_encoder.parameters()).grad
    assert (fast - gradient).norm() <= 1e-4 * gradient.norm()


def test_trainer_runs_unchanged(tmp_path):
    data = [{k: v[i] for k, v in batch("right").items()} for i in range(B)]

    def train(accelerated):
        model = peft_model("llama")
        if accelerated:
            fastprompt.accelerate(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accelerated)),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.05,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            seed=3,
            eval_strategy="steps",
            eval_steps=3,
            save_steps=3,
            disable_tqdm=True,
            gradient_checkpointing=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        return [{k: e[k] for k in ("loss", "eval_loss") if k in e} for e in trainer.state.log_history]

    for plain, fast in zip(train(False), train(True)):
        assert plain == pytest.approx(fast, rel=1e-4)
