"""Prompt Tuning from class labels, the vote of an ensemble, and the errors of all methods."""

import pytest
import torch
from method_sizes import DH, HEADS, D, L, P
from torch import nn

from fastprompt.methods import (
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    distillation_loss,
    ensemble_vote,
)


def test_prompts_from_class_labels():
    embedding = nn.Embedding(9, D)
    method = PromptTuning.from_labels([[3], [1, 8, 8]], embedding, 4, 2, torch.Generator().manual_seed(0))
    assert method.prompt.shape == (2, 4, D) and method.token_dim == D
    for prompt in method.prompt:
        assert torch.equal(prompt[0], embedding.weight[3])
        torch.testing.assert_close(prompt[1], (embedding.weight[1] + 2 * embedding.weight[8]) / 3)
    rest = method.prompt[:, 2:].flatten(0, 1)
    assert all((embedding.weight == row).all(1).any() for row in rest) and len(rest.unique(dim=0)) > 2
    assert torch.equal(PromptTuning.from_labels([[3]], embedding, 1).prompt[0, 0], embedding.weight[3])


def test_ensemble_vote():
    logits = torch.zeros(3, 4, 3)
    logits[:2, 0, 1], logits[2, 0, 2] = 1, 50  # two weak votes outvote a strong one
    logits[0, 1, 0], logits[1, 1, 1], logits[2, 1, 2] = 1, 3, 2  # a tie: the highest mean
    logits[:, 2] = torch.tensor([[5.0, 9, 0], [9, 8, 0], [0, 8, 9]])  # 1 has the highest mean of three single votes
    logits[:, 3] = torch.tensor([[0.0, 1, -torch.inf], [-torch.inf, 0, 1], [-torch.inf, 0, 1]])  # 2 by vote, not mean
    assert ensemble_vote(logits).tolist() == [1, 1, 1, 2]
    tie = torch.tensor([[[9.0, -torch.inf, -torch.inf, 10]], [[9, 10, -torch.inf, -torch.inf]]])
    assert ensemble_vote(tie).item() in (1, 3)  # 0 has the highest mean and no vote


# Errors

KV = torch.zeros(L, 2, P, HEADS, DH)


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda: PrefixTuning(P, 0, HEADS, DH), "num_layers must be an int >= 1, got 0"),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, init=KV[:, :, 1:]),
            r"init must have shape \[3, 2, 1, 5, 2, 4\] or \[3, 2, 5, 2, 4\], got \[3, 2, 4, 2, 4\]",
        ),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, init="ones"),
            "init must be None, \"zero\" or a tensor, got 'ones'",
        ),
        (TypeError, lambda: PrefixTuning(P, L, HEADS, DH, init=3), "init must be a torch.Tensor of shape .*, got int"),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, init=KV, projection=6),
            'init must be None or "zero" with projection, .* got Tensor',
        ),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, num_prompts=2, projection=6),
            "num_prompts must be 1 with projection, got 2",
        ),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, frozen_tokens=1, projection=6),
            "frozen_tokens must be 0 with projection, got 1",
        ),
        (ValueError, lambda: PrefixTuning(P, L, HEADS, DH, projection=0), "projection must be an int >= 1, got 0"),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, frozen_tokens=6),
            r"frozen_tokens must be an int in \[0, 5\], got 6",
        ),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, layers=[0, 1]),
            r"layers must hold num_layers=3 ascending indices, got \[0, 1\]",
        ),
        (ValueError, lambda: PrefixTuning(P, L, HEADS, DH, layers=[0, 2, 1]), r"ascending indices, got \[0, 2, 1\]"),
        (ValueError, lambda: PTuning(P, D, encoder="gru"), 'encoder must be "lstm", "mlp" or None, got \'gru\''),
        (ValueError, lambda: PTuning(P, D, hidden_size=0), "hidden_size must be an int >= 1, got 0"),
        (ValueError, lambda: PTuning(P, D, dropout=1.5), r"dropout must lie in \[0, 1\), got 1.5"),
        (
            ValueError,
            lambda: PTuning(P, D, encoder="mlp", num_layers=3),
            'num_layers and dropout must be left alone but for encoder="lstm", got 3 and 0.0',
        ),
        (ValueError, lambda: PTuning(P, D, init=torch.zeros(P, 3)), r"init must have shape \[5, 12\], got \[5, 3\]"),
        (ValueError, lambda: MultitaskPromptTuning(P, D, 0), "num_tasks must be an int >= 1, got 0"),
        (
            ValueError,
            lambda: MultitaskPromptTuning(P, D, 2)(torch.tensor([2])),
            r"task_ids must lie in \[0, 2\), got values from 2 to 2",
        ),
        (
            ValueError,
            lambda: MultitaskPromptTuning.from_source(MultitaskPromptTuning(P, D, 2), 2),
            r'task must be "average", "shared" or an int in \[0, 2\), got 2',
        ),
        (
            ValueError,
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3), torch.ones(2, 3)),
            r"teacher_logits must have shape \[2, 3\], got \[2, 4\]",
        ),
        (
            ValueError,
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(0, 3), torch.ones(0, 3)),
            "student_hidden must hold at least one row",
        ),
        (
            ValueError,
            lambda: distillation_loss(*[torch.ones(2, 3)] * 3, torch.ones(2, 3, device="meta")),
            "teacher_hidden must be on cpu like student_hidden, got meta",
        ),
        (
            ValueError,
            lambda: distillation_loss(*[torch.ones(2, 3)] * 4, temperature=0),
            "temperature must be above 0, got 0",
        ),
        (TypeError, lambda: PromptTuning(P, D, init=[0.0]), "init must be a torch.Tensor of shape .*, got list"),
        (
            ValueError,
            lambda: PromptTuning.from_labels([[1], []], nn.Embedding(9, D), 4),
            "label_token_ids must hold at least one token a label, got none for label 1",
        ),
        (
            ValueError,
            lambda: PromptTuning.from_labels([[1], [2]], nn.Embedding(9, D), 1),
            "label_token_ids must hold 1 to num_virtual_tokens=1 labels, got 2",
        ),
        (ValueError, lambda: ensemble_vote(torch.zeros(2, 3)), r"logits must have shape \[N, B, C\], got \[2, 3\]"),
        (
            TypeError,
            lambda: ensemble_vote(torch.zeros(1, 2, 3, dtype=torch.int64)),
            "logits must have one of the dtypes",
        ),
    ],
)
def test_errors_name_the_argument(error, call, message):
    with pytest.raises(error, match=message):
        call()
