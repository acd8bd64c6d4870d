"""Batch -> rows: which tokens and prompt vectors a model has to run, where they stand, and the way back.

Pure index arithmetic on integer tensors; no parameters, no floating point, no model. What looks at every cell of a
batch runs where the batch is: in PyTorch (``cells.py``), by the C++ library (``cpu.py``) or in the kernels of
``fastprompt.kernels.row_plan`` (``triton.py``).
"""

from .branches import NODE_COST
from .pairs import PairPlan, plan_pairs
from .plan import IGNORE, CannotPack, RowPlan, plan_packed_input, plan_padded_input
from .recurrent import Bucket, RecurrentSchedule, final_buckets, recurrent_schedule
from .sequences import Sequences
from .tree import Node, Tree

__all__ = [
    "IGNORE",
    "NODE_COST",
    "Bucket",
    "CannotPack",
    "Node",
    "PairPlan",
    "RecurrentSchedule",
    "RowPlan",
    "Sequences",
    "Tree",
    "final_buckets",
    "plan_packed_input",
    "plan_padded_input",
    "plan_pairs",
    "recurrent_schedule",
]
