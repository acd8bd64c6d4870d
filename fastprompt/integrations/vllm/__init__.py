"""Compiled prompts served by vLLM, by name: a KV connector, a middleware for its server, helpers for its clients.

vLLM imports this module in each of its processes, for ``register``; everything else is imported when it is asked for.
``docs/vllm.md`` shows how it is used.
"""

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embeddings import embed_prompt, encode_prompt_embeds
    from .middleware import Middleware
    from .prompts import PromptError, PromptFolder
    from .requests import connector_config, request

__all__ = [
    "Middleware",
    "PromptError",
    "PromptFolder",
    "connector_config",
    "embed_prompt",
    "encode_prompt_embeds",
    "register",
    "request",
]

_MODULES = {
    "Middleware": "middleware",
    "PromptError": "prompts",
    "PromptFolder": "prompts",
    "connector_config": "requests",
    "embed_prompt": "embeddings",
    "encode_prompt_embeds": "embeddings",
    "request": "requests",
}


def register() -> None:
    """Make the connector known to vLLM, which calls this through the entry-point group ``vllm.general_plugins``."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    name = "FastPromptConnector"
    with suppress(ValueError):  # it is registered: a process may call this more than once
        KVConnectorFactory.register_connector(name, f"{__name__}.connector", name)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
