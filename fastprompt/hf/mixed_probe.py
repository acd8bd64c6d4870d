"""Does a model give, in a mixed batch, what it gives for each row alone? Asked before the first request."""

from contextlib import nullcontext

import torch
from transformers import GenerationConfig, PreTrainedModel

from .abilities import reason_of
from .attachment import evaluation_mode
from .masks import AsBefore, running
from .mixed import NO_PROMPT, Mixed
from .per_layer import searching_part
from .precision import WideArithmetic
from .prompt_cache import fill, virtual_columns
from .prompt_state import PromptState, cache_of_all_tokens
from .structure import why_not_given

_NEW = 2  # tokens: one behind the prefill, one behind a decoding step


def mixed_model(base: PreTrainedModel) -> Mixed:
    """A model whose rows stand behind prompts of their own.

    Three short rows behind two prompts and none are generated from in one batch, and run alone; in arithmetic in which
    rounding is no excuse.

    Raises:
        NotImplementedError: they differ, or the model cannot be run so; with the reason.
    """
    if (reason := why_not_given(base)) is not None:
        raise NotImplementedError(f"a {type(base).__name__} cannot run rows behind compiled prompts: {reason}")
    with torch.no_grad(), evaluation_mode(base), running(AsBefore()):
        try:
            reason, mixed = _ask(base, WideArithmetic(base))
        except Exception:  # kernels that know their own dtypes only; then the model's arithmetic has to do
            try:
                reason, mixed = _ask(base, None)
            except Exception as error:  # a model can fail in any way on a cache that it did not fill
                reason, mixed = reason_of(base, error), None
    if reason is not None or mixed is None:
        raise NotImplementedError(f"a {type(base).__name__} cannot run rows behind compiled prompts: {reason}")
    return mixed


def _ask(base, wide):
    with wide or nullcontext():
        table = base.get_input_embeddings()
        vocabulary = min(table.weight.shape[0], base.config.get_text_config().vocab_size)
        ids = (torch.arange(12, device=table.weight.device).view(3, 4) * 7 + 3) % vocabulary
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]], device=ids.device)
        prompts = [table(ids.flip(0)[0, :3]), None, table(ids[1, 2:])]
        mixed = Mixed(base, _needs_ids(base, table, ids))
        rows = [NO_PROMPT if prompt is None else PromptState.of_rows(base, prompt) for prompt in prompts]
        asked = GenerationConfig(
            max_new_tokens=_NEW,
            min_new_tokens=_NEW,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            repetition_penalty=1.0,
            pad_token_id=0,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        output = mixed.generate(rows, ids, mask, generation_config=asked)
        worst = 0.0
        for row, prompt in enumerate(prompts):
            text = torch.cat([ids[row, mask[row].bool()], output.sequences[row, ids.shape[1] : -1]])[None]
            expected = _alone(mixed, table, prompt, rows[row], text)[0, -_NEW:].float()
            got = torch.stack([step[row] for step in output.logits]).float()
            worst = max(worst, float(((got - expected).abs().amax(-1) / expected.abs().amax(-1)).max()))
    allowed = 1e-5 if wide is not None and wide.exact else max(16 * torch.finfo(base.dtype).eps, 1e-4)
    if not worst <= allowed:
        return f"a row's output depends on the batch it stands in (relative difference {worst:.1e})", None
    return None, mixed


def _alone(mixed, table, prompt, state, text):
    """The logits of a row, run by itself in one piece as far as the model lets us."""
    if mixed.needs_ids:
        cache = fill(cache_of_all_tokens(mixed.base.config), [state])
        mask = torch.cat([virtual_columns([state], text.device), torch.ones_like(text)], 1)
        return mixed.forward(cache, text, mask)
    embeds = table(text)
    if prompt is not None:
        embeds = torch.cat([prompt[None], embeds], 1)
    return mixed.base(inputs_embeds=embeds, use_cache=False, return_dict=True).logits


def _needs_ids(base, table, ids):
    """Does the model look more up by token id than embeddings?"""
    if searching_part(base) is not None:
        return True
    try:
        by_id = base(input_ids=ids, use_cache=False, return_dict=True).logits
        by_embedding = base(inputs_embeds=table(ids), use_cache=False, return_dict=True).logits
    except Exception:  # it does not take both kinds of input
        return True
    return float((by_id - by_embedding).abs().max()) > 1e-3 * float(by_id.abs().max())
