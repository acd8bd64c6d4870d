"""Heads with a loss or a signature of their own: run on packed states where that is the same, else PEFT's forward."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from parity import assert_equal, batch, peft_model, step
from tiny_models import VOCABULARY, build
from transformers.modeling_outputs import CausalLMOutputWithPast

import fastprompt

PADDED = "fastprompt runs PEFT's own padded forward: "


class OwnLoss(hf.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            logits, labels = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output.loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return output


class LossOfPadding(hf.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 0.01 * output.logits.logsumexp(-1).square().mean()
        return output


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
