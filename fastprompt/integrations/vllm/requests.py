"""Requests for a prompt: what stands for it in the token ids, and the fields that choose it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .prompts import PromptFolder, PromptInfo

if TYPE_CHECKING:
    from vllm import SamplingParams, TokensPrompt
    from vllm.config import KVTransferConfig

FIELD = "fastprompt"  # in kv_transfer_params: the name of the prompt


def connector_config(folder: str | Path, **options: Any) -> "KVTransferConfig":
    """``LLM(model, kv_transfer_config=connector_config(folder))``.

    Args:
        folder: compiled prompts; files may be added while the engine runs.
        options: further fields of ``kv_connector_extra_config``, see ``docs/vllm.md``.
    """
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="FastPromptConnector",
        kv_role="kv_consumer",
        kv_connector_extra_config={"prompts": str(folder), **options},
    )


def prompt_folder(config: "KVTransferConfig") -> PromptFolder:
    """The prompts that a ``KVTransferConfig`` of this connector names.

    Raises:
        ValueError: it names none, or has a field that there is not.
    """
    options = dict(config.kv_connector_extra_config)
    folder, memory, fingerprint = (
        options.pop("prompts", None),
        options.pop("memory", 2**30),
        options.pop("fingerprint", None),
    )
    wrong = not isinstance(folder, str) or not isinstance(memory, int) or memory < 0
    if wrong or options or not isinstance(fingerprint, str | None):
        raise ValueError(
            "kv_connector_extra_config must be {'prompts': folder of compiled prompts}, and may have 'memory': bytes "
            "that a worker keeps prompts in, and 'fingerprint': of the model, as compiled prompts have it; got "
            f"{config.kv_connector_extra_config}"
        )
    return PromptFolder(folder, memory, fingerprint)


def request(
    folder: str | Path | PromptFolder,
    name: str,
    token_ids: Sequence[int],
    sampling_params: "SamplingParams | None" = None,
) -> tuple["TokensPrompt", "SamplingParams"]:
    """A text behind a prompt, as ``LLM.generate`` and ``AsyncLLM.generate`` take it.

    Args:
        folder: the folder that the engine's connector reads.
        name: of the prompt.
        token_ids: of the text, at least one.
        sampling_params: copied; ``prompt_logprobs`` cannot be had behind a prompt.

    Returns:
        The prompt with its placeholders and salt, and the sampling parameters with the name.

    Raises:
        PromptError: no such prompt, or its file is not a compiled prompt.
        ValueError: no token, or ``prompt_logprobs``.
    """
    from vllm import SamplingParams, TokensPrompt

    prompts = folder if isinstance(folder, PromptFolder) else PromptFolder(folder)
    info = prompts.info(name)
    ids = list(token_ids)
    if not ids:
        raise ValueError("token_ids must have at least one token, got none")
    params = SamplingParams() if sampling_params is None else sampling_params.clone()
    if params.prompt_logprobs is not None:
        raise ValueError(
            f"sampling_params has prompt_logprobs={params.prompt_logprobs}; behind a prompt there are none"
        )
    params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": {FIELD: name}}
    prompt = TokensPrompt(
        prompt_token_ids=with_placeholders(info, ids, params.repetition_penalty), cache_salt=info.salt
    )
    return prompt, params


def with_placeholders(info: PromptInfo, token_ids: list[int], repetition_penalty: float) -> list[int]:
    """Token ids with one for each virtual token in front of them.

    Which does not matter to the model, which never sees them. Always the same lets requests share whole blocks; but a
    repetition penalty counts each token of a prompt as seen, so there a token that is in the text stands in.
    """
    placeholder = 0 if repetition_penalty == 1.0 else token_ids[0]
    return [placeholder] * info.length + token_ids
