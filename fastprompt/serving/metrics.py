"""What a server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

HUNG_UP = 499  # no status of HTTP: the client went away


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        waiting: gives the number of rows that wait.
        running: gives the number of rows that run.
        prompts: gives the number of prompts.
    """

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int], prompts: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fastprompt_requests",
            "requests by route and outcome (499: hung up)",
            ["route", "status"],
            registry=registry,
        )
        self.tokens = Counter("fastprompt_tokens", "tokens of texts and of answers", ["kind"], registry=registry)
        self.batch_rows = Histogram(
            "fastprompt_batch_rows", "rows of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.first_token = Histogram(
            "fastprompt_first_token_seconds",
            "from the acceptance of a row to its first token",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        for name, said, number in (
            ("fastprompt_waiting_rows", "rows that wait for a batch", waiting),
            ("fastprompt_running_rows", "rows of the running batch that are not finished", running),
            ("fastprompt_prompts", "prompts of the bank", prompts),
        ):
            Gauge(name, said, registry=registry).set_function(number)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
