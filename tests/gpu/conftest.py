import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from guard import guards  # noqa: E402


@pytest.fixture(autouse=True)
def guarded_buffers():
    with guards():
        yield
