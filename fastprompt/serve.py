"""``fastprompt serve``: the prompts of one frozen model behind OpenAI's interface, on one machine."""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .compiling import base_of
from .serving.bank import PromptBank
from .training import InputError, load_base, load_tokenizer

TOKEN = "FASTPROMPT_ADMIN_TOKEN"
_EXTRA = ("fastapi", "uvicorn", "prometheus_client")
_LEAST = {"max_batch": 1, "max_wait_ms": 0, "max_tokens": 2, "max_body": 1, "max_queue": 1}


def serve(
    base: str | None = None,
    prompts: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    base_name: str | None = None,
    gguf_file: str | None = None,
    precision: str | None = None,
    admin_folder: str | None = None,
    max_prompt_bytes: int | None = None,
    **limits: Any,
) -> None:
    """Serve until SIGTERM; then finish what was accepted.

    Args:
        base, gguf_file, precision: the frozen model, and its tokenizer (default: as the prompts say, which all have to
            agree on).
        prompts: see :func:`prompt_sources`.
        host, port: where to listen.
        base_name: what requests without a prompt call the model (default: the name of its folder, or on the hub).
        admin_folder: from where prompts may be added while the server runs, by who has the token of the environment
            variable FASTPROMPT_ADMIN_TOKEN.
        max_prompt_bytes: memory of the prompts; others wait on disk.
        limits: of :class:`fastprompt.serving.app.ServerOptions`.

    Raises:
        InputError: an argument that cannot be used.
    """
    missing = [name.replace("_", "-") for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise InputError("base", f'a server needs {", ".join(missing)}: pip install "fastprompt[serve]"')
    for name, least in _LEAST.items():
        if name in limits and not least <= limits[name] < math.inf:
            raise InputError(name, f"expected at least {least}, got {limits[name]}")
    if not 0 <= port < 2**16:
        raise InputError("port", f"expected 0 to {2**16 - 1}, got {port}")
    token = os.environ.get(TOKEN) or None
    if admin_folder is not None and (token is None or not Path(admin_folder).is_dir()):
        raise InputError("admin_folder", f"expected a folder, and a token in {TOKEN}, got {admin_folder!r}")
    from .serving.app import ServerOptions, create_app
    from .serving.process import run

    found = prompt_sources(prompts or [])
    source = _base(found, base, gguf_file, precision)
    name = source["model"]
    try:
        tokenizer, model = load_tokenizer(name, source["gguf_file"]), load_base(**source)
    except InputError as error:
        raise InputError("base" if error.argument == "model" else error.argument, error.message) from None
    options = ServerOptions(
        base_name or (Path(name).resolve().name if Path(name).is_dir() else name),
        admin_token=None if admin_folder is None else token,
        admin_folder=None if admin_folder is None else Path(admin_folder),
        **limits,
    )
    try:
        bank = PromptBank(model, max_bytes=max_prompt_bytes)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError("base", str(error)) from None
    for name, path in found.items():
        try:
            bank.add(name, path)
        except (OSError, KeyError, TypeError, ValueError, NotImplementedError, SafetensorError) as error:
            raise InputError("prompts", f"{str(path)!r} cannot be added: {error}") from None
    try:
        app = create_app(bank, tokenizer, options)
    except ValueError as error:
        raise InputError("base_name", str(error)) from None
    run(app, host, port)


def _base(found, base, gguf_file, precision):
    """Arguments of ``load_base``: those that are given, and else what the prompts say."""
    given = {"model": base, "gguf_file": gguf_file, "precision": precision}
    given = {name: value for name, value in given.items() if value is not None}
    if base is not None:
        return {"precision": "fp32", "gguf_file": None, **given}
    try:
        said = {str(path): {**base_of(path), **given} for path in found.values()}
    except InputError as error:
        raise InputError("prompts", error.message) from None
    first = next(iter(said), None)
    if first is None or said[first]["model"] is None:
        raise InputError("base", "the prompts do not say which model they are of; expected one")
    for path, own in said.items():
        if own != said[first]:
            raise InputError("prompts", f"{path!r} is of another model than {first!r}: {own}, {said[first]}")
    return said[first]


def prompt_sources(given: list[str]) -> dict[str, Path]:
    """What is called how.

    Args:
        given: each a compiled prompt (``sql.safetensors``, called sql), an adapter's folder (called by its name), a
            folder of these, or any of the first two as ``NAME=PATH``.

    Raises:
        InputError: nothing there, or two of one name.
    """
    found: dict[str, Path] = {}
    for one in given:
        name, separator, path = one.partition("=")
        if separator and not Path(one).exists():
            members = [(name, Path(path))]
        elif Path(one).is_dir() and not _is_prompt(Path(one)):
            members = [
                (member.stem if member.is_file() else member.name, member) for member in sorted(Path(one).iterdir())
            ]
            members = [(name, member) for name, member in members if _is_prompt(member)]
        else:
            whole = Path(one)
            members = [(whole.stem if whole.is_file() else whole.resolve().name, whole)]
        if not members or not all(called and member.exists() for called, member in members):
            raise InputError("prompts", f"expected a prompt, a folder with some, or NAME=PATH, got {one!r}")
        for called, member in members:
            if called in found:
                raise InputError("prompts", f"{str(member)!r} and {str(found[called])!r} are both called {called!r}")
            found[called] = member
    return found


def _is_prompt(path):
    return path.suffix == ".safetensors" if path.is_file() else (path / "adapter_config.json").is_file()
