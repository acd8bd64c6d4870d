"""Batches whose samples come packed into one row, as flattening collators and TRL make them.

Where one begins is told by ``cu_seq_lens_q``, or by positions that start again. PEFT knows neither, and takes them for
one long sequence behind one prompt.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..hf.cache_names import CACHE_NAMES
from ..hf.request import tokens_of

# What says where the samples stand.
OF_SAMPLES = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
TOLD = "fastprompt: packed samples are kept apart, each behind its own prompt; PEFT sees one sequence"

# What has a value for each token, and the value at padding.
_PADDING = {
    "input_ids": 0,
    "inputs_embeds": 0.0,
    "labels": -100,
    "attention_mask": 0,
    "token_type_ids": 0,
    "input_type_mask": 0,
}


def cu_seqlens_of(given: dict[str, Any]) -> torch.Tensor | None:
    """``[samples + 1]`` on the CPU: where the samples of a call begin and end; None if they are one, or not packed.

    Raises:
        ValueError: ``cu_seq_lens_q`` does not fit the tokens.
    """
    tokens = tokens_of(given)
    if tokens is None or len(tokens) != 1:
        return None
    positions, starts, length = given.get("position_ids"), given.get("cu_seq_lens_q"), tokens.shape[1]
    if starts is not None:
        starts = starts.reshape(-1).cpu()
        if int(starts[0]) != 0 or int(starts[-1]) != length or bool((starts.diff() < 0).any()):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {length} tokens, got {starts.tolist()}")
    elif positions is not None and positions.numel() == length:
        positions = positions.reshape(-1).cpu()
        begins = (positions.diff() != 1).nonzero().flatten() + 1
        if bool((positions[begins] != positions[0]).any()):  # they leave some out, and do not start again
            return None
        starts = torch.cat([begins.new_zeros(1), begins, begins.new_full((1,), length)])
    return None if starts is None or len(starts) == 2 else starts


def padded(given: dict[str, Any], cu_seqlens: torch.Tensor) -> dict[str, Any]:
    """The arguments of a call with a row for each sample, padded on the right."""
    tokens: Any = tokens_of(given)
    given = {name: x for name, x in given.items() if name not in OF_SAMPLES}
    if given.get("attention_mask") is None:
        given["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    lengths = cu_seqlens.diff().tolist()
    for name, value in _PADDING.items():
        if given.get(name) is not None:
            given[name] = pad_sequence(given[name][0].split(lengths), batch_first=True, padding_value=value)
    return given


def in_one_row(output: Any, cu_seqlens: torch.Tensor, num_virtual_tokens: int) -> Any:
    """The output of a :func:`padded` call with its logits as the samples came: ``[1, P + T, V]``."""

    def flat(logits):
        front = logits[:1, :num_virtual_tokens]
        rows = zip(logits[:, num_virtual_tokens:], pairwise(cu_seqlens.tolist()))
        return torch.cat([front, torch.cat([row[: end - start] for row, (start, end) in rows])[None]], 1)

    if isinstance(output, tuple):
        return tuple(flat(x) if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in output)
    output.logits = flat(output.logits)
    for name in CACHE_NAMES:
        if output.get(name) is not None:
            output[name] = None
    return output
