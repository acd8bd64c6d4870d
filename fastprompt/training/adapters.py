"""Frozen models, and the adapters that are trained on them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from peft import (
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..hf.cache_names import cache_in
from .config import TrainingConfig
from .errors import InputError
from .files import read_record
from .identity import check_causal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEFT_INITS = {"random": "RANDOM", "vocab": "SAMPLE_VOCAB", "text": "TEXT"}
PEFT_SOURCE_INITS = {"average": "AVERAGE_SOURCE_TASKS", "exact": "EXACT_SOURCE_TASK", "shared": "ONLY_SOURCE_SHARED"}
PEFT_ENCODERS = {"lstm": "LSTM", "mlp": "MLP"}


def _prompt_arguments(config: TrainingConfig) -> dict:
    arguments = {
        "task_type": TaskType.CAUSAL_LM,
        "num_virtual_tokens": config.num_virtual_tokens,
        "prompt_tuning_init": PEFT_INITS[config.init],
    }
    if config.init == "text":
        arguments |= {"prompt_tuning_init_text": config.init_text, "tokenizer_name_or_path": config.model}
        if config.gguf_file is not None:
            arguments["tokenizer_kwargs"] = {"gguf_file": config.gguf_file}
    return arguments


def _prompt_tuning(config: TrainingConfig, num_tasks: int) -> PeftConfig:
    return PromptTuningConfig(**_prompt_arguments(config))


def _prefix_tuning(config: TrainingConfig, num_tasks: int) -> PeftConfig:
    arguments: dict[str, Any] = {"encoder_hidden_size": config.encoder_hidden_size}  # None: PEFT's own choice
    return PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.projection,
        **arguments,
    )


@torch.no_grad()
def _start_prefix(model: PeftModel, config: TrainingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    encoder: Any = model.prompt_encoder[model.active_adapter]
    if config.init == "zero":
        for parameter in (encoder.transform[-1] if config.projection else encoder.embedding).parameters():
            parameter.zero_()
    elif config.init == "text":
        ids = tokenizer(config.init_text)["input_ids"]
        ids = [ids[i % len(ids)] for i in range(config.num_virtual_tokens)]
        base: Any = model.get_base_model()
        cache = cache_in(base(torch.tensor([ids], device=base.device), use_cache=True, logits_to_keep=1))
        layers = [(layer.keys, layer.values) for layer in cache.layers]  # each [1, H, P, Dh]
        states = torch.cat([state for pair in layers for state in pair]).permute(2, 0, 1, 3)  # [P, 2 * L, H, Dh]
        encoder.embedding.weight.copy_(states.flatten(1))


def _p_tuning(config: TrainingConfig, num_tasks: int) -> PeftConfig:
    return PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=config.num_virtual_tokens,
        encoder_reparameterization_type=PEFT_ENCODERS[config.encoder or "lstm"],
        encoder_hidden_size=config.encoder_hidden_size or 128,
    )


def _multitask(config: TrainingConfig, num_tasks: int) -> PeftConfig:
    arguments = _prompt_arguments(config)
    if config.source is not None:
        arguments |= _source_arguments(config, config.source, num_tasks)
    return MultitaskPromptTuningConfig(**arguments, num_ranks=config.num_ranks or 1, num_tasks=num_tasks)


def _source_arguments(config: TrainingConfig, folder: str, num_tasks: int) -> dict:
    source: Any = _adapter_config(folder, "source")
    init = config.source_init or "average"
    if source.peft_type != PeftType.MULTITASK_PROMPT_TUNING:
        kind = PeftType(source.peft_type).value
        raise InputError("source", f"{folder!r} holds a {kind} adapter; expected a multitask run")
    if source.num_virtual_tokens != config.num_virtual_tokens:
        expected = f"expected {source.num_virtual_tokens} like the source"
        raise InputError("num_virtual_tokens", f"{expected}, got {config.num_virtual_tokens}")
    arguments: dict[str, Any] = {
        "prompt_tuning_init": PEFT_SOURCE_INITS[init],
        "prompt_tuning_init_state_dict_path": str(Path(folder, SAFETENSORS_WEIGHTS_NAME)),
    }
    if init == "shared":
        return arguments
    if source.num_ranks != (config.num_ranks or 1):
        raise InputError("num_ranks", f"expected {source.num_ranks} like the source, got {config.num_ranks or 1}")
    if num_tasks > 1:
        raise InputError("source_init", f"{init!r} starts one task, and the data has {num_tasks}; expected 'shared'")
    if init == "exact":
        tasks = list(read_record(Path(folder), "source")["tasks"] or [])
        if config.source_task not in tasks:
            raise InputError("source_task", f"expected one of {tasks}, got {config.source_task!r}")
        arguments["prompt_tuning_init_task"] = tasks.index(config.source_task)
    return arguments


@torch.no_grad()
def _start_multitask(model: PeftModel, config: TrainingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    encoder: Any = model.prompt_encoder[model.active_adapter]
    if config.source is None or config.source_init == "shared":
        # PEFT draws both factors so small (0.02) that the prompt starts near zero, whatever the shared prompt is. Here
        # their product starts at one: each task starts from the shared prompt itself.
        encoder.prefix_task_cols.zero_()[..., 0] = 1
        encoder.prefix_task_rows[:, 0] = 1
    if config.source is not None:
        # PEFT would read the source again each time this adapter is loaded.
        own: Any = model.active_peft_config
        own.prompt_tuning_init, own.prompt_tuning_init_state_dict_path = "RANDOM", None


# Name of a method -> what makes PEFT's configuration of it, for a number of tasks.
PEFT_CONFIGS: dict[str, Callable[[TrainingConfig, int], PeftConfig]] = {
    "prompt-tuning": _prompt_tuning,
    "prefix-tuning": _prefix_tuning,
    "p-tuning": _p_tuning,
    "multitask": _multitask,
}
# What sets the values that PEFT would not start with as the run asks.
STARTS: dict[str, Callable[[PeftModel, TrainingConfig, PreTrainedTokenizerBase], None]] = {
    "prefix-tuning": _start_prefix,
    "multitask": _start_multitask,
}


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_tokenizer(model: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub name. Raises `InputError`."""
    _check_model(model, gguf_file)
    try:
        return AutoTokenizer.from_pretrained(model, **_gguf(gguf_file))
    except (OSError, ValueError) as error:
        raise InputError("model", f"no tokenizer in {model!r}: {_one_line(error)}") from error


