"""What the tests of serving share: models with two prompts, mixed batches, and each row run alone."""

import torch
import transformers as hf
from tiny_hybrids import build_hybrid
from tiny_models import GEMMA3N, MODELS, build, drawn

from fastprompt.hf.prompt_state import Prompt
from fastprompt.serving.bank import PromptBank
from fastprompt.serving.compile import compiled

NEW, WIDTH = 5, 7
LENGTHS = (7, 3, 5, 1)  # tokens of the rows
PROMPTS = ("long", "short", None, "long")
SIZES = {"short": 3, "long": 9}


def frozen(name, **changes):
    """A model in evaluation mode that never ends a text by itself."""
    if name == "gemma3n":
        config = hf.Gemma3nTextConfig(
            **GEMMA3N, num_hidden_layers=4, num_kv_shared_layers=2, sliding_window=64,
            layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4, **changes,
        )  # fmt: skip
        torch.manual_seed(0)
        model = drawn(hf.Gemma3nForCausalLM(config))
    else:
        model = build(name, **changes) if name in MODELS else build_hybrid(name, **changes)
    return ready(model)


def ready(model):
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def embeddings(base):
    """The rows of the two prompts."""
    generator = torch.Generator().manual_seed(3)
    width = base.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    return {name: 0.5 * torch.randn(size, width, generator=generator) for name, size in SIZES.items()}


def bank_of(base, **options):
    bank = PromptBank(base, **options)
    for name, rows in embeddings(base).items():
        bank.add(name, compiled(base, Prompt("prompt-tuning", rows=rows), bank.fingerprint))
    return bank


def texts(padding="left", lengths=LENGTHS):
    """Ids and mask of a batch of uneven rows."""
    ids = torch.randint(3, 90, (len(lengths), WIDTH), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        if padding == "left":
            mask[row, : WIDTH - length] = 0
        elif padding == "right":
            mask[row, length:] = 0
        elif padding == "holes":
            mask[row, 1 : WIDTH - length + 1] = 0
    return ids, mask


@torch.no_grad()
def logits_alone(base, prompt, text):
    """``[n, V]``: the logits of one row by itself, prompt and text in one piece, without a cache."""
    embeds = base.get_input_embeddings()(text[None])
    if prompt is not None:
        embeds = torch.cat([embeddings(base)[prompt][None], embeds], 1)
    return base(inputs_embeds=embeds, use_cache=False).logits[0, -len(text) :]


def greedy_alone(base, prompt, text, new=NEW):
    """The most probable next tokens, one after the other."""
    for _ in range(new):
        text = torch.cat([text, logits_alone(base, prompt, text)[-1:].argmax(-1)])
    return text[-new:].tolist()


def assert_greedy(base, sequences, ids, mask, prompts=PROMPTS, new=NEW):
    """Every row goes on as it would alone, behind the text as it was given."""
    assert torch.equal(sequences[:, : ids.shape[1]], ids)
    for row, prompt in enumerate(prompts):
        expected = greedy_alone(base, prompt, ids[row, mask[row].bool()], new)
        assert sequences[row, ids.shape[1] :].tolist() == expected, f"row {row} behind {prompt}"


def assert_logits(base, output, ids, mask, prompts=PROMPTS):
    """The logits of every step are those of the row alone, whatever was drawn from them."""
    for row, prompt in enumerate(prompts):
        text = torch.cat([ids[row, mask[row].bool()], output.sequences[row, ids.shape[1] :]])
        expected = logits_alone(base, prompt, text)[-len(output.logits) - 1 : -1]
        got = torch.stack([step[row] for step in output.logits])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
