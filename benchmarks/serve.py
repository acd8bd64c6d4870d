"""Answers to 32 requests over many prompts of one frozen model: a bank's mixed batch, PEFT grouped by prompt, and the
bare model, which is given as many tokens as prompt and text together.

PEFT cannot mix prompts in a batch, so it answers the requests of each prompt in turn. The first token is there when the
last row has its first; PEFT then needs not have finished the other rows. A decoding step is what each of the other
tokens takes, on a cache of the same length in the mixed batch and in the bare model.
"""

from statistics import median

import torch
from peft import PromptTuningConfig, get_peft_model
from tqdm import tqdm

from fastprompt import PromptBank, compile_prompt
from fastprompt.peft.renamed_cache import right_generation

from . import models, report
from .timing import seconds_of

ROWS, PROMPT, TEXT, NEW = 32, 100, 24, 64
NUMBERS = (1, 8, 16, 64, 500)  # of prompts


class Requests:
    """Requests to some of the first ``number`` prompts of a model, in turn."""

    def __init__(self, bank, peft_model, number, new):
        self.bank, self.peft, self.new, base = bank, peft_model, new, bank.base
        vocabulary = base.config.vocab_size
        generator = torch.Generator().manual_seed(number)
        self.ids = torch.randint(3, vocabulary, (ROWS, TEXT), generator=generator)
        self.long = torch.randint(3, vocabulary, (ROWS, PROMPT + TEXT), generator=generator)
        names = list(peft_model.peft_config)[:number]
        self.names = [names[row * max(number // ROWS, 1) % number] for row in range(ROWS)]

    def mixed(self, new=None):
        """The new tokens of all rows, ``[B, new]``."""
        return self.bank.generate(self.ids, prompts=self.names, **self._options(new))[:, TEXT:]

    def grouped(self, new=None):
        """The same by PEFT."""
        found = torch.empty(ROWS, new or self.new, dtype=torch.int64)
        for name in dict.fromkeys(self.names):
            members = [row for row, own in enumerate(self.names) if own == name]
            ids = self.ids[members]
            self.peft.set_adapter(name)
            with right_generation(self.peft):
                got = self.peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **self._options(new))
            found[members] = got[:, TEXT:]
        return found

    def bare(self, new=None):
        """As many tokens of the bare model, behind as many."""
        mask = torch.ones_like(self.long)
        return self.bank.base.generate(self.long, attention_mask=mask, **self._options(new))[:, -(new or self.new) :]

    def _options(self, new):
        return dict(max_new_tokens=new or self.new, do_sample=False, eos_token_id=None, pad_token_id=0)


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
        records.append(_measure(Requests(bank, peft_model, number, new), number, 1 if quick else 3))
        print(report.table(list(records[0]), [[str(x) for x in record.values()] for record in records]), flush=True)
    report.write_csv(out / "serve.csv", records)
    right = all(record["over PEFT"] != "WRONG" for record in records)
    if right:
        _plot(records, out / "serve.png")
    return right


def _measure(requests, number, rounds):
    right = torch.equal(requests.mixed(), requests.grouped())
    ways = {"PEFT": requests.grouped, "mixed": requests.mixed, "bare": requests.bare}
    first, whole = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc=f"{number} prompts", unit="round"):
        for name, way in ways.items():
            first[name].append(seconds_of(lambda way=way: way(1)))
            whole[name].append(seconds_of(way))
    tokens = ROWS * requests.new
    steps = [
        [(a - b) / (requests.new - 1) for a, b in zip(whole[name], first[name])] for name in ("mixed", "bare")
    ]  # seconds of a decoding step
    held = requests.bank[requests.names[0]].nbytes
    encoder = sum(x.nbytes for x in requests.peft.prompt_encoder[requests.names[0]].parameters())
    return {
        "prompts": number,
        "in the batch": len(set(requests.names)),
        **{f"{name} tokens/s": f"{tokens / median(whole[name]):.0f}" for name in ways},
        "over PEFT": f"{median(a / b for a, b in zip(whole['PEFT'], whole['mixed'])):.2f}" if right else "WRONG",
        **{f"{name} first ms": f"{median(first[name]) * 1e3:.0f}" for name in ways},
        "step over bare": f"{median(a / b for a, b in zip(*steps)):.3f}",
        "KiB a prompt": f"{held / 1024:.0f}",
        "PEFT KiB": f"{encoder / 1024:.0f}",
    }


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
