"""Heads with a loss or a signature of their own: run on packed states where that is the same, else PEFT's forward."""

import warnings

import pytest
import torch
import transformers as hf
from parity import assert_equal, batch, peft_model, step
from tiny_models import VOCABULARY, build
from tiny_pairs import both_pairs, pair_batch, pair_model
from transformers.modeling_outputs import CausalLMOutputWithPast

import fastprompt
from benchmarks.integrations.loops import LossOfPadding, OwnLoss

PADDED = "fastprompt runs PEFT's own padded forward: "


class NoLogitsToKeep(hf.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, **kwargs):  # fmt: skip
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=VOCABULARY)
        return CausalLMOutputWithPast(logits=logits, loss=loss, past_key_values=outputs.past_key_values)


@pytest.mark.parametrize(
    "kind, items, reason",
    [
        (OwnLoss, None, None),
        (OwnLoss, 7, None),
        (LossOfPadding, None, "LossOfPadding computes a loss of its own"),
        (NoLogitsToKeep, None, None),
        (NoLogitsToKeep, 7, None),  # it does not look at their number
    ],
)
def test_heads_with_a_loss_or_a_signature_of_their_own(kind, items, reason):
    torch.manual_seed(0)
    base = kind(build("llama").config)
    model, inputs = peft_model(None, base=base), batch("right")
    if items is not None:
        inputs["num_items_in_batch"] = items
    plain = step(model, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = step(fastprompt.accelerate(model), inputs)
    assert_equal(plain, fast, inputs)
    assert {str(w.message).removeprefix(PADDED) for w in caught if PADDED in str(w.message)} == {reason} - {None}


def test_a_batch_of_an_encoder_decoder_without_labels():
    model, inputs = pair_model("t5"), pair_batch()
    inputs["labels"].fill_(-100)
    plain, fast = both_pairs(model, inputs)
    assert plain[0].isnan() and fast[0].isnan()
