"""What a connector can be trusted with: of vLLM's configuration, of a model's layers, of a request."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, iter_layer_specs

from .prompts import SALT, PromptError, PromptFolder, PromptInfo
from .requests import FIELD

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

# Speculation whose drafts come from no layers of their own, which would lack the prompt's keys.
DRAFTS_WITHOUT_LAYERS = ("ngram", "ngram_gpu", "suffix")
# Models whose rotated columns vLLM keeps in another order than transformers.
PERMUTED_MODELS = ("llama4", "llama4_text")


def check_engine(config: "VllmConfig", cache: "KVCacheConfig") -> None:
    """Whether compiled prompts can be served with a configuration of vLLM.

    Raises:
        ValueError: of vLLM's options; the message names the option, what it is and what is expected.
        NotImplementedError: of the model, or of parallelism.
    """
    transfer, parallel, speculative = config.kv_transfer_config, config.parallel_config, config.speculative_config
    if transfer.kv_connector != "FastPromptConnector":
        raise ValueError(f"kv_connector is {transfer.kv_connector!r}; FastPromptConnector works only by itself")
    if transfer.kv_load_failure_policy != "fail":
        policy = transfer.kv_load_failure_policy
        raise ValueError(f"kv_load_failure_policy is {policy!r}, which computes placeholders; it must be 'fail'")
    if not transfer.is_kv_consumer:
        raise ValueError(f"kv_role is {transfer.kv_role!r}; expected 'kv_consumer' or 'kv_both'")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            raise NotImplementedError(
                f"{name} is {getattr(parallel, name)}; a prompt's keys are placed only where it is 1"
            )
    if speculative is not None and speculative.method not in DRAFTS_WITHOUT_LAYERS:
        raise NotImplementedError(
            f"speculative decoding by {speculative.method!r} has layers without the prompt's keys and values; "
            f"expected one of {list(DRAFTS_WITHOUT_LAYERS)}"
        )
    _check_positions(config.model_config)
    for group in cache.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            _check_layer_kind(spec, group.layer_names)


def _check_layer_kind(spec: Any, names: list[str]) -> None:
    plain = type(spec) in (FullAttentionSpec, SlidingWindowSpec)  # a subclass keeps something else, as MLA does
    if plain and getattr(spec, "attention_chunk_size", None) is None and not getattr(spec, "non_causal", False):
        return
    raise NotImplementedError(
        f"layer {names[0] if names else '?'!r} keeps a {type(spec).__name__}; compiled prompts are placed in causal "
        "full attention and sliding windows, not in latent (MLA), recurrent, chunked or bidirectional layers"
    )


def _check_positions(model: "ModelConfig") -> None:
    """Keys stand in a compiled prompt as transformers rotates them; vLLM must rotate its own in the same way."""
    if model.hf_text_config.model_type in PERMUTED_MODELS or model.quantization == "gguf":
        which = f"{model.hf_text_config.model_type!r} with quantization {model.quantization!r}"
        raise NotImplementedError(f"vLLM keeps the columns of keys in another order than transformers, for {which}")
    for rope in _rope_parameters(model.hf_text_config):
        kind = rope.get("rope_type", rope.get("type"))
        original = rope.get("original_max_position_embeddings") or getattr(
            model.hf_text_config, "original_max_position_embeddings", model.hf_text_config.max_position_embeddings
        )
        if kind == "dynamic":
            raise NotImplementedError("rope_type 'dynamic' rotates keys by another angle in vLLM than in transformers")
        if kind == "longrope" and model.max_model_len > original:
            raise NotImplementedError(
                f"max_model_len is {model.max_model_len}: above {original} vLLM rotates all keys of a 'longrope' model "
                "by its long factors, and prompts are compiled with the short ones"
            )


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Of a model, or of each kind of its layers."""
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, dict):
            nested = [one for one in value.values() if isinstance(one, dict) and ("rope_type" in one or "type" in one)]
            yield from nested or [value]


def prompt_of(request: "Request", prompts: PromptFolder) -> PromptInfo | None:
    """The prompt that a request asks for, None if it asks for none.

    Raises:
        PromptError: it asks for one in a way that would give a wrong answer, to it or to others.
    """
    fields = request.kv_transfer_params
    name = fields.get(FIELD) if isinstance(fields, dict) else None
    if name is None:
        if (request.cache_salt or "").startswith(SALT):
            raise PromptError(
                f"cache_salt is a prompt's, but kv_transfer_params has no {FIELD!r}: its blocks would be wrong"
            )
        return None
    if not isinstance(name, str):
        raise PromptError(f"kv_transfer_params has {FIELD}={name!r}; expected the name of a prompt")
    info = prompts.info(name)
    if not info.is_salt(request.cache_salt):
        raise PromptError(
            f"cache_salt is {request.cache_salt!r} for prompt {name!r}; expected {info.salt!r}, without which other "
            "requests would be given the prompt's blocks"
        )
    _check_tokens(request, info)
    return info


def _check_tokens(request: "Request", info: PromptInfo) -> None:
    ids, params = request.prompt_token_ids, request.sampling_params
    if ids is None or request.prompt_embeds is not None:
        raise PromptError(f"prompt {info.name!r} takes token ids; the request has prompt_embeds")
    if params is None:
        raise PromptError(f"prompt {info.name!r} takes requests for text; this one is for pooling")
    if request.mm_features or request.lora_request is not None:
        raise PromptError(f"prompt {info.name!r} takes text alone; the request has images, audio or a LoRA adapter")
    if request.skip_reading_prefix_cache:
        raise PromptError("behind a prompt there are no prompt_logprobs, and skip_reading_prefix_cache has to be off")
    text = ids[info.length :]
    if not text or ids[: info.length] != [ids[0]] * info.length:
        raise PromptError(
            f"prompt_token_ids must begin with {info.length} times one id, for prompt {info.name!r}, and go on with "
            f"the text; got {len(ids)} ids that begin with {ids[: min(len(ids), 4)]}"
        )
    if params.repetition_penalty != 1.0 and ids[0] not in text:
        raise PromptError(
            f"repetition_penalty is {params.repetition_penalty}, and would count id {ids[0]}, which stands for the "
            "prompt, as seen; let an id that is in the text stand there"
        )
