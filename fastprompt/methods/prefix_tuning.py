"""Prefix-Tuning: Li & Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190."""

from collections.abc import Iterable

import torch
from torch import nn

from .prompt_tuning import check_sizes, initial_values


class PrefixTuning(nn.Module):
    """N learned prefixes: keys and values of P virtual tokens in every layer.

    With ``projection`` they come, as in the paper, out of an MLP that trains along:
    ``Linear(tanh(Linear(embedding)))``, one for all layers. ``frozen_tokens`` gives the trainable cache of Cartridges
    (Eyuboglu et al. 2025, arXiv 2506.06266), whose first token, the attention sink, keeps its starting values.

    Args:
        num_virtual_tokens: P, at least 1.
        num_layers: L, the layers that have a prefix.
        num_kv_heads: Hkv, the key/value heads of a layer.
        head_dim: Dh.
        num_prompts: N, at least 1; 1 with ``projection``.
        init: ``[L, 2, P, Hkv, Dh]`` or ``[L, 2, N, P, Hkv, Dh]`` starting keys and values, for example those of a text
            that was run through the model. "zero": zeros, as PEFT's ``init_weights="zero"``. None: standard normal,
            with ``projection`` torch's own initialisation of the MLP, both as PEFT.
        projection: the width of the MLP's hidden layer. None: no MLP.
        frozen_tokens: the first tokens of each prefix that do not train, at most P; 0 with ``projection``.
        layers: the indices of the L layers in the model, ascending, where some of its layers get no prefix because they
            use another layer's keys and values. None: 0 to L - 1.

    Attributes:
        prefix: ``[N, P - frozen_tokens, L * 2 * Hkv * Dh]`` fp32 parameter, PEFT's layout; absent with ``projection``.
        frozen: ``[N, frozen_tokens, L * 2 * Hkv * Dh]`` buffer; absent if there are none.
        embedding, transform: with ``projection`` the modules of PEFT's PrefixEncoder under its names, the embedding
            ``[P, Hkv * Dh]`` wide.
        layers: tuple of L ints; forward's first dimension counts these layers only.

    Raises:
        TypeError: an ``init`` that is neither None, "zero" nor a tensor.
        ValueError: a size out of range, an ``init`` of another shape, or arguments that ``projection`` excludes.
    """

    prefix: nn.Parameter
    frozen: torch.Tensor

    def __init__(
        self,
        num_virtual_tokens: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_prompts: int = 1,
        init: torch.Tensor | str | None = None,
        projection: int | None = None,
        frozen_tokens: int = 0,
        layers: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            num_virtual_tokens=num_virtual_tokens,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_prompts=num_prompts,
        )
        if not isinstance(frozen_tokens, int) or not 0 <= frozen_tokens <= num_virtual_tokens:
            raise ValueError(f"frozen_tokens must be an int in [0, {num_virtual_tokens}], got {frozen_tokens!r}")
        self.num_virtual_tokens, self.num_prompts, self.frozen_tokens = num_virtual_tokens, num_prompts, frozen_tokens
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.projection = projection
        self.layers = tuple(range(num_layers)) if layers is None else tuple(layers)
        if len(self.layers) != num_layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers must hold num_layers={num_layers} ascending indices, got {list(self.layers)}")
        if isinstance(init, str) and init != "zero":
            raise ValueError(f'init must be None, "zero" or a tensor, got {init!r}')
        if projection is None:
            self._make_prefix(init)
        else:
            check_sizes(projection=projection)
            for name, value, only in (("num_prompts", num_prompts, 1), ("frozen_tokens", frozen_tokens, 0)):
                if value != only:
                    raise ValueError(f"{name} must be {only} with projection, got {value}")
            if init is not None and not isinstance(init, str):
                raise ValueError(
                    f'init must be None or "zero" with projection, which cannot be inverted, got {type(init).__name__}'
                )
            self._make_projection(projection, zero=init == "zero")

    def forward(self) -> torch.Tensor:
        """All prefixes, ``[L, 2, N, P, Hkv, Dh]``: keys at 0 and values at 1 of the second dimension.

        A strided view of the parameter, or of the MLP's output; only ``frozen_tokens`` cost a copy.
        """
        if self.projection is not None:
            flat = self.transform(self.embedding.weight)[None]
        elif self.frozen_tokens:
            flat = torch.cat([self.frozen, self.prefix], 1)
        else:
            flat = self.prefix
        return flat.unflatten(2, (self.num_layers, 2, self.num_kv_heads, self.head_dim)).permute(2, 3, 0, 1, 4, 5)

    def _make_prefix(self, init: torch.Tensor | str | None) -> None:
        shape = self.num_prompts, self.num_virtual_tokens, self.num_layers * 2 * self.num_kv_heads * self.head_dim
        if init is None:
            flat = torch.randn(shape)
        elif isinstance(init, str):
            flat = torch.zeros(shape)
        else:
            one = (self.num_layers, 2, self.num_virtual_tokens, self.num_kv_heads, self.head_dim)
            all_prompts = (*one[:2], self.num_prompts, *one[2:])
            if isinstance(init, torch.Tensor) and tuple(init.shape) == one:
                init = init.unsqueeze(2).expand(all_prompts)
            flat = initial_values(init, all_prompts, one).permute(2, 3, 0, 1, 4, 5).flatten(2)
        if self.frozen_tokens:
            self.register_buffer("frozen", flat[:, : self.frozen_tokens].clone())
        self.prefix = nn.Parameter(flat[:, self.frozen_tokens :].clone())

    def _make_projection(self, projection: int, zero: bool) -> None:
        width = self.num_kv_heads * self.head_dim
        self.embedding = nn.Embedding(self.num_virtual_tokens, width)
        self.transform = nn.Sequential(
            nn.Linear(width, projection), nn.Tanh(), nn.Linear(projection, self.num_layers * 2 * width)
        )
        if zero:
            for parameter in self.transform[2].parameters():
                nn.init.zeros_(parameter)
