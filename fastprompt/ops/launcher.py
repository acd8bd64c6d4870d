"""The launchers of backends that need what may not be installed."""

from functools import cache
from importlib import import_module


@cache
def launcher(op, backend):
    """The module ``fastprompt.ops.<op>.<backend>`` and None, or None and the reason why it cannot be imported."""
    try:
        return import_module(f".{op}.{backend}", __package__), None
    except ImportError as error:
        return None, f"the {backend.capitalize()} kernels cannot be imported: {error}"