def load_base(model: str, gguf_file: str | None = None, precision: str = "fp32") -> PreTrainedModel:
    """The model in evaluation mode, its weights frozen and in ``precision``, on `device`."""
    _check_model(model, gguf_file)
    if precision == "fp16" and device().type == "cpu":
        raise InputError("precision", "fp16 needs an accelerator and there is none; expected fp32 or bf16")
    options = _gguf(gguf_file)
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Releases that know it may keep the weights in GGUF's blocks, and no gradient goes through those.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[precision], **options)
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        raise InputError("model", f"no causal language model in {model!r}: {_one_line(error)}") from error
    if gguf_file is not None and getattr(base, "hf_quantizer", None) is not None:
        # The weights are plain tensors by now; the Trainer goes by the mark and would refuse them.
        base.hf_quantizer.remove_quantization_config(base)
    base = base.requires_grad_(False).eval().to(device())
    check_causal(base, model)
    return base


def new_adapter(
    base: PreTrainedModel, config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, num_tasks: int = 1
) -> PeftModel:
    """A `PeftModel` with a freshly initialised adapter on ``base``, the same for the same ``config.seed``."""
    set_seed(config.seed)
    model = get_peft_model(base, PEFT_CONFIGS[config.method](config, num_tasks))
    if config.method in STARTS:
        STARTS[config.method](model, config, tokenizer)
    return model


def load_adapter(base: PreTrainedModel, path: str) -> PeftModel:
    """A `PeftModel` with the adapter that ``path`` holds, for inference."""
    _adapter_config(path, "adapter")
    try:
        return PeftModel.from_pretrained(base, path).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError("adapter", f"{path!r} cannot be loaded: {_one_line(error)}") from error


@dataclass(frozen=True)
class StoredAdapter:
    """What PEFT keeps in an adapter's folder.

    Attributes:
        method: PEFT's name of it, such as ``PROMPT_TUNING``.
        config: PEFT's configuration.
        weights: name -> tensor, fp32 on the CPU.
    """

    method: str
    config: Any
    weights: dict[str, torch.Tensor]


def read_adapter(path: str) -> StoredAdapter:
    """Read the folder of any adapter of PEFT, without its model. Raises `InputError`."""
    if not Path(path, "adapter_config.json").is_file():
        raise InputError("adapter", f"{path!r} holds no adapter_config.json; expected a run or an adapter of PEFT")
    config = _adapter_config(path, "adapter")
    try:
        weights = {name: weight.float() for name, weight in load_peft_weights(path, device="cpu").items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError("adapter", f"the weights in {path!r} cannot be read: {_one_line(error)}") from error
    return StoredAdapter(PeftType(config.peft_type).value, config, weights)


def _adapter_config(path: str, argument: str) -> PeftConfig:
    if not Path(path, "adapter_config.json").is_file():
        raise InputError(argument, f"{path!r} holds no adapter_config.json; expected the output of a finished run")
    try:
        return PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            argument, f"{path!r} holds an adapter_config.json of no adapter: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    """What an error of a library says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _gguf(gguf_file: str | None) -> dict:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _check_model(model: str, gguf_file: str | None) -> None:
    looks_local = os.path.isabs(model) or model.startswith(".") or model.count("/") > 1
    if looks_local and not Path(model).is_dir():
        raise InputError("model", f"{model!r} is not a folder")
    if gguf_file is not None and Path(model).is_dir() and not Path(model, gguf_file).is_file():
        raise InputError("gguf_file", f"{model!r} holds no file {gguf_file!r}")
    found = sorted(path.name for path in Path(model).glob("*.gguf"))
    if gguf_file is None and found and not Path(model, "config.json").is_file():
        raise InputError("gguf_file", f"{model!r} holds a model in GGUF; expected one of {found}")
