"""Answers to 32 requests over many prompts of one frozen model: a bank's mixed batch, PEFT grouped by prompt, and the
bare model, which is given as many tokens as prompt and text together.

PEFT cannot mix prompts in a batch, so it answers the requests of each prompt in turn; its time to the first token is
the sum over the prompts, as if it gave every row its first before any row a second. A decoding step of the mixed batch
is compared with the one of the bare model on a cache of the same length that runs right before or behind it: the two
calls of ``generate`` take turns, step by step, so that what else the machine does meets both.
"""

from concurrent.futures import ThreadPoolExecutor
from statistics import median
from threading import Condition
from time import perf_counter

import torch
from peft import PromptTuningConfig, get_peft_model
from tqdm import tqdm
from transformers import StoppingCriteria

from fastprompt import PromptBank, compile_prompt
from fastprompt.peft.renamed_cache import right_generation

from . import models, report, serving_figures

ROWS, PROMPT, TEXT, NEW = 32, 100, 24, 64
ROUNDS = 3
NUMBERS = (1, 8, 16, 64, 500)  # of prompts


class Clock(StoppingCriteria):
    """Stops nothing, and notes when each token was there.

    Attributes:
        first: seconds to the first token, summed over the calls of ``generate``.
        steps: seconds of the others.
    """

    def __init__(self):
        self.first, self.steps = 0.0, []

    def start(self):
        self._last, self._is_first = perf_counter(), True
        return self

    def wait(self):
        """Before the next step."""

    def __call__(self, input_ids, scores, **kwargs):
        now = perf_counter()
        if self._is_first:
            self.first += now - self._last
        else:
            self.steps.append(now - self._last)
        self.wait()
        self._last, self._is_first = perf_counter(), False
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Turns:
    """Clocks of calls that run in threads of their own, one step each at a time."""

    def __init__(self, names):
        self.names, self.clocks = list(names), {name: _ClockOfTurns(self, name) for name in names}
        self._changed = Condition()

    def take(self, name):
        """Wait until it is the turn of ``name``."""
        with self._changed:
            self._changed.wait_for(lambda: self.names[0] == name)

    def give(self, name):
        """It is the turn of the next one."""
        with self._changed:
            self.names.remove(name)
            self.names.append(name)
            self._changed.notify_all()


class _ClockOfTurns(Clock):
    def __init__(self, turns, name):
        super().__init__()
        self._turns, self._name = turns, name

    def wait(self):
        self._turns.give(self._name)
        self._turns.take(self._name)


