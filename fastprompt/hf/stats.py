"""How the calls of a model were run: packed, or the padded way and why."""

from dataclasses import dataclass, field


@dataclass
class Stats:
    """Counts of calls and rows.

    Attributes:
        packed: calls on packed rows.
        padded: reason -> calls that took the model's own padded forward for it.
        rows: that the packed calls ran.
        rows_padded: that these calls would have run padded.
    """

    packed: int = 0
    padded: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    rows_padded: int = 0

    @property
    def calls(self) -> int:
        """All of them."""
        return self.packed + sum(self.padded.values())

    def count_packed(self, rows: int, rows_padded: int, calls: int = 1) -> None:
        """Count a packed call; negative numbers take one back."""
        self.packed += calls
        self.rows += rows
        self.rows_padded += rows_padded

    def count_padded(self, reason: str) -> None:
        """Count a call that was not packed."""
        self.padded[reason] = self.padded.get(reason, 0) + 1

    def __str__(self) -> str:
        text = f"{self.packed} of {self.calls} calls packed, {self.rows} rows in place of {self.rows_padded}"
        return "; ".join([text, *(f"{count} padded: {reason}" for reason, count in self.padded.items())])
