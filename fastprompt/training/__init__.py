"""Training soft prompts from files: what the command line and the quickstart are built on."""

from .adapters import StoredAdapter, load_adapter, load_base, load_tokenizer, read_adapter
from .config import TrainingConfig
from .data import Example, Task, read_rows, split_rows
from .encoding import Encoded, collate, encode, encode_examples, features, plan_batches
from .errors import InputError
from .evaluation import completion_log_probs, evaluate
from .files import read_record
from .inference import TrainedAdapter
from .run import TrainingRun, train
from .stacked_adamw import StackedAdamW
from .sweep import Candidate, sweep
from .tables import show_table
from .tasks import TrainedPrompt, train_tasks

__all__ = [
    "Candidate",
    "Encoded",
    "Example",
    "InputError",
    "StackedAdamW",
    "StoredAdapter",
    "Task",
    "TrainedAdapter",
    "TrainedPrompt",
    "TrainingConfig",
    "TrainingRun",
    "collate",
    "completion_log_probs",
    "encode",
    "encode_examples",
    "evaluate",
    "features",
    "load_adapter",
    "load_base",
    "load_tokenizer",
    "plan_batches",
    "read_adapter",
    "read_record",
    "read_rows",
    "show_table",
    "split_rows",
    "sweep",
    "train",
    "train_tasks",
]
