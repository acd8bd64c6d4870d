"""Frozen models, and the adapters that are trained on them."""

import os
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from .errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT_INITS = {"random": "RANDOM", "vocab": "SAMPLE_VOCAB", "text": "TEXT"}


def _prompt_tuning(config) -> PeftConfig:
    arguments = {}
    if config.init == "text":
        arguments = {"prompt_tuning_init_text": config.init_text, "tokenizer_name_or_path": config.model}
        if config.gguf_file is not None:
            arguments["tokenizer_kwargs"] = {"gguf_file": config.gguf_file}
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=config.num_virtual_tokens,
        prompt_tuning_init=PROMPT_INITS[config.init],
        **arguments,
    )


# A method is its name on the command line and the PEFT configuration that a `TrainingConfig` asks for.
METHODS = {"prompt-tuning": _prompt_tuning}


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_tokenizer(model: str, gguf_file: str | None = None):
    _check_model(model, gguf_file)
    try:
        return AutoTokenizer.from_pretrained(model, **_gguf(gguf_file))
    except (OSError, ValueError) as error:
        raise InputError("model", f"no tokenizer in {model!r}: {error}") from error


def load_base(model: str, gguf_file: str | None = None, precision: str = "fp32"):
    """The model in evaluation mode, its weights frozen and in ``precision``, on `device`."""
    _check_model(model, gguf_file)
    if precision == "fp16" and device().type == "cpu":
        raise InputError("precision", "fp16 needs an accelerator and there is none; expected fp32 or bf16")
    options = _gguf(gguf_file)
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Releases that know it may keep the weights in GGUF's blocks, and no gradient goes through those.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=PRECISIONS[precision], **options)
    except (OSError, ValueError) as error:
        raise InputError("model", f"no causal language model in {model!r}: {error}") from error
    if gguf_file is not None and getattr(base, "hf_quantizer", None) is not None:
        # The weights are plain tensors by now; the Trainer goes by the mark and would refuse them.
        base.hf_quantizer.remove_quantization_config(base)
    return base.requires_grad_(False).eval().to(device())


def new_adapter(base, config) -> PeftModel:
    """A `PeftModel` with a freshly initialised adapter on ``base``, the same for the same ``config.seed``."""
    set_seed(config.seed)
    return get_peft_model(base, METHODS[config.method](config))


def load_adapter(base, path: str) -> PeftModel:
    """A `PeftModel` with the adapter that ``path`` holds, for inference."""
    if not Path(path, "adapter_config.json").is_file():
        raise InputError("adapter", f"{path!r} holds no adapter_config.json; expected the output of a finished run")
    return PeftModel.from_pretrained(base, path).eval()


def _gguf(gguf_file: str | None) -> dict:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _check_model(model: str, gguf_file: str | None):
    looks_local = os.path.isabs(model) or model.startswith(".") or model.count("/") > 1
    if looks_local and not Path(model).is_dir():
        raise InputError("model", f"{model!r} is not a folder")
    if gguf_file is not None and Path(model).is_dir() and not Path(model, gguf_file).is_file():
        raise InputError("gguf_file", f"{model!r} holds no file {gguf_file!r}")
