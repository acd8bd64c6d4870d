"""P-Tuning: Liu et al. 2021, GPT Understands, Too, arXiv 2103.10385."""

import itertools

import torch
from torch import nn

from ..ops.prompt_lstm.api import prompt_lstm
from .cached import CachedOutput
from .prompt_tuning import check_sizes, initial_values


class PTuning(nn.Module):
    """A prompt of P virtual tokens that an encoder makes from an embedding; both train.

    The encoder is a bidirectional LSTM and two linear layers ("lstm", the paper's), three linear layers ("mlp"), or
    None: the embedding is the prompt itself, which is what is left of a trained encoder once its output is stored, as
    PEFT does.

    In evaluation mode with gradients off the encoder runs once and its output is kept until a parameter changes: one
    that was written in place, replaced, moved or cast is noticed, and :meth:`train` and :meth:`eval` drop it as well.
    Nothing is kept while a parameter has a gradient. What writes past autograd's version counter is not seen then
    (``parameter.data.add_(...)``, a kernel of one's own): call :meth:`eval` after that.

    Args:
        num_virtual_tokens: P, at least 1.
        token_dim: D, the width of the model's embeddings.
        encoder: "lstm", "mlp" or None.
        hidden_size: the hidden size of the LSTM (of one direction) or MLP. None: D.
        num_layers: LSTM layers; the MLP has no choice and takes the default only.
        dropout: between LSTM layers in training; 0 for the MLP.
        init: ``[P, D]`` starting values of the embedding. None: standard normal.

    Attributes:
        embedding, lstm_head, mlp_head: modules with the parameters of PEFT's PromptEncoder under its names, with the
            same seed of the same values; those that ``encoder`` does not use are absent.

    Raises:
        TypeError: an ``init`` that is no tensor.
        ValueError: an unknown encoder, a size below 1, an ``init`` of another shape, or an argument that the encoder
            would ignore.
    """

    num_prompts = 1

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        *,
        encoder: str | None = "lstm",
        hidden_size: int | None = None,
        num_layers: int = 2,
        dropout: float = 0.0,
        init: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        hidden = token_dim if hidden_size is None else hidden_size
        check_sizes(
            num_virtual_tokens=num_virtual_tokens, token_dim=token_dim, hidden_size=hidden, num_layers=num_layers
        )
        if encoder not in ("lstm", "mlp", None):
            raise ValueError(f'encoder must be "lstm", "mlp" or None, got {encoder!r}')
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        if encoder != "lstm" and (num_layers, dropout) != (2, 0):
            raise ValueError(
                f'num_layers and dropout must be left alone but for encoder="lstm", got {num_layers} and {dropout}'
            )
        self.encoder, self.hidden_size, self.num_layers, self.dropout = encoder, hidden, num_layers, dropout
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim)
        if encoder == "lstm":
            self.lstm_head = _Parameters(nn.LSTM(token_dim, hidden, num_layers, bidirectional=True))
            self.mlp_head = _mlp(2 * hidden, 2 * hidden, token_dim)
        elif encoder == "mlp":
            self.mlp_head = _mlp(token_dim, hidden, hidden, token_dim)
        if init is not None:
            self.embedding.weight = nn.Parameter(initial_values(init, (num_virtual_tokens, token_dim)))
        self._cached = CachedOutput()

    @property
    def num_virtual_tokens(self) -> int:
        return self.embedding.num_embeddings

    @property
    def token_dim(self) -> int:
        return self.embedding.embedding_dim

    def forward(self) -> torch.Tensor:
        """The prompt, ``[P, D]``."""
        if self.encoder is None:
            return self.embedding.weight
        if torch.compiler.is_compiling():
            return self.encode(self.training)
        return self._cached(self.parameters(), self.training, lambda: self.encode(self.training))

    def encode(self, training: bool = False) -> torch.Tensor:
        """Run the encoder, with dropout if ``training``: ``[P, D]``."""
        rows = self.embedding.weight
        if self.encoder == "lstm":
            weights = list(self.lstm_head.parameters())
            rows = prompt_lstm(rows, weights, num_layers=self.num_layers, dropout=self.dropout, training=training)
        return rows if self.encoder is None else self.mlp_head(rows)

    def train(self, mode: bool = True) -> "PTuning":
        self._cached.drop()
        return super().train(mode)


class _Parameters(nn.Module):
    """The parameters of a module under their names: torch.compile does not go near an nn.LSTM itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters():
            self.register_parameter(name, parameter)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, with ReLU in between."""
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(layers[0], *(module for layer in layers[1:] for module in (nn.ReLU(), layer)))
