"""``python -m benchmarks.gpu.rotary_model``: what rotary embeddings of queries and keys move, and the time it predicts.

PREDICTION: no GPU ran. Bytes are those of the inputs and outputs of every kernel, each once, and nothing stays in a
cache from one kernel to the next: queries of 8192 rows do not fit. Llama's own function is run on tensors without
storage and its operations are counted, autograd's in its backward; ours is one kernel for queries and one for keys. One
kernel for both would read the tables once less.
"""

import argparse
import sys
from pathlib import Path

import torch
from fastprompt.kernels import launch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprompt.ops.rotary import triton as launcher

from . import output
from .chips import CHIPS, DEVICES
from .layers import turned
from .model import LAUNCH_SECONDS, PREDICTION

OUT = Path(__file__).parent / "rotary_predictions.csv"
SIZES = ((9, 3, 64), (32, 8, 128))


def tensors(heads, kv_heads, width, rows):
    """Queries, keys and both tables in bf16, without storage."""
    shapes = (1, rows, heads, width), (1, rows, kv_heads, width), (1, rows, width), (1, rows, width)
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def ours(q, k, cosine, sine):
    """Bytes of each launch, the same ones forward and backward."""
    with launch.capture(CHIPS["sm_90"].target) as launches:
        for x in (q, k):
            launcher.forward(x, cosine, sine)
    found = [2 * size(x) + size(cosine) + size(sine) for x in (q, k)]
    assert len(launches) == len(found)
    return found


def plain(q, k, cosine, sine):
    """Bytes of each operation of Llama's function, forward and backward."""
    leaves = [x.requires_grad_() for x in (q, k)]
    with _Counted() as forward:
        results = [turned(x, cosine, sine) for x in leaves]
    with _Counted() as backward:
        torch.autograd.grad(results, leaves, [torch.empty_like(x) for x in results])
    return forward.bytes, backward.bytes


class _Counted(TorchDispatchMode):
    """The bytes of what each operation reads and writes, views left out."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function._schema.name:
            moved = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes.append(sum(map(size, moved)))
        return result


def size(x):
    """Bytes of a tensor, places that it repeats counted once."""
    counts = [n for n, stride in zip(x.shape, x.stride()) if stride]
    return torch.Size(counts).numel() * x.element_size()


def predict(rows=8192):
    """The rows of the table."""
    found = []
    for sizes in SIZES:
        given = tensors(*sizes, rows)
        forward, backward = plain(*given)
        each = ours(*given)
        both = [sum(each) - size(given[2]) - size(given[3])]
        for device in DEVICES:
            for direction, of_plain in (("forward", forward), ("backward", backward)):
                kinds = {"fastprompt": each, "one kernel for both": both, "Llama's function": of_plain}
                for name, moved in kinds.items():
                    seconds = sum(moved) / DEVICES[device].bandwidth + len(moved) * LAUNCH_SECONDS
                    found.append(
                        {"device": device, "direction": direction, "H": sizes[0], "Hkv": sizes[1], "Dh": sizes[2],
                         "rows": rows, "implementation": name, "launches": len(moved),
                         "memory MB": f"{sum(moved) / 1e6:.1f}", "us": f"{seconds * 1e6:.1f}"}
                    )  # fmt: skip
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.rotary_model", description="Predicted cost of rotary. No GPU runs."
    )
    parser.add_argument("--out", type=Path, default=OUT, help="CSV")
    options = parser.parse_args(arguments)
    rows = predict()
    comments = [
        f"{PREDICTION}. Counted bytes and launches; see benchmarks/gpu/rotary_model.py. bf16, queries and keys.",
        f"time = memory bytes / bandwidth + {LAUNCH_SECONDS * 1e6:.0f} us a launch",
    ]
    output.write_csv(options.out, rows, comments)
    print(f"{PREDICTION}: rotary of queries and keys")
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
