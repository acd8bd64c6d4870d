"""Samples that come packed into one row: each behind its own prompt, apart, as PEFT has them on a padded batch."""

import warnings

import pytest
import torch
from parity import METHODS, PREFIXES, P, peft_model
from tiny_models import VOCABULARY
from transformers import DataCollatorWithFlattening

import fastprompt

APART = "packed samples are kept apart, each behind its own prompt; PEFT sees one sequence"
METHODS = [name for name in METHODS if name != "cpt"]  # its labels are typed token by token


def samples(seed, count=5):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(rows, first_token=True):
    """The batch that PEFT is given; ``first_token``: has it a label, too?"""
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    if not first_token:
        labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(rows, how, first_token=True):
    ids = torch.cat(rows)[None]
    labels = ids.clone()
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0)
    if not first_token:
        labels[0, starts[:-1]] = -100
    found = {"input_ids": ids, "labels": labels}
    if how == "positions":
        found["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
    else:
        longest = max(map(len, rows))
        found |= dict(
            cu_seq_lens_q=starts.int(), cu_seq_lens_k=starts.int(), max_length_q=longest, max_length_k=longest
        )
    return found


def train_step(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_tasks(inputs, method, rows):
    return dict(inputs, task_ids=torch.arange(len(rows)) % 3) if method == "multitask" else inputs


@pytest.mark.parametrize("method", METHODS)
def test_equals_peft_on_the_padded_batch(method):
    model, drawn = peft_model("llama", method), [samples(seed) for seed in range(20)]
    first = [seed % 2 == 0 for seed in range(20)]
    hows = ["positions" if seed % 4 < 2 else "cu_seqlens" for seed in range(20)]
    plain = [train_step(model, with_tasks(padded(rows, x), method, rows)) for rows, x in zip(drawn, first)]
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match=APART):
        given = [with_tasks(packed(rows, how, x), method, rows) for rows, how, x in zip(drawn, hows, first)]
        fast = [train_step(model, inputs) for inputs in given]
    for (loss, gradients), (our_loss, ours) in zip(plain, fast, strict=True):
        torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=0)
        assert ours.keys() == gradients.keys()
        for name, expected in gradients.items():
            assert (ours[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name
    assert fastprompt.stats(model).packed == len(drawn)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_logits_stand_where_the_tokens_do(method, train):
    rows = samples(3)
    model, front = peft_model("llama", method), 0 if method == "prefix" else P
    model.train(train)
    expected = model(**padded(rows)).logits
    logits = fastprompt.accelerate(model)(**packed(rows, "positions")).logits
    assert logits.shape == (1, front + sum(map(len, rows)), VOCABULARY)
    real = torch.cat([expected[i, front : front + len(row)] for i, row in enumerate(rows)])
    torch.testing.assert_close(logits[0, front:] * 1, real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flash", [False, True])
def test_the_flattening_collator(flash):
    rows = samples(4)
    model = peft_model("llama")
    plain = train_step(model, padded(rows, first_token=False))
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_tensors="pt")
    inputs = collate([{"input_ids": row.tolist()} for row in rows])
    fast = train_step(fastprompt.accelerate(model), inputs)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=0)
    assert fastprompt.stats(model).packed == 1


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_a_row_of_one_sample_is_an_ordinary_batch(method):
    (row,) = samples(5, count=1)
    model = peft_model("llama", method)
    plain = train_step(model, padded([row]))
    fastprompt.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = train_step(model, packed([row], "cu_seqlens"))
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("starts", [[1, 9], [0, 5], [0, 7, 5, 9], [0, 4, 10]])
def test_starts_that_do_not_fit_are_named(starts):
    model = fastprompt.accelerate(peft_model("llama"))
    ids = torch.arange(3, 12)[None]
    with pytest.raises(ValueError, match="cu_seq_lens_q must rise from 0 to the 9 tokens"):
        model(input_ids=ids, labels=ids, cu_seq_lens_q=torch.tensor(starts))


@pytest.mark.parametrize("how", ["positions", "cu_seqlens"])
@pytest.mark.parametrize("method", [*METHODS, "cpt"])
def test_a_call_that_is_not_packed_keeps_samples_apart_too(method, how):
    rows = samples(6)
    model, front = peft_model("llama", method), 0 if method in PREFIXES else P
    both = [with_tasks(inputs, method, rows) for inputs in (padded(rows), packed(rows, how))]
    if method == "cpt":
        for inputs in both:
            inputs["input_type_mask"] = inputs["input_ids"].clamp(max=4)
    plain = train_step(model, both[0])
    expected = model(**both[0]).logits
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match=APART):
        output = model(**both[1], output_hidden_states=True)
    assert fastprompt.stats(model).padded
    torch.testing.assert_close(output.loss, plain[0], rtol=1e-5, atol=0)
    real = torch.cat([expected[i, front : front + len(row)] for i, row in enumerate(rows)])
    assert output.logits.shape == (1, front + len(real), VOCABULARY)
    torch.testing.assert_close(output.logits[0, front:], real, rtol=1e-4, atol=1e-5)
    if method != "cpt":  # of which PEFT has no tuples
        as_tuple = model(**both[1], output_hidden_states=True, return_dict=False)
        assert torch.equal(as_tuple[1], output.logits)
