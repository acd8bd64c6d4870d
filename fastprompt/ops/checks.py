from ..checks import *  # noqa: F403  (temporary: moved to fastprompt/checks.py)
from ..checks import FLOATS, INTS, accumulator, check_range, check_tensor, choose_backend
