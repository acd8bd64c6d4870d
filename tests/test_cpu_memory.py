"""No memory for a C++ kernel is an exception, whichever of its threads wanted some, and the process goes on.

The exception is what torch makes of ``std::bad_alloc``: a MemoryError, and a RuntimeError from torch 2.15 on.
"""

import subprocess
import sys

import pytest

from fastprompt import native

pytestmark = [
    pytest.mark.skipif(native.missing is not None, reason=str(native.missing)),
    pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory and its use are read as Linux gives them"),
]

# Each call wants far more scratch memory per thread than the room it is left, and its results take far less.
SCRIPT = """
import resource, sys
import torch
from fastprompt import Sequences, multitask_prompt, prefix_attention

torch.set_num_threads(int(sys.argv[1]))

def fails(name, room, call):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    try:
        call()
        print(name, "had enough memory")
    except (MemoryError, RuntimeError) as error:
        print(name, error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

MIB = 1 << 20
small = torch.ones(4, 2, 8)
one = Sequences.packed(torch.tensor([0, 4]))
prefix_attention(small, small, small, None, None, one, backend="cpu")  # so that threads and modules are there

rank = 1 << 20
factors = torch.ones(1, 200), torch.ones(1, 1, rank), torch.ones(1, rank, 200)
task = torch.zeros(1, dtype=torch.int64)
fails("multitask_prompt", 64 * MIB, lambda: multitask_prompt(*factors, task, backend="cpu"))

backward = torch.ops.fastprompt.multitask_prompt_backward
needs = True, False, False
fails("its backward", 64 * MIB, lambda: backward(torch.ones(1, 1, 200), *factors, task, *needs, "cpu"))

q = torch.ones(4, 2, 1 << 18)
seq = Sequences.packed(torch.tensor([0, 2, 4]))
fails("prefix_attention", 64 * MIB, lambda: prefix_attention(q, q, q, None, None, seq, backend="cpu"))

assert torch.equal(prefix_attention(small, small, small, None, None, one, backend="cpu")[0], small)
print("and on")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_no_memory_is_an_exception(threads):
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(threads)], capture_output=True, text=True, timeout=240)
    failed = [f"{name} std::bad_alloc" for name in ("multitask_prompt", "its backward", "prefix_attention")]
    assert result.stdout.splitlines() == [*failed, "and on"], result.stdout + result.stderr
