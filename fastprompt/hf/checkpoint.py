"""Prompt checkpoints in PEFT's adapter format: adapter_config.json and adapter_model.safetensors."""

import itertools
import os
import tempfile
from pathlib import Path

import torch
from peft import PeftConfig, PeftType, PromptTuningConfig
from peft.utils import load_peft_weights
from safetensors.torch import save_file

from ..methods import PromptTuning

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(directory, method, config):
    """Write a method's prompts so that ``PeftModel.from_pretrained`` reads them.

    One prompt goes into ``directory`` itself; several go into its subfolders ``prompt_0``, ``prompt_1``, ... as PEFT
    writes several adapters. Each file is written aside and renamed, so a reader never meets half of one.

    Args:
        directory: made if it is not there.
        method: a :class:`PromptTuning`.
        config: the base model's config.
    """
    directory, text = Path(directory), config.get_text_config()
    for index, prompt in enumerate(method.prompt.detach().cpu()):
        folder = directory if method.num_prompts == 1 else directory / f"prompt_{index}"
        folder.mkdir(parents=True, exist_ok=True)
        peft_config = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=prompt.shape[0], token_dim=prompt.shape[1], num_transformer_submodules=1,
            num_attention_heads=text.num_attention_heads, num_layers=text.num_hidden_layers, inference_mode=True,
            base_model_name_or_path=getattr(config, "_name_or_path", None) or None,
        )
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            peft_config.save_pretrained(aside)
            save_file({"prompt_embeddings": prompt.contiguous()}, Path(aside, _WEIGHTS), metadata={"format": "pt"})
            for name in (_WEIGHTS, _CONFIG):  # the config last: a folder that has one is complete
                os.replace(Path(aside, name), folder / name)


def load(directory):
    """Read a :class:`PromptTuning` from a folder that PEFT or :func:`save` wrote.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: an adapter of another method.
    """
    directory = Path(directory)
    if (directory / _CONFIG).is_file():
        folders = [directory]
    else:
        numbered = (directory / f"prompt_{index}" for index in itertools.count())
        folders = list(itertools.takewhile(lambda folder: (folder / _CONFIG).is_file(), numbered))
    if not folders:
        raise FileNotFoundError(f"directory must hold {_CONFIG} (or prompt_0/{_CONFIG}), got {str(directory)!r}")
    prompts = []
    for folder in folders:
        kind = PeftConfig.from_pretrained(str(folder)).peft_type
        if kind != PeftType.PROMPT_TUNING:
            raise ValueError(f"{folder} must hold a PROMPT_TUNING adapter, got {PeftType(kind).value}")
        prompts.append(load_peft_weights(str(folder), device="cpu")["prompt_embeddings"])
    bank = torch.stack(prompts)
    return PromptTuning(bank.shape[1], bank.shape[2], bank.shape[0], bank)
