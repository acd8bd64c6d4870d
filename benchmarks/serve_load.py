"""Load on ``fastprompt serve``, a process of its own: 200 clients on loopback, prompts removed and added meanwhile,
malformed requests and clients that hang up, and SIGTERM while all of that goes on. Every answer is compared with the
text that ``bank.generate`` gives alone.

    python -m benchmarks serve_load [--quick]    two minutes, or 30 seconds
"""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastprompt import PromptBank
from fastprompt.hf.prompt_state import Prompt
from fastprompt.serve import TOKEN
from fastprompt.serving.compile import compiled

from . import report, serving_figures

CLIENTS, PROMPTS, NEW, LARGEST = 200, 16, 12, 4096
WARM_UP = 15  # seconds, for as much memory as it takes
PARTS = (50, 95, 99)  # percent of the answers
MALFORMED, HANG_UP = 0.1, 0.05  # of all requests
TEXTS = ("select", "a b c", "what is it", "one two three four five six", "Gr\u00fc\u00dfe, \U0001f600")
ROUTE, SECRET = "/v1/completions", "load"
ENDING, REFUSED = "status 503", "connection refused"  # what only a server that ends may answer
FAILED = "FAILED: "
SIZES = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


def _asking(**fields):
    return json.dumps({"model": "0", "prompt": "a", **fields}).encode()


# Bodies, and the status that each is answered with.
BAD = [
    (b"{", 400),
    (b"{}", 400),
    (b"[" * 3000, 400),
    (b"\xff\xfe", 400),
    (_asking(prompt=""), 400),
    (_asking(prompt={"text": "a"}), 400),
    (_asking(prompt="a" * 300), 400),  # longer than the model's context
    (_asking(max_tokens=-1), 400),
    (_asking(max_tokens="many"), 400),
    (_asking(temperature=float("nan")), 400),
    (_asking(logprobs=3), 400),
    (_asking(n=10**6), 400),
    (_asking(stop=[""]), 400),
    (_asking(model="nobody"), 404),
    (_asking(prompt="a" * LARGEST), 413),
]


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _write(folder):
    """A model in ``base``, and prompts in ``prompts``; returns what follows each text behind each prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, initializer_range=0.2, bos_token_id=None, eos_token_id=None)
    bank, tokenizer = PromptBank(LlamaForCausalLM(config).eval().requires_grad_(False)), _tokenizer()
    bank.base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "prompts").mkdir()
    expected = {}
    for index in range(PROMPTS):
        name, rows = str(index), 0.5 * torch.randn(3 + index, config.hidden_size)
        prompt = compiled(bank.base, Prompt("prompt-tuning", rows=rows), bank.fingerprint)
        prompt.save(folder / "prompts" / f"{name}.safetensors")
        bank.add(name, prompt)
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            found = bank.generate(ids, prompts=name, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            expected[name, text] = tokenizer.decode(found[0, ids.shape[1] :])
    return expected


@contextmanager
def _server(folder):
    """``fastprompt serve`` on what stands in a folder: its process, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prompts = str(folder / "prompts")
    command = ["serve", "--base", str(folder / "base"), "--prompts", prompts, "--port", str(port)]
    command += ["--admin-folder", prompts, "--max-queue", str(4 * CLIENTS), "--max-body", str(LARGEST)]
    environment, address = {**os.environ, TOKEN: SECRET}, f"http://127.0.0.1:{port}"
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "fastprompt.cli", *command], env=environment, stderr=log)
    try:
        while True:
            try:
                httpx.get(f"{address}/health")
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text()) from None
                time.sleep(0.1)
        yield process, address
    finally:
        process.kill()
        process.wait()


