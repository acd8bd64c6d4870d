"""``docs/serving_figures.md``: what ``serve.csv`` and ``serve_load.csv`` say, written anew by each of their runs."""

import csv
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "serving_figures.md"

HEAD = """# Serving, measured

Written by `python -m benchmarks serve` and `python -m benchmarks serve_load` from `serve.csv` and `serve_load.csv` in
`benchmarks/results/`: every number here is one of theirs.
"""

MIXED = """
## Many prompts in one batch

{rows} requests of {text} tokens, {new} new tokens each, greedy, behind prompts of P = {P}, to a random Llama of the
benchmarks' shape (6 layers, hidden 576, vocabulary 32768). Three ways answer them in turn, in one process: *mixed* is
`PromptBank.generate`, all rows in one batch; *PEFT* cannot mix prompts, and answers the requests of one prompt after
the other; *bare* is the frozen model on as many tokens as prompt and text together, which knows no prompt at all. A
line counts only if every row's tokens were PEFT's.

- *Tokens/s*: new tokens of all rows over the time of the whole call, prefill included.
- *First token*: until every row has its first one; PEFT's is the sum over its prompts.
- *Step*: the median decoding step, mixed over bare, on caches of one length.
- *A prompt*: memory of a compiled prompt in the bank, and of what PEFT keeps of the same adapter.
"""

LOAD = """
## A server under load

`fastprompt serve` in a process of its own, and on the same machine {clients} clients at once, each with one request
after the other for {seconds} seconds, half of them streaming, greedy, 12 new tokens behind 16 prompts of a tiny Llama:
this measures the server, not the model. Half of the prompts are removed and added again all the time (their requests
may get 404), a tenth of the requests is malformed (every one has to be refused with the status that says why), one in
twenty clients hangs up in the middle of its request or its answer. Each answer is compared with the text that
`PromptBank.generate` gives that row alone. At the end SIGTERM comes while all of that goes on: requests that were
accepted have to be answered, others refused with 503 or no connection, and the process has to exit with 0.
"""


def write(results: Path) -> None:
    """Write the document from the CSVs in ``results``."""
    DOCUMENT.write_text(document(results), encoding="utf-8")


def document(results: Path) -> str:
    """The document; a benchmark that has no CSV there has no section."""
    sections = [HEAD]
    for name, section in (("serve.csv", _mixed), ("serve_load.csv", _load)):
        if (results / name).exists():
            machine, records = _read(results / name)
            sections += [section(records), "\n" + ";\n".join(machine) + ".\n"]
    return "".join(sections)


def _read(file):
    """The comment lines on top, and the records."""
    lines = file.read_text(encoding="utf-8").splitlines()
    machine = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    return machine, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def _mixed(records):
    ways = ("mixed", "PEFT", "bare")
    columns = ["prompts", "of them in the batch", *(f"{way}, tokens/s" for way in ways), "over PEFT"]
    columns += [*(f"{way}, first token, ms" for way in ways), "step", "a prompt, KiB", "PEFT's, KiB"]
    names = ["prompts", "in the batch", *(f"{way} tokens/s" for way in ways), "over PEFT"]
    names += [*(f"{way} first ms" for way in ways), "step over bare", "KiB a prompt", "PEFT KiB"]
    rows = [[record[name] for name in names] for record in records]
    picture = "\n![Tokens a second and time to the first token](../benchmarks/results/serve.png)\n"
    return MIXED.format(**records[0]) + _table(columns, rows) + picture


def _load(records):
    numbers = {record["what"]: record["number"] for record in records}
    return LOAD.format(**numbers) + _table(["", ""], list(numbers.items()))


def _table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