class Requests:
    """Requests to some of the first ``number`` prompts of a model, in turn."""

    def __init__(self, bank, peft_model, number, new):
        self.bank, self.peft, self.new = bank, peft_model, new
        vocabulary = bank.base.config.vocab_size
        generator = torch.Generator().manual_seed(number)
        self.ids = torch.randint(3, vocabulary, (ROWS, TEXT), generator=generator)
        self.long = torch.randint(3, vocabulary, (ROWS, PROMPT + TEXT), generator=generator)
        names = list(peft_model.peft_config)[:number]
        self.names = [names[row * max(number // ROWS, 1) % number] for row in range(ROWS)]

    def mixed(self, clock):
        """The new tokens of all rows, ``[B, new]``."""
        return self.bank.generate(self.ids, prompts=self.names, **self._options(clock))[:, TEXT:]

    def grouped(self, clock):
        """The same by PEFT."""
        found = torch.empty(ROWS, self.new, dtype=torch.int64)
        for name in dict.fromkeys(self.names):
            members = [row for row, own in enumerate(self.names) if own == name]
            ids = self.ids[members]
            self.peft.set_adapter(name)
            with right_generation(self.peft):
                got = self.peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **self._options(clock))
            found[members] = got[:, TEXT:]
        return found

    def bare(self, clock):
        """As many tokens of the bare model, behind as many."""
        mask = torch.ones_like(self.long)
        return self.bank.base.generate(self.long, attention_mask=mask, **self._options(clock))[:, -self.new :]

    def _options(self, clock):
        options = dict(max_new_tokens=self.new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return dict(options, stopping_criteria=[clock.start()])


def run(out, quick=False, sizes=models.SIZES, numbers=NUMBERS, new=NEW):
    """Run, print, and write ``serve.csv`` and ``serve.png`` into ``out``; False if a row's tokens are not PEFT's."""
    numbers = numbers[:2] if quick else numbers
    base = models.llama(sizes).eval()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
    torch.manual_seed(1)
    peft_model = get_peft_model(base, config, adapter_name="0").eval()
    bank = PromptBank(base)
    records = []
    for number in numbers:
        while len(bank) < number:
            name = str(len(bank))
            if name != "0":
                peft_model.add_adapter(name, config)
            bank.add(name, compile_prompt(peft_model, name))
        records.append(_measure(Requests(bank, peft_model, number, new), number, 1 if quick else ROUNDS))
        print(report.table(list(records[0]), [[str(x) for x in record.values()] for record in records]), flush=True)
    report.write_csv(out / "serve.csv", records)
    right = all(record["over PEFT"] != "WRONG" for record in records)
    if right:
        _plot(records, out / "serve.png")
    if right and not quick:
        serving_figures.write(out)
    return right


def _measure(requests, number, rounds):
    ways = {"PEFT": requests.grouped, "mixed": requests.mixed, "bare": requests.bare}
    for name in ("mixed", "bare"):  # warm up
        ways[name](Clock())
    first, whole, ratios = {name: [] for name in ways}, {name: [] for name in ways}, []
    right = True
    for _ in tqdm(range(rounds), desc=f"{number} prompts", unit="round"):
        found = {}
        for name, way in ways.items():
            clock, start = Clock(), perf_counter()
            found[name] = way(clock)
            whole[name].append(perf_counter() - start)
            first[name].append(clock.first)
        ratios += _step_ratios(requests)
        right &= torch.equal(found["PEFT"], found["mixed"])
    tokens = ROWS * requests.new
    held = requests.bank[requests.names[0]].nbytes
    encoder = sum(x.nbytes for x in requests.peft.prompt_encoder[requests.names[0]].parameters())
    return {
        "rows": ROWS,
        "P": PROMPT,
        "text": TEXT,
        "new": requests.new,
        "prompts": number,
        "in the batch": len(set(requests.names)),
        **{f"{name} tokens/s": f"{tokens / median(whole[name]):.0f}" for name in ways},
        "over PEFT": f"{median(a / b for a, b in zip(whole['PEFT'], whole['mixed'])):.2f}" if right else "WRONG",
        **{f"{name} first ms": f"{median(first[name]) * 1e3:.0f}" for name in ways},
        "step over bare": f"{median(ratios):.3f}",
        "KiB a prompt": f"{held / 1024:.0f}",
        "PEFT KiB": f"{encoder / 1024:.0f}",
    }


def _step_ratios(requests):
    """Of the decoding steps of the mixed batch to those of the bare model."""
    ways, turns = {"mixed": requests.mixed, "bare": requests.bare}, Turns(["mixed", "bare"])

    def run(name):
        turns.take(name)
        ways[name](turns.clocks[name])
        turns.give(name)

    with ThreadPoolExecutor(len(ways)) as pool:
        list(pool.map(run, ways))
    return [a / b for a, b in zip(*(turns.clocks[name].steps for name in ways))]


def _plot(records, file):
    figure = report.figure(8, 4)
    if figure is None:
        return
    left, right = figure.subplots(1, 2)
    numbers = [str(record["prompts"]) for record in records]
    for name, label in (("mixed", "mixed batch"), ("PEFT", "PEFT, by prompt"), ("bare", "bare model")):
        left.plot(numbers, [float(record[f"{name} tokens/s"]) for record in records], "o-", label=label)
        right.plot(numbers, [float(record[f"{name} first ms"]) for record in records], "o-", label=label)
    left.set(xlabel="prompts", ylabel=f"tokens a second, {ROWS} rows", ylim=0)
    right.set(xlabel="prompts", ylabel="ms to the first token of all rows", yscale="log")
    left.legend(fontsize="small")
    figure.savefig(file, dpi=120)
