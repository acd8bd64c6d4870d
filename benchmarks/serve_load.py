"""Load on ``fastprompt serve``'s application: 200 clients on loopback, prompts added and removed meanwhile, malformed
requests and clients that hang up. Every answer is compared with the text that ``bank.generate`` gives alone.

    python -m benchmarks serve_load [--quick]    two minutes, or 30 seconds
"""

import asyncio
import json
import random
import resource
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastprompt import PromptBank
from fastprompt.hf.prompt_state import Prompt
from fastprompt.serving.app import ServerOptions, create_app
from fastprompt.serving.compile import compiled

from . import report

CLIENTS, PROMPTS, NEW, TOKEN = 200, 16, 12, "load"
MALFORMED, HANG_UP = 0.1, 0.05  # of all requests
TEXTS = ("select", "a b c", "what is it", "one two three four five six")
BAD = (b"{", b"{}", b'{"model": "0", "prompt": ""}', b'{"model": "0", "prompt": "a", "logprobs": 3}')


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _bank(folder, sizes):
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=256, initializer_range=0.2, bos_token_id=None, eos_token_id=None)
    bank = PromptBank(LlamaForCausalLM(config).eval().requires_grad_(False))
    for index in range(PROMPTS):
        rows = 0.5 * torch.randn(3 + index, config.hidden_size)
        prompt = compiled(bank.base, Prompt("prompt-tuning", rows=rows), bank.fingerprint)
        prompt.save(Path(folder, f"{index}.safetensors"))
        bank.add(str(index), prompt)
    return bank


SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256,
)  # fmt: skip


class Load:
    """The clients of one run.

    Attributes:
        outcomes: how many requests ended how; wrong: answers that were another text.
    """

    def __init__(self, address, expected):
        self.address, self.expected = address, expected
        self.outcomes, self.wrong, self.times = Counter(), [], []

    async def run(self, seconds):
        self._end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.address, timeout=60, limits=limits) as http:
            await asyncio.gather(self._change(http), *(self._client(http, random.Random(i)) for i in range(CLIENTS)))

    async def _client(self, http, draw):
        while time.monotonic() < self._end:
            try:
                await self._request(http, draw)
            except (httpx.HTTPError, json.JSONDecodeError) as error:
                self.outcomes[f"failed: {type(error).__name__}"] += 1

    async def _request(self, http, draw):
        kind, path = draw.random(), "/v1/completions"
        if kind < MALFORMED:
            response = await http.post(path, content=draw.choice(BAD))
            self.outcomes["malformed refused" if response.status_code == 400 else "malformed NOT refused"] += 1
            return
        name, text, stream = str(draw.randrange(PROMPTS)), draw.choice(TEXTS), draw.random() < 0.5
        body = {"model": name, "prompt": text, "max_tokens": NEW, "temperature": 0, "stream": stream}
        start = time.monotonic()
        if kind < MALFORMED + HANG_UP:
            try:
                async with http.stream("POST", path, json=body, timeout=draw.random()):
                    pass
            except httpx.TimeoutException:
                pass
            self.outcomes["hung up"] += 1
            return
        response = await http.post(path, json=body)
        if response.status_code != 200:
            self.outcomes[str(response.status_code)] += 1
            await asyncio.sleep(float(response.headers.get("retry-after", 0)) * draw.random())
            return
        got = _streamed(response.text) if stream else response.json()["choices"][0]["text"]
        if got is None:
            self.outcomes["404 in a stream"] += 1
            return
        self.times.append(time.monotonic() - start)
        self.outcomes["answered"] += 1
        if got != self.expected[name, text]:
            self.wrong.append((name, text, got))

    async def _change(self, http):
        """Remove and add the second half of the prompts, one at a time."""
        draw, headers = random.Random(-1), {"Authorization": f"Bearer {TOKEN}"}
        while time.monotonic() < self._end:
            name = str(draw.randrange(PROMPTS // 2, PROMPTS))
            removed = await http.delete(f"/admin/prompts/{name}", headers=headers)
            await asyncio.sleep(0.05)
            source = {"path": f"{name}.safetensors"}
            added = await http.put(f"/admin/prompts/{name}", json=source, headers=headers)
            self.outcomes["prompts changed" if removed.is_success and added.is_success else "change FAILED"] += 1
            await asyncio.sleep(0.2)


def _streamed(text):
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    if events[-1] != "[DONE]":
        return None
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def run(out, quick=False, seconds=None):
    """Run and print; False if an answer was wrong, a request failed or a row was left."""
    seconds = seconds or (30 if quick else 120)
    with tempfile.TemporaryDirectory() as folder:
        bank, tokenizer = _bank(folder, SIZES), _tokenizer()
        expected = {}
        for name in bank.names:
            for text in TEXTS:
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                found = bank.generate(ids, prompts=name, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
                whole, front = tokenizer.decode(found[0]), tokenizer.decode(ids[0])
                expected[name, text] = whole[len(front) :]
        options = ServerOptions("base", max_queue=4 * CLIENTS, admin_token=TOKEN, admin_folder=Path(folder))
        app = create_app(bank, tokenizer, options)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        load = Load(f"http://127.0.0.1:{listening.getsockname()[1]}", expected)
        asyncio.run(load.run(min(5, seconds)))  # warm up, and as much memory as it takes
        before, started, counted = _resident(), time.monotonic(), Counter(load.outcomes)
        load.times.clear()
        asyncio.run(load.run(seconds))
        took, after = time.monotonic() - started, _resident()
        deadline = time.monotonic() + 30
        while not app.state.service.is_idle and time.monotonic() < deadline:
            time.sleep(0.05)
        left = app.state.service.batcher.waiting + app.state.service.batcher.running
        server.should_exit = True
        thread.join()
    outcomes = load.outcomes - counted
    rows = [[name, str(number)] for name, number in sorted(outcomes.items())]
    times = sorted(load.times)
    rows += [["wrong", str(len(load.wrong))], ["rows left", str(left)]]
    rows += [["answers/s", f"{len(times) / took:.1f}"]]
    rows += [[f"{part}% answered within s", f"{times[len(times) * part // 100]:.2f}"] for part in (50, 95, 99) if times]
    rows += [["resident MiB before, after", f"{before:.0f}, {after:.0f}"]]
    rows += [["peak resident MiB", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}"]]
    print(report.table([f"{CLIENTS} clients, {took:.0f} s", ""], rows), flush=True)
    bad = [name for name in outcomes if "NOT" in name or "FAILED" in name or name.startswith(("failed", "5"))]
    return not bad and not load.wrong and not left


def _resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
