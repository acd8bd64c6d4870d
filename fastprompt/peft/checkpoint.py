"""Prompt checkpoints in PEFT's adapter format: adapter_config.json and adapter_model.safetensors."""

import hashlib
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import (
    MultitaskPromptTuningConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig

from ..hf.arguments import Method
from ..methods import MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning
from .stored import CONFIG, WEIGHTS, opened, read_config, read_weights

ENCODER = "encoder.safetensors"
# Notes in the weights: a digest of all prompts that were saved together, and in the first one's their number.
_SAVE, _COUNT = "save", "prompts"
_HEAD = "base_model."  # in front of the names of a head's parameters, as PEFT writes its modules_to_save


def save(
    directory: str | os.PathLike[str],
    method: nn.Module,
    config: PreTrainedConfig,
    task_type: str = "CAUSAL_LM",
    head: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a method's prompts so that ``PeftModel.from_pretrained`` reads them.

    One prompt, and all tasks of a :class:`MultitaskPromptTuning`, go into ``directory`` itself; of several prompts the
    first, and the others into its subfolders ``prompt_1``, ``prompt_2``, ... as PEFT writes several adapters:
    ``PeftModel.from_pretrained(base, directory)`` has prompt 0, ``load_adapter(f"{directory}/prompt_1", "prompt_1")``
    adds the next. All files are written aside and renamed, those of ``directory`` last, and each notes which prompts it
    was saved with: a reader never meets half of a save, nor a mixture of two. What an earlier save left under these
    names is removed.

    PEFT's format has no room for what P-Tuning's encoder and Prefix-Tuning's MLP are made of, only for what they give:
    they are kept beside it in ``encoder.safetensors``, which PEFT does not look at. A :class:`PrefixTuning` with
    ``frozen_tokens`` becomes a CARTRIDGE adapter.

    Args:
        directory: made if it is not there.
        method: a :class:`PromptTuning`, :class:`PrefixTuning`, :class:`PTuning` or :class:`MultitaskPromptTuning`.
        config: the base model's config.
        task_type: PEFT's name for the kind of model.
        head: ``{parameter name in the model: tensor}`` of a head that trained along, written with every prompt.

    Raises:
        TypeError: another method.
        ValueError: a prefix for other layers than the model has, or than have keys and values of their own.
    """
    if not isinstance(method, (PromptTuning, PrefixTuning, PTuning, MultitaskPromptTuning)):
        expected = "a PromptTuning, PrefixTuning, PTuning or MultitaskPromptTuning"
        raise TypeError(f"method must be {expected}, got {type(method).__name__}")
    directory, text = Path(directory), config.get_text_config()
    common = dict(
        task_type=task_type,
        num_virtual_tokens=method.num_virtual_tokens,
        num_transformer_submodules=1,
        num_attention_heads=text.num_attention_heads,
        num_layers=text.num_hidden_layers,
        inference_mode=True,
        base_model_name_or_path=getattr(config, "_name_or_path", None) or None,
    )
    head = {f"{_HEAD}{name}": x.detach() for name, x in (head or {}).items()}
    if head:
        common["modules_to_save"] = sorted({name.split(".")[1] for name in head})
    with torch.no_grad():
        if isinstance(method, PrefixTuning):
            peft_config, adapters, encoder, notes = _prefix_to_peft(method, common, _own_layers(text))
        else:
            peft_config, adapters, encoder = _to_peft(method, common)
            notes = {}
    adapters = [{name: x.cpu().contiguous() for name, x in (tensors | head).items()} for tensors in adapters]
    notes[_SAVE] = _digest_of_all(adapters)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as aside:
        written = [Path(aside, str(index)) for index in range(len(adapters))]
        for index, tensors in enumerate(adapters):
            count = {_COUNT: str(len(adapters))} if index == 0 else {}
            _write(written[index], peft_config, tensors, encoder, notes | count)
        for index, folder in reversed(list(enumerate(written))):
            _move(folder, _folder(directory, index))
    _remove(directory / "prompt_0")  # where earlier versions put the first
    for index in itertools.count(len(adapters)):
        if not _remove(_folder(directory, index)):
            break


def load(directory: str | os.PathLike[str], layers: Sequence[int] | None = None) -> Method:
    """Read a method from a folder that PEFT or :func:`save` wrote.

    A trained P-Tuning encoder comes back whole from ``encoder.safetensors``. Without that file, as PEFT leaves it, its
    output is all there is: P-Tuning comes back as ``PTuning(encoder=None)``, and Prefix-Tuning without its MLP. Both
    give the same prompts and train on, as plain embeddings. So does CPT, which comes back as :class:`PromptTuning`;
    CARTRIDGE comes back as :class:`PrefixTuning` with ``frozen_tokens``.

    Args:
        directory: holds one adapter, and more of them in ``prompt_1``, ``prompt_2``, ... Also read: several in
            ``prompt_0``, ``prompt_1``, ... and none in the folder itself, as earlier versions wrote them.
        layers: the layers of a prefix to keep (without its MLP), where PEFT also wrote it for layers that use another
            layer's keys and values. None: those that :func:`save` wrote, all of PEFT's.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: files that are broken or hold no prompt, or numbers that are not finite; an adapter of another
            method or for an encoder-decoder; adapters that are no bank of one method or not of one save; or ``layers``
            that the adapter lacks or that are given for another method.
    """
    directory = Path(directory)
    folders = _folders_of_one_save(directory)
    if not folders:
        raise FileNotFoundError(f"directory must hold {CONFIG} (or prompt_0/{CONFIG}), got {str(directory)!r}")
    configs = [read_config(folder) for folder in folders]
    kinds = [PeftType(config.peft_type).value for config in configs]
    for folder, kind, config in zip(folders, kinds, configs):
        if kind not in _READERS:
            others = ", ".join(name for name in _READERS if name != "PROMPT_TUNING")
            raise ValueError(f"{folder} must hold a PROMPT_TUNING adapter, got {kind} ({others} are read too)")
        if config.num_transformer_submodules == 2:
            raise ValueError(f"{folder} must hold an adapter of a decoder, got one of an encoder-decoder")
    weights = [read_weights(folder, config) for folder, config in zip(folders, configs)]
    found = sorted({(kind, *w["prompt_embeddings"].shape) for kind, w in zip(kinds, weights)})
    if len(found) > 1:
        raise ValueError(f"{directory} must hold prompts of one method and shape, got {found}")
    if layers is not None and kind not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(f"layers must be None for a {kind} adapter, got {layers!r}")
    if len(folders) > 1 and kind in ("P_TUNING", "MULTITASK_PROMPT_TUNING"):
        raise ValueError(f"{directory} must hold one {kind} adapter, got {len(folders)}")
    bank = torch.stack([w["prompt_embeddings"] for w in weights])
    return _READERS[kind](folders[0], configs[0], bank, weights[0], layers)


def load_head(directory: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """``{parameter name in the model: tensor}`` of the head that was saved with the prompts; {} if there was none."""
    directory = Path(directory)
    weights = read_weights(_folders_of_one_save(directory)[0])
    return {name.removeprefix(_HEAD): x for name, x in weights.items() if name.startswith(_HEAD)}


def _to_peft(method, common):
    """PEFT's config, the tensors of each adapter, and the encoder's state or None, of a method at the input."""
    if isinstance(method, PromptTuning):
        config = PromptTuningConfig(token_dim=method.token_dim, **common)
        return config, [{"prompt_embeddings": prompt} for prompt in method.prompt], None
    if isinstance(method, PTuning):
        config = PromptEncoderConfig(
            token_dim=method.token_dim,
            encoder_reparameterization_type=(method.encoder or "mlp").upper(),
            encoder_hidden_size=method.hidden_size,
            encoder_num_layers=method.num_layers,
            encoder_dropout=method.dropout,
            **common,
        )
        encoder = None if method.encoder is None else method.state_dict()
        return config, [{"prompt_embeddings": method.encode()}], encoder
    config = MultitaskPromptTuningConfig(
        token_dim=method.token_dim, num_tasks=method.num_tasks, num_ranks=method.num_ranks, **common
    )
    tensors = dict(prompt_embeddings=method.shared, prefix_task_cols=method.rows, prefix_task_rows=method.cols)
    return config, [tensors], None


def _own_layers(text):
    """The layers with keys and values of their own; in the models that share them, the last ones have none."""
    return tuple(range(text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)))


def _prefix_to_peft(method, common, own):
    """As :func:`_to_peft`, and notes for the metadata of the weights."""
    count, prefix, notes = common["num_layers"], method(), {}
    if method.layers not in (own, tuple(range(count))):
        raise ValueError(f"method must have prefixes for the model's layers {list(own)}, got {list(method.layers)}")
    if len(method.layers) < count:  # PEFT wants all layers, and passes over those without keys of their own
        notes["layers"] = json.dumps(method.layers)
        whole = prefix.new_zeros(count, *prefix.shape[1:])
        whole[list(method.layers)] = prefix
        prefix = whole
    common = {**common, "token_dim": method.num_kv_heads * method.head_dim, "num_attention_heads": method.num_kv_heads}
    if method.frozen_tokens:
        from peft import CartridgeConfig  # newer than the oldest PEFT that the package runs with

        config = CartridgeConfig(num_frozen_tokens=method.frozen_tokens, **common)
    else:
        config = PrefixTuningConfig(
            encoder_hidden_size=method.projection or common["token_dim"],
            prefix_projection=method.projection is not None,
            **common,
        )
    adapters = [{"prompt_embeddings": flat} for flat in prefix.permute(2, 3, 0, 1, 4, 5).flatten(2)]
    return config, adapters, None if method.projection is None else method.state_dict(), notes


def _folder(directory, index):
    """Where prompt ``index`` of several stands."""
    return directory if index == 0 else directory / f"prompt_{index}"


def _write(folder, peft_config, tensors, encoder, notes):
    peft_config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **notes})
    if encoder is not None:
        write_encoder(folder, encoder, tensors["prompt_embeddings"])


def _move(written, folder):
    """Move an adapter over one that may be there."""
    folder.mkdir(exist_ok=True)
    if not (written / ENCODER).is_file():
        (folder / ENCODER).unlink(missing_ok=True)
    for name in (ENCODER, WEIGHTS, CONFIG):  # the config last: a folder that has one is complete
        if (written / name).is_file():
            os.replace(written / name, folder / name)


def _remove(folder):
    """Remove an adapter, and its folder if nothing else is in it; was there one?"""
    found = _is_adapter(folder)
    if found:
        for name in (CONFIG, WEIGHTS, ENCODER):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    return found


def _folders_of_one_save(directory):
    """The folders of the prompts in ``directory``, in order."""
    others = list(itertools.takewhile(_is_adapter, (_folder(directory, index) for index in itertools.count(1))))
    earlier = directory / "prompt_0"
    if not _is_adapter(directory):
        return _same_save([earlier, *others], None) if _is_adapter(earlier) else []
    notes = _notes(directory)
    if _SAVE in notes:
        count = int(notes.get(_COUNT, 1))
        return _same_save([_folder(directory, index) for index in range(count)], notes[_SAVE])
    # PEFT's, and so are the others, unless an earlier version wrote them: then they are no part of it.
    return _same_save([directory] if _is_adapter(earlier) else [directory, *others], None)


def _same_save(folders, save):
    """``folders``, each of this save or of PEFT, which may have written one again since."""
    for folder in folders:
        if not _is_adapter(folder) or _notes(folder).get(_SAVE) not in (None, save):
            raise ValueError(
                f"{folders[0]} must hold the prompts of one save, got {folder} of another: a save was interrupted, or "
                "other adapters were written over it; save all prompts again, or load their folders one by one"
            )
    return folders


def _is_adapter(folder):
    return (folder / CONFIG).is_file()


def _notes(folder):
    """The metadata of an adapter's weights."""
    if not (folder / WEIGHTS).is_file():
        return {}
    with opened(folder / WEIGHTS) as file:
        return file.metadata() or {}


def _digest_of_all(adapters):
    """One digest of all tensors of all adapters."""
    digests = [f"{name} {_digest(tensors[name])}" for tensors in adapters for name in sorted(tensors)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def write_encoder(folder: Path, state: Mapping[str, torch.Tensor], prompt: torch.Tensor) -> None:
    """Write the ``state`` of the encoder that gave ``prompt``, aside and then renamed."""
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        tensors = {name: x.detach().cpu().contiguous() for name, x in state.items()}
        save_file(tensors, Path(aside, ENCODER), metadata={"output": _digest(prompt)})
        os.replace(Path(aside, ENCODER), folder / ENCODER)


def _digest(x):
    """The SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def read_encoder(folder: Path, prompt: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The state of the encoder that gave ``prompt``, or None."""
    path = folder / ENCODER
    if not path.is_file():
        return None
    with opened(path) as file:
        if (file.metadata() or {}).get("output") == _digest(prompt):
            return load_file(path)
    warnings.warn(f"{path} gives another prompt than {WEIGHTS} has, which is loaded without an encoder", stacklevel=4)
    return None


def _read_prompts(folder, config, bank, weights, layers):
    return PromptTuning(bank.shape[1], bank.shape[2], bank.shape[0], bank)


def _read_p_tuning(folder, config, bank, weights, layers):
    prompt = bank[0]
    state = read_encoder(folder, prompt)
    if state is None:
        return PTuning(*prompt.shape, encoder=None, init=prompt)
    kind = config.encoder_reparameterization_type.lower()
    depth = dict(num_layers=config.encoder_num_layers, dropout=config.encoder_dropout) if kind == "lstm" else {}
    method = PTuning(*prompt.shape, encoder=kind, hidden_size=config.encoder_hidden_size, **depth)
    method.load_state_dict(state)
    return method


def _read_multitask(folder, config, bank, weights, layers):
    rows, cols = weights["prefix_task_cols"], weights["prefix_task_rows"]
    method = MultitaskPromptTuning(bank.shape[1], bank.shape[2], rows.shape[0], num_ranks=rows.shape[2], init=bank[0])
    with torch.no_grad():
        method.rows.copy_(rows)
        method.cols.copy_(cols)
    return method


def _read_prefix(folder, config, bank, weights, layers):
    heads, width = config.num_attention_heads, config.token_dim
    known = all(isinstance(size, int) for size in (heads, width, config.num_layers))
    if not known or width % heads:
        said = dict(num_layers=config.num_layers, num_attention_heads=heads, token_dim=width)
        raise ValueError(f"{folder} must say how many layers it has, and heads that share the width, got {said}")
    if bank.shape[2] != config.num_layers * 2 * width:
        expected = f"num_layers * 2 * token_dim = {config.num_layers * 2 * width}"
        raise ValueError(f"{folder} must hold a prefix of {expected} values a token, got {bank.shape[2]}")
    written = _written_layers(folder) or tuple(range(config.num_layers))
    layers = written if layers is None else tuple(layers)
    if not layers or not set(layers) <= set(written):
        raise ValueError(f"layers must be among those of the adapter, {list(written)}, got {list(layers)}")
    sizes = (bank.shape[1], len(layers), heads, width // heads)
    state = None
    if getattr(config, "prefix_projection", False) and layers == written:
        state = read_encoder(folder, bank[0])
    if state is not None:
        method = PrefixTuning(*sizes, projection=config.encoder_hidden_size, layers=layers)
        method.load_state_dict(state)
        return method
    init = bank.unflatten(2, (config.num_layers, 2, heads, -1)).permute(2, 3, 0, 1, 4, 5)[list(layers)]
    frozen = getattr(config, "num_frozen_tokens", 0)
    return PrefixTuning(*sizes, num_prompts=bank.shape[0], init=init, frozen_tokens=frozen, layers=layers)


def _written_layers(folder):
    """The layers that :func:`save` noted; None if it had nothing to note or PEFT wrote the file."""
    noted = _notes(folder).get("layers")
    return noted and tuple(json.loads(noted))


_READERS = {
    "PROMPT_TUNING": _read_prompts,
    "CPT": _read_prompts,
    "P_TUNING": _read_p_tuning,
    "PREFIX_TUNING": _read_prefix,
    "CARTRIDGE": _read_prefix,
    "MULTITASK_PROMPT_TUNING": _read_multitask,
}
