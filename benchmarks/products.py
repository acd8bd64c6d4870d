"""The matrix products of a training step and nothing else: the bound of what a step can take.

They are those of the rows that a method leaves, as in :class:`benchmarks.step.Floor`: forward and gradient of the
input, 4 FLOP for each row and weight, of every linear layer on all R rows and of the head on as many as have a label.
Attention's six (scores, values, and four in backward), on the pairs of a query and a key that it sees, are one more
layer of as many FLOP. All are run by torch at the shapes that occur, the head in blocks of columns that stay in a
cache, each on weights of its own, which come from memory as in a step; results go where the last ones of their shape
went. So a step's share of the bound counts the machine's rate at these shapes, not at the best one.
"""

import torch
from torch import nn

COLUMNS = 2048  # of the head in a block


class Products:
    """A call runs them once."""

    def __init__(self, model, workload):
        weights = [module.weight for module in model.model.modules() if isinstance(module, nn.Linear)]
        self.layers = [(workload.rows, weight) for weight in weights + _attention(model.config, workload)]
        self.layers += [(workload.labels, weight) for weight in model.lm_head.weight.split(COLUMNS)]
        self.flop = sum(4 * rows * weight.numel() for rows, weight in self.layers)
        shapes = {(rows, width) for rows, weight in self.layers for width in weight.shape}
        self.inputs, self.results = ({shape: torch.randn(shape) for shape in shapes} for _ in range(2))

    def __call__(self):
        for rows, weight in self.layers:
            torch.mm(self.inputs[rows, weight.shape[1]], weight.t(), out=self.results[rows, weight.shape[0]])
        for rows, weight in reversed(self.layers):
            torch.mm(self.inputs[rows, weight.shape[0]], weight, out=self.results[rows, weight.shape[1]])


def pairs(workload):
    """How many pairs of a query and a key attention sees: causal, behind a prompt and common text."""
    prompt, common, shared = workload.prompt, workload.common, workload.prompts * workload.prompt
    own = sum(n * (n + 1) // 2 for n in (common, *workload.lengths))
    return shared * (prompt + 1) // 2 + common * prompt + workload.tokens * (prompt + common) + own


def _attention(config, workload):
    """A weight for each layer, with which its rows make as many FLOP as attention's products."""
    width = config.num_attention_heads * config.head_dim
    columns = round(12 * width * pairs(workload) / (4 * workload.rows * config.hidden_size))
    return [torch.randn(max(1, columns), config.hidden_size) for _ in range(config.num_hidden_layers)]