class Load:
    """The clients of one run, each of which asks until it is refused at the end.

    Attributes:
        outcomes: how many requests ended how, since it was emptied last.
        wrong: answers that were another text; times: seconds of the right ones.
    """

    def __init__(self, address, expected):
        self.address, self.expected = address, expected
        self.outcomes, self.wrong, self.times = Counter(), [], []
        self.waiting, self._ending = 0, False

    def start(self):
        """Tasks that end after `end`, each with connections of its own."""
        tasks = [self._change(), *(self._client(random.Random(index)) for index in range(CLIENTS))]
        return [asyncio.create_task(task) for task in tasks]

    def end(self):
        """From now on the server may refuse."""
        self._ending = True

    def _http(self):
        # Without verification: there is no TLS, and certificates for 200 clients would be read for nothing.
        return httpx.AsyncClient(base_url=self.address, timeout=120, verify=False)

    async def _client(self, draw):
        refused = False
        async with self._http() as http:
            while not (refused and self._ending):
                self.waiting += 1
                try:
                    outcome = await self._request(http, draw)
                except httpx.ConnectError:
                    outcome = REFUSED
                except (httpx.HTTPError, json.JSONDecodeError) as error:
                    outcome = f"{FAILED}{error!r}"
                self.waiting -= 1
                self.outcomes[outcome] += 1
                refused = outcome in (ENDING, REFUSED)

    async def _request(self, http, draw):
        """One request; returns how it ended."""
        kind = draw.random()
        if kind < MALFORMED:
            body, status = draw.choice(BAD)
            response = await http.post(ROUTE, content=body)
            if response.status_code in (status, 503):
                return "malformed, refused" if response.status_code == status else ENDING
            return f"{FAILED}malformed, but status {response.status_code}"
        name, text, stream = str(draw.randrange(PROMPTS)), draw.choice(TEXTS), draw.random() < 0.5
        body = {"model": name, "prompt": text, "max_tokens": NEW, "temperature": 0, "stream": stream}
        if kind < MALFORMED + HANG_UP:
            return await self._hang_up(http, body, draw)
        start = time.monotonic()
        response = await http.post(ROUTE, json=body)
        if response.status_code != 200:
            await asyncio.sleep(float(response.headers.get("retry-after", 0)) * draw.random())
            known = response.status_code in (404, 429, 503)
            return f"{'' if known else FAILED}status {response.status_code}"
        got = _streamed(response.text) if stream else response.json()["choices"][0]["text"]
        if got is None:
            return "404 in a stream"
        self.times.append(time.monotonic() - start)
        if got != self.expected[name, text]:
            self.wrong.append((name, text, got))
        return "answered"

    async def _hang_up(self, http, body, draw):
        """Go in the middle of the body, or of the answer."""

        async def half():
            yield json.dumps(body).encode()[: draw.randrange(20)]
            raise httpx.WriteTimeout("enough")

        content = {"content": half()} if draw.random() < 0.3 else {"json": body}
        try:
            async with http.stream("POST", ROUTE, timeout=draw.random(), **content) as response:
                return ENDING if response.status_code == 503 else "hung up"
        except httpx.TimeoutException:
            return "hung up"

    async def _change(self):
        """Remove and add the second half of the prompts, one at a time."""
        draw, headers = random.Random(-1), {"Authorization": f"Bearer {SECRET}"}
        async with self._http() as http:
            while not self._ending:
                name = str(draw.randrange(PROMPTS // 2, PROMPTS))
                path, source = f"/admin/prompts/{name}", {"path": f"{name}.safetensors"}
                removed = await http.delete(path, headers=headers)
                await asyncio.sleep(0.05)
                if self._ending:
                    break
                added = await http.put(path, json=source, headers=headers)
                changed = removed.is_success and added.is_success
                self.outcomes[f"{'' if changed else FAILED}change of a prompt"] += 1
                await asyncio.sleep(0.2)


def _streamed(text):
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    if events[-1] != "[DONE]":
        return None
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def run(out, quick=False):
    """Run, print, and write ``serve_load.csv`` into ``out``; False if an answer was wrong, a request failed or was left
    without an answer, or the server did not end by itself."""
    with tempfile.TemporaryDirectory() as name:
        expected = _write(Path(name))
        with _server(Path(name)) as (process, address):
            record, right = asyncio.run(_measure(process, address, expected, 30 if quick else 120))
        if not right:
            print((Path(name) / "log").read_text())
    rows = [{"what": what, "number": str(number)} for what, number in record.items()]
    print(report.table(["what", "number"], [list(row.values()) for row in rows]), flush=True)
    report.write_csv(out / "serve_load.csv", rows)
    if right and not quick:
        serving_figures.write(out)
    return right


async def _measure(process, address, expected, seconds):
    """What is reported, and whether all was right."""
    load = Load(address, expected)
    tasks = load.start()
    await asyncio.sleep(WARM_UP)
    load.outcomes.clear()
    load.times.clear()
    resident, started = [_memory(process, "VmRSS")], time.monotonic()
    for _ in range(2):
        await asyncio.sleep(seconds / 2)
        resident.append(_memory(process, "VmRSS"))
    took, peak, times = time.monotonic() - started, _memory(process, "VmHWM"), sorted(load.times)
    under_load, waiting = Counter(load.outcomes), load.waiting
    load.outcomes.clear()
    load.end()
    process.send_signal(signal.SIGTERM)
    _, stuck = await asyncio.wait(tasks, timeout=120)
    for task in stuck:
        task.cancel()
    try:
        status = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        status = "runs on"
    record = {
        "clients": CLIENTS,
        "seconds": f"{took:.0f}",
        **dict(sorted(under_load.items())),
        "wrong answers": len(load.wrong),
        "answers a second": f"{len(times) / took:.1f}",
        **{f"seconds to {part}% of the answers": f"{times[len(times) * part // 100]:.2f}" for part in PARTS if times},
        "resident MiB at the start, in the middle, at the end": ", ".join(f"{x:.1f}" for x in resident),
        "resident MiB at most": f"{peak:.1f}",
        "requests that wait for an answer at SIGTERM": waiting,
        **{f"after SIGTERM: {name}": number for name, number in sorted(load.outcomes.items())},
        "clients without an answer": len(stuck),
        "exit status": status,
    }
    bad = [name for name in under_load if name in (ENDING, REFUSED)]
    bad += [name for name in under_load + load.outcomes if name.startswith(FAILED)]
    return record, not bad and not load.wrong and not stuck and status == 0


def _memory(process, field):
    """MiB of a process, by Linux."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024
