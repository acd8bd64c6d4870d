"""What a soft prompt looks like: its nearest words, its norms, and how alike its virtual tokens are."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from .training import InputError, load_base, load_tokenizer, read_adapter, read_record
from .training.files import RUN_FILE, replacing

if TYPE_CHECKING:
    from rich.table import Table

# PEFT's names of the methods.
MULTITASK = "MULTITASK_PROMPT_TUNING"
EMBEDDINGS = ("PROMPT_TUNING", "P_TUNING", MULTITASK, "CPT")
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
CHUNK = 4096  # rows of the vocabulary that are compared at a time


@dataclass(frozen=True)
class EmbeddingReport:
    """N prompts of P virtual tokens, beside a vocabulary of V tokens; N is 1 but for a multitask adapter.

    Attributes:
        method: PEFT's name of it.
        tasks: N names, or None where the adapter knows no tasks.
        ids, tokens, texts, similarities: of each virtual token the K vocabulary tokens with the highest cosine
            similarity, best first, ``[N, P, K]``: their ids, what the tokenizer calls them, their text, the cosine.
        norms: L2, ``[N, P]``.
        percentiles: the percentage of the vocabulary's norms that are smaller, ``[N, P]``.
        similarity: cosine between the virtual tokens of a prompt, ``[N, P, P]``.
        vocabulary_norms: ``[V]``.
    """

    method: str
    tasks: list[str] | None
    ids: torch.Tensor
    tokens: list[list[list[str]]]
    texts: list[list[list[str]]]
    similarities: torch.Tensor
    norms: torch.Tensor
    percentiles: torch.Tensor
    similarity: torch.Tensor
    vocabulary_norms: torch.Tensor

    def to_dict(self) -> dict:
        """The report as JSON values."""
        names = ("id", "token", "text", "similarity")
        prompts = []
        for n in range(len(self.norms)):
            virtual_tokens = [
                {
                    "norm": self.norms[n, p].item(),
                    "norm_percentile": self.percentiles[n, p].item(),
                    "nearest": [dict(zip(names, hit)) for hit in self._nearest(n, p)],
                }
                for p in range(self.norms.shape[1])
            ]
            prompts.append(
                {
                    "task": None if self.tasks is None else self.tasks[n],
                    "virtual_tokens": virtual_tokens,
                    "similarity": self.similarity[n].tolist(),
                }
            )
        quantiles = self.vocabulary_norms.quantile(torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0]))
        norms = dict(zip(("smallest", "5%", "median", "95%", "largest"), quantiles.tolist()))
        return {
            "method": self.method,
            "num_virtual_tokens": self.norms.shape[1],
            "vocabulary": {"tokens": len(self.vocabulary_norms), "norms": norms},
            "prompts": prompts,
        }

    def show(self) -> None:
        """Print a table for each prompt."""
        from rich.console import Console
        from rich.text import Text

        console = Console()
        for n in range(len(self.norms)):
            title = f"{self.method}, {self.norms.shape[1]} virtual tokens"
            if self.tasks is not None:
                title += f", task {self.tasks[n]}"
            table = _table(title, ["#", "norm", "percentile"], "nearest tokens of the vocabulary (cosine)")
            for p in range(self.norms.shape[1]):
                nearest = Text("  ").join(
                    Text(_unbroken(f"{text!r} ")).append(f"{similarity:.2f}", style="dim")
                    for _, _, text, similarity in self._nearest(n, p)
                )
                table.add_row(str(p), f"{self.norms[n, p]:.3g}", f"{self.percentiles[n, p]:.0f}", nearest)
            console.print(table)

    def save_pictures(self, folder: Path) -> list[Path]:
        """Write ``similarity.png`` and ``norms.png``; returns their paths."""
        words = [[ascii(nearest[0]) for nearest in prompt] for prompt in self.texts]
        titles = ["similarity of the virtual tokens"] if self.tasks is None else self.tasks
        maps = _maps(self.similarity, titles, words)

        figure = _figure(9, 4)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
        left.hist(self.vocabulary_norms.numpy(), bins=60, orientation="horizontal", color="grey")
        left.set(xlabel="vocabulary tokens", ylabel="norm")
        low, middle, high = self.vocabulary_norms.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        right.axhspan(low, high, color="grey", alpha=0.25, label="vocabulary, 5% to 95%")
        right.axhline(middle, color="grey", label="vocabulary, median")
        for name, norms in zip(self.tasks or ["soft prompt"], self.norms):
            right.plot(norms.numpy(), "o-", markersize=4, label=name)
        if self.norms.max() > 10 * high or self.norms.min() < low / 10:
            right.set_yscale("symlog", linthresh=low)
        right.set(xlabel="virtual token")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.legend(fontsize="small")
        return _save(folder, {"similarity.png": maps, "norms.png": figure})

    def _nearest(self, n: int, p: int) -> Iterator[tuple[int, str, str, float]]:
        """Id, token, text and cosine of each of the nearest tokens of a virtual one."""
        return zip(self.ids[n, p].tolist(), self.tokens[n][p], self.texts[n][p], self.similarities[n, p].tolist())


@dataclass(frozen=True)
class PrefixReport:
    """Learned keys and values of L layers, P virtual tokens. They are no embeddings, so no tokens are near them.

    Attributes:
        method: PEFT's name of it.
        key_norms, value_norms: L2 of a head's key or value, mean over heads, ``[L, P]``.
        key_similarity, value_similarity: cosine between virtual tokens in a layer, mean over layers, ``[P, P]``.
    """

    method: str
    key_norms: torch.Tensor
    value_norms: torch.Tensor
    key_similarity: torch.Tensor
    value_similarity: torch.Tensor

    def to_dict(self) -> dict:
        """The report as JSON values."""
        arrays = ("key_norms", "value_norms", "key_similarity", "value_similarity")
        return {
            "method": self.method,
            "num_virtual_tokens": self.key_norms.shape[1],
            "note": NO_TOKENS,
            **{name: getattr(self, name).tolist() for name in arrays},
        }

    def show(self) -> None:
        """Print a table of the layers."""
        from rich.console import Console

        table = _table(
            f"{self.method}, {self.key_norms.shape[1]} virtual tokens, norms in each layer",
            ["layer", "keys: mean", "least", "most", "values: mean", "least", "most"],
        )
        for layer, (keys, values) in enumerate(zip(self.key_norms, self.value_norms)):
            numbers = [f(norms) for norms in (keys, values) for f in (torch.mean, torch.min, torch.max)]
            table.add_row(str(layer), *(f"{number:.3g}" for number in numbers))
        console = Console()
        console.print(table)
        console.print(NO_TOKENS)

    def save_pictures(self, folder: Path) -> list[Path]:
        """Write ``similarity.png`` and ``norms.png``; returns their paths."""
        titles = ["keys, mean over layers", "values, mean over layers"]
        maps = _maps(torch.stack([self.key_similarity, self.value_similarity]), titles)

        figure = _figure(9, 4)
        for axes, norms, title in zip(figure.subplots(1, 2), (self.key_norms, self.value_norms), ("keys", "values")):
            image = axes.imshow(norms.numpy(), aspect="auto", cmap="viridis")
            axes.set(title=f"norms of {title}", xlabel="virtual token", ylabel="layer")
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axes)
        return _save(folder, {"similarity.png": maps, "norms.png": figure})


NO_TOKENS = "Prefix-Tuning learns keys and values of every layer, not embeddings: they have no nearest tokens."


def inspect_prompt(
    adapter: str,
    model: str | None = None,
    gguf_file: str | None = None,
    precision: str | None = None,
    top: int = 5,
) -> EmbeddingReport | PrefixReport:
    """Look at the soft prompt in folder ``adapter``: a run's output, or any prompt adapter of PEFT.

    ``model`` and ``gguf_file`` say where its model is, if not where the adapter says; ``precision`` is that of the
    weights (default: as in training, or fp32). Keys and values need no model. ``top`` is how many of the nearest tokens
    to name. Raises `InputError`.
    """
    if top < 1:
        raise InputError("top", f"expected at least 1, got {top}")
    stored = read_adapter(adapter)
    method, weights = stored.method, stored.weights
    if method not in EMBEDDINGS + KEYS_AND_VALUES:
        raise InputError("adapter", f"{adapter!r} holds a {method} adapter, which has no prompt")
    if method in KEYS_AND_VALUES:
        return _prefix_report(method, weights["prompt_embeddings"], stored.config)

    record = read_record(Path(adapter)) if Path(adapter, RUN_FILE).is_file() else {}
    own = {"model": stored.config.base_model_name_or_path, "gguf_file": None, "precision": "fp32"}
    found = record.get("config", own)
    model, gguf_file = model or found["model"], gguf_file or found["gguf_file"]
    if not model:
        raise InputError("model", f"{adapter!r} does not say which model it is for; expected a folder or hub name")
    prompts, tasks = weights["prompt_embeddings"][None], None
    if method == MULTITASK:
        prompts = prompts * (weights["prefix_task_cols"] @ weights["prefix_task_rows"])  # [T, P, D]
        tasks = list(record.get("tasks") or (f"task {t}" for t in range(len(prompts))))
    tokenizer = load_tokenizer(model, gguf_file)
    embedding = load_base(model, gguf_file, precision or found["precision"]).get_input_embeddings()
    return _embedding_report(method, prompts, tasks, embedding, tokenizer, top)


@torch.no_grad()
def _embedding_report(
    method: str,
    prompts: torch.Tensor,
    tasks: list[str] | None,
    embedding: Any,
    tokenizer: PreTrainedTokenizerBase,
    top: int,
) -> EmbeddingReport:
    device, size = embedding.weight.device, embedding.weight.shape[0]
    prompts = prompts.to(device)
    rows = torch.nn.functional.normalize(prompts.flatten(0, 1), dim=-1)
    best = torch.empty(len(rows), 0, device=device)
    ids = best.long()
    chunks = []
    for start in range(0, size, CHUNK):
        numbers = torch.arange(start, min(start + CHUNK, size), device=device)
        words = embedding(numbers).float()  # called, not read: some models scale in there
        if words.shape[1] != rows.shape[1]:
            raise InputError("model", f"its embeddings have {words.shape[1]} values, and the prompt's {rows.shape[1]}")
        chunks.append(words.norm(dim=1))
        cosine = rows @ torch.nn.functional.normalize(words, dim=-1).t()
        best, order = torch.cat([best, cosine], 1).topk(min(top, best.shape[1] + len(numbers)))
        ids = torch.cat([ids, numbers.expand(len(rows), -1)], 1).gather(1, order)

    shape = (*prompts.shape[:2], -1)
    norms = prompts.norm(dim=-1).cpu()
    vocabulary_norms = torch.cat(chunks).cpu()
    smaller = torch.searchsorted(torch.sort(vocabulary_norms).values, norms)
    ids = ids.view(shape).cpu()
    return EmbeddingReport(
        method=method,
        tasks=tasks,
        ids=ids,
        tokens=[[_names(nearest, tokenizer) for nearest in prompt] for prompt in ids.tolist()],
        texts=[[_texts(nearest, tokenizer) for nearest in prompt] for prompt in ids.tolist()],
        similarities=best.view(shape).cpu(),
        norms=norms,
        percentiles=100 * smaller / size,
        similarity=_cosines(prompts).cpu(),
        vocabulary_norms=vocabulary_norms,
    )


def _names(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # Rows that fill up the table to a round number have no token.
    return [token or "" for token in tokenizer.convert_ids_to_tokens(ids)]


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode([token])) for token in ids]


def _prefix_report(method: str, flat: torch.Tensor, config: Any) -> PrefixReport:
    # PEFT keeps a layer's keys and then its values: [P, L * 2 * H * Dh].
    states = flat.view(len(flat), config.num_layers, 2, config.num_attention_heads, -1).permute(2, 1, 0, 3, 4)
    keys, values = states  # [L, P, H, Dh]
    return PrefixReport(
        method=method,
        key_norms=keys.norm(dim=-1).mean(-1),
        value_norms=values.norm(dim=-1).mean(-1),
        key_similarity=_cosines(keys.flatten(2)).mean(0),
        value_similarity=_cosines(values.flatten(2)).mean(0),
    )


def _cosines(rows: torch.Tensor) -> torch.Tensor:
    """``[..., P, D]`` -> ``[..., P, P]``."""
    rows = torch.nn.functional.normalize(rows, dim=-1)
    return rows @ rows.transpose(-1, -2)


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _table(title: str, numbers: list[str], text: str | None = None) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in numbers:
        table.add_column(name, justify="right")
    if text is not None:
        table.add_column(text, overflow="fold")
    return table


def check_output(folder: Path) -> None:
    """Raise `InputError` where `save_pictures` could not draw or not write."""
    if find_spec("matplotlib") is None:
        raise InputError("output", "pictures need matplotlib: pip install matplotlib")
    if folder.exists() and not folder.is_dir():
        raise InputError("output", f"{str(folder)!r} is a file; expected a folder, which may be missing")


def _figure(width: float, height: float) -> Any:
    # Not pyplot, which would choose a window system for the whole process.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _maps(similarities: torch.Tensor, titles: list[str], words: list[list[str]] | None = None) -> Any:
    """A square map for each of ``similarities [N, P, P]``, the virtual tokens named by ``words`` where they are few."""
    count, length = similarities.shape[:2]
    columns = min(count, 3)
    figure = _figure(4.5 * columns + 1, 4.2 * -(-count // columns))
    grid = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for n, axes in enumerate(grid):
        if n >= count:
            axes.set_axis_off()
            continue
        image = axes.imshow(similarities[n].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_title(titles[n], parse_math=False)
        axes.set_xlabel("virtual token")
        if words is not None and length <= 40:
            labels = [f"{word} {p}" for p, word in enumerate(words[n])]
            axes.set_yticks(range(length), labels, fontsize=min(8, 240 / length), parse_math=False)
    figure.colorbar(image, ax=grid, label="cosine", aspect=40)
    return figure


def _save(folder: Path, figures: dict) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with replacing(folder / name) as aside:
            figure.savefig(aside, format="png", dpi=150)
    return [folder / name for name in figures]
