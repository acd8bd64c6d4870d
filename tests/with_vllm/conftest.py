"""Real engines and servers of vLLM, one at a time, started once a file, on small models with random weights."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or two ranks would need two NUMA nodes
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path.insert(0, str(Path(__file__).parent))

START = 300  # seconds that a server may take to answer, on a busy machine


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A model, 16 prompts of all methods for it, and texts: where they are, and what PEFT answers."""
    import models

    import fastprompt

    folder = tmp_path_factory.mktemp("vllm")
    prompts = folder / "prompts"
    prompts.mkdir()
    base = models.save_model(folder / "model")
    adapters = {None: base}
    for seed, (name, config) in enumerate(models.adapters(16).items()):
        adapters[name] = models.adapted(models.load(folder / "model"), config, seed)
        task_id = 0 if config.peft_type.value == "MULTITASK_PROMPT_TUNING" else None
        fastprompt.compile_prompt(adapters[name], task_id=task_id).save(prompts / f"{name}.safetensors")
    draw = random.Random(0)
    texts = [[draw.randrange(1, models.VOCABULARY) for _ in range(draw.randint(1, 45))] for _ in range(64)]

    def expected(name, token_ids, new_tokens, **options):
        return models.answer(adapters[name], token_ids, new_tokens, **options)

    return SimpleNamespace(
        folder=folder,
        model=str(folder / "model"),
        prompts=prompts,
        names=[name for name in adapters if name],
        adapters=adapters,
        texts=texts,
        expected=expected,
    )


@pytest.fixture(scope="module")
def start_engine():
    """A function that starts vLLM's offline engine, in place of one that it has started before."""
    from vllm import LLM

    engines = []

    def stop():
        while engines:
            engines.pop().llm_engine.engine_core.shutdown()

    def start(model, **options):
        stop()
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": 32, **options}
        engines.append(LLM(str(model), disable_log_stats=False, seed=0, **options))
        return engines[-1]

    yield start
    stop()


@pytest.fixture(scope="module")
def start_server(tmp_path_factory):
    """A function that starts vLLM's server with arguments; gives its address."""
    processes = []

    def start(model, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}"]
        command += ["--host=127.0.0.1", "--dtype=float32", "--enforce-eager", "--max-model-len=512", "--block-size=32"]
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, *arguments], stdout=stream, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True
            )
        processes.append(process)
        address = f"http://127.0.0.1:{port}"
        for _ in range(START):
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    return address
            except OSError:
                time.sleep(1)
        raise AssertionError(log.read_text()[-5000:])

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)  # a session of its own: the server and its workers
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
