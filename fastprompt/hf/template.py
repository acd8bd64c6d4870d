"""Templates: where virtual tokens, real words and the text of an example stand."""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

_PART = re.compile(r"\[P\]|\{(\w+)\}")


class Template:
    """A P-Tuning template (Liu et al. 2021, arXiv 2103.10385), such as ``"[P][P] {text} [P][P] capital [P]"``.

    Every ``[P]`` is a virtual token, numbered from left to right; ``{name}`` is a field of the example; everything else
    is text that stands in every example, the paper's anchor words among it. Calling it gives what
    :class:`fastprompt.SoftPromptModel` takes. What stands in front of the first field is the same in all rows, so it is
    run once a batch, virtual tokens and words alike.

    Args:
        template: the template.
        tokenizer: a Hugging Face tokenizer. Pieces are tokenized one by one, without special tokens of their own.

    Attributes:
        num_virtual_tokens: how many ``[P]`` there are: the P of the method.
        fields: the names of the fields, in order.

    Raises:
        ValueError: a template without ``[P]`` or without a field.
    """

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template, self.tokenizer = template, tokenizer
        parts = list(_PART.finditer(template))
        self.num_virtual_tokens = sum(part.group() == "[P]" for part in parts)
        self.fields = [part.group(1) for part in parts if part.group(1)]
        if not self.num_virtual_tokens or not self.fields:
            raise ValueError(f"template must hold [P] and a {{field}}, got {template!r}")

    def encode(self, **values: str) -> tuple[list[int], list[int]]:
        """One example: ``(token ids, virtual tokens)``, two lists of equal length.

        Where virtual token j stands, the second holds j and the first the id of padding, which no model reads;
        elsewhere the second holds -1.

        Raises:
            ValueError: a field without a value, or a value without a field.
        """
        if set(values) != set(self.fields):
            raise ValueError(f"values must be given for the fields {sorted(set(self.fields))}, got {sorted(values)}")
        ids: list[int] = []
        virtual: list[int] = []
        at, count = 0, 0
        for part in [*_PART.finditer(self.template), None]:
            text = self.template[at : len(self.template) if part is None else part.start()]
            for piece in (text, values[part.group(1)] if part is not None and part.group(1) else ""):
                found = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                ids += found
                virtual += [-1] * len(found)
            if part is not None:
                at = part.end()
                if part.group() == "[P]":
                    ids.append(self._padding)
                    virtual.append(count)
                    count += 1
        return ids, virtual

    def __call__(
        self, examples: Sequence[dict[str, str]], labels: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """A right-padded batch: ``{"input_ids", "attention_mask", "virtual_tokens", "labels"}``, ``[B, S]`` int64 each.

        Args:
            examples: a list of ``{field: text}``.
            labels: the text that follows each example, to be predicted; None: no labels.
        """
        rows = []
        for index, example in enumerate(examples):
            ids, virtual = self.encode(**example)
            target = self.tokenizer(labels[index], add_special_tokens=False)["input_ids"] if labels is not None else []
            rows.append(
                (ids + target, virtual + [-1] * len(target), [-100] * len(ids) + target, [1] * (len(ids) + len(target)))
            )
        width = max((len(ids) for ids, *_ in rows), default=0)
        fills = {"input_ids": self._padding, "virtual_tokens": -1, "labels": -100, "attention_mask": 0}
        batch = {
            name: torch.tensor([row[i] + [fill] * (width - len(row[i])) for row in rows], dtype=torch.int64).reshape(
                len(rows), width
            )
            for i, (name, fill) in enumerate(fills.items())
        }
        if labels is None:
            del batch["labels"]
        return batch

    @property
    def _padding(self):
        return self.tokenizer.pad_token_id or 0
