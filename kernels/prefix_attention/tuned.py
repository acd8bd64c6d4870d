"""Tiles measured to beat the rule of ``config.py``: ``tuned.json``, written by ``python -m benchmarks.gpu.tune``.

The file maps the name of a device to its entries, and the key of an entry (:func:`key`) to all of its role's
:data:`FIELDS`::

    {"<device>": {"forward 16-bit 128": {"queries": 64, "keys": 64, "num_warps": 4, "num_stages": 2, "registers":
    null}}}

There may be no file, and no entry: then the rule holds.
"""

import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

from ..launch import Options

FILE = Path(__file__).with_name("tuned.json")

_OPTIONS = tuple(field.name for field in fields(Options))
# What an entry overrides. How many queries a decoding program holds follows from the batch.
FIELDS = {
    "forward": ("queries", "keys", *_OPTIONS),
    "backward": ("queries", "keys", "key_queries", "key_keys", *_OPTIONS),
    "decode": ("keys", *_OPTIONS),
}
_KEY = re.compile(rf"({'|'.join(FIELDS)}) (16|32)-bit ([1-9]\d*)")


def key(role, element_size, head_dim):
    """What the rule depends on, on one device, as it is written in the file."""
    return f"{role} {8 * element_size}-bit {head_dim}"


def entry(device, role, element_size, head_dim):
    """The arguments of ``Tiles`` that a device's table overrides, or None. The file is read once.

    Raises:
        ValueError: the file is malformed; names the file and the key.
    """
    return _entries().get((device, role, element_size, head_dim))


@cache
def _entries():
    return {
        (device, role, int(bits) // 8, int(head_dim)): overrides(entry)
        for device, table in read(FILE).items()
        for name, entry in table.items()
        for role, bits, head_dim in [_KEY.fullmatch(name).groups()]
    }


def overrides(entry):
    """An entry of the file as arguments of ``Tiles``."""
    options = Options(**{name: entry[name] for name in _OPTIONS})
    return {name: value for name, value in entry.items() if name not in _OPTIONS} | {"options": options}


def read(file):
    """``{device: {key: entry}}``, checked; empty where there is no file.

    Raises:
        ValueError: the file is malformed; names the file and the key.
    """
    if not file.exists():
        return {}
    try:
        devices = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    _check_object(devices, f"{file}: expected an object of devices")
    for device, table in devices.items():
        _check_object(table, f"{file}: {device!r}: expected an object of entries")
        for name, entry in table.items():
            where = f"{file}: {device!r}: {name!r}"
            if not (match := _KEY.fullmatch(name)):
                raise ValueError(f"{where}: expected a key such as {key('forward', 2, 128)!r}")
            _check_entry(entry, FIELDS[match[1]], where)
    return devices


def _check_object(value, expected):
    if not isinstance(value, dict):
        raise ValueError(f"{expected}, got {value!r}")


def _check_entry(entry, names, where):
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise ValueError(f"{where}: expected an object with {', '.join(names)}, got {entry!r}")
    for name, value in entry.items():
        if wanted := expected(name, value):
            raise ValueError(f"{where}: {name}: expected {wanted}, got {value!r}")


def expected(name, value):
    """None if a field may have this value, else what it may have."""
    is_int = type(value) is int  # not a bool
    if name == "registers":
        return None if value is None or is_int and 32 <= value <= 255 else "null or from 32 to 255"
    if name == "num_stages":
        return None if is_int and 1 <= value <= 8 else "from 1 to 8"
    low, high = (1, 16) if name == "num_warps" else (16, 256)  # a matrix instruction takes 16 rows
    return (
        None if is_int and low <= value <= high and value & (value - 1) == 0 else f"a power of two from {low} to {high}"
    )
