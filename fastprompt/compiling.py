"""Adapters on disk -> compiled prompts on disk: ``fastprompt compile``."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .hf.compiled_prompts import prompt_of_method
from .hf.fingerprint import fingerprint
from .peft import checkpoint
from .serving.compile import CompiledPrompt, compiled
from .serving.export import save_prompt_embeds, to_peft
from .training import InputError, load_base, read_adapter, read_record
from .training.adapters import DTYPES
from .training.files import RUN_FILE

FORMATS = ("compiled", "embeds", "peft")
_SUFFIX = ".safetensors"


def compile_adapters(
    adapter: list[str],
    output: str,
    model: str | None = None,
    gguf_file: str | None = None,
    precision: str | None = None,
    task: str | None = None,
    format: str = "compiled",
) -> list[dict[str, Any]]:
    """Compile adapters of one model, which is loaded once.

    Args:
        adapter: folders of adapters, of ``fastprompt train`` or of PEFT.
        output: a file (``.safetensors``) for one prompt, else a folder: a file there for each prompt, by the name of
            its adapter and, of several tasks, ``.TASK``.
        model, gguf_file, precision: of the frozen model (default: as the adapter says, which all have to agree on).
        task: only this task of an adapter with several.
        format: "compiled", "embeds" (see :func:`save_prompt_embeds`) or "peft" (a folder, see :func:`to_peft`).

    Returns:
        For each prompt what was written, in the order of the adapters.

    Raises:
        InputError: an argument that cannot be used; nothing was written for it.
    """
    moved = {"model": model, "gguf_file": gguf_file, "precision": precision}
    given = {name: value for name, value in moved.items() if value is not None}
    bases = {folder: {**base_of(folder), **given} for folder in adapter}
    for folder, base in bases.items():
        if base["model"] is None:
            raise InputError("model", f"the adapter in {folder!r} does not say which model it is of; expected a model")
        if base != bases[adapter[0]]:
            raise InputError(
                "adapter", f"{folder!r} is of another model than {adapter[0]!r}: {base}, {bases[adapter[0]]}"
            )
    targets = [target for folder in adapter for target in _targets(folder, task)]
    files = _files(targets, output, "" if format == "peft" else _SUFFIX)
    for path in files:
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir():
            raise InputError(
                "output", f"expected a path below folders, got {str(path)!r} below the file {str(above)!r}"
            )
    loaded = load_base(**bases[adapter[0]])
    of, written = fingerprint(loaded), []
    for (folder, method, index, _), path in zip(targets, files):
        try:
            prompt = prompt_of_method(loaded, method, index)
            if format == "embeds":
                if prompt.rows is None:
                    raise ValueError(f"{prompt.method} learns keys and values, and has no embeddings")
                save_prompt_embeds(prompt.rows.detach().to(loaded.dtype), path)
                written.append({"output": str(path), "method": prompt.method, "length": len(prompt.rows)})
                continue
            result = compiled(loaded, prompt, of)
            if format == "peft":
                to_peft(result, loaded, path)
            else:
                result.save(path)
        except (ValueError, NotImplementedError) as error:
            raise InputError("adapter", f"{folder!r}: {error}") from None
        except OSError as error:
            raise InputError("output", f"{str(path)!r} cannot be written: {error.strerror or error}") from None
        size = {"output": str(path), "method": result.method, "length": result.length, "bytes": result.nbytes}
        written.append(size | {"fingerprint": of})
    return written


def base_of(source: str | Path) -> dict[str, Any]:
    """What an adapter's folder or a compiled prompt says about its model: arguments of ``load_base``.

    Raises:
        InputError: it is neither.
    """
    if Path(source).is_file():
        try:
            prompt = CompiledPrompt.load(source)
        except ValueError as error:
            raise InputError("adapter", str(error)) from None
        precision = {dtype: name for name, dtype in DTYPES.items()}.get(prompt.dtype, _BASE["precision"])
        return {**_BASE, "model": prompt.base_model or None, "precision": precision}
    if Path(source, RUN_FILE).is_file():
        config = read_record(Path(source))["config"]
        return {name: config.get(name) or default for name, default in _BASE.items()}
    return {**_BASE, "model": read_adapter(str(source)).config.base_model_name_or_path}


_BASE: dict[str, Any] = {"model": None, "gguf_file": None, "precision": "fp32"}


def _targets(folder, task):
    """For each prompt of an adapter: the folder, its method, the index of the prompt there, and a name for its file."""
    try:
        method = checkpoint.load(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError("adapter", f"{folder!r} cannot be loaded: {' '.join(str(error).split())}") from None
    name = Path(folder).resolve().name
    record = read_record(Path(folder)) if Path(folder, RUN_FILE).is_file() else {}
    tasks = [str(one) for one in record.get("tasks") or range(method.num_prompts)]
    if task is not None and (method.num_prompts == 1 and not record.get("tasks") or task not in tasks):
        raise InputError("task", f"expected one of {tasks} of {folder!r}, got {task!r}")
    if method.num_prompts == 1:
        return [(folder, method, None, name)]
    chosen = range(method.num_prompts) if task is None else [tasks.index(task)]
    called = [re.sub(r"[^\w.-]", "_", one) for one in tasks]
    return [(folder, method, index, f"{name}.{called[index]}") for index in chosen]


def _files(targets, output, suffix):
    """Where each prompt is written."""
    if suffix and output.endswith(suffix):
        if len(targets) > 1:
            raise InputError("output", f"expected a folder for {len(targets)} prompts, got the file {output!r}")
        if Path(output).is_dir():
            raise InputError("output", f"expected a file that ends in {suffix}, got the folder {output!r}")
        return [Path(output)]
    if Path(output).is_file():
        raise InputError("output", f"expected a folder, or a file that ends in {_SUFFIX}, got the file {output!r}")
    names = [name for *_, name in targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError("output", f"several adapters would be written as {twice}; expected names that differ")
    return [Path(output, name + suffix) for name in names]
