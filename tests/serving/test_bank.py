"""PromptBank: hundreds of prompts by name, a budget, changes while requests run, scoring."""

import copy
import gc
import queue
import random
import threading
from pathlib import Path

import pytest
import torch
from needs import cases, needs_states
from parity import METHODS, PREFIXES, peft_model
from serving_models import NEW, PROMPTS, WIDTH, bank_of, embeddings, frozen, logits_alone, ready, texts

from fastprompt import CompiledPrompt, MultitaskPromptTuning, PromptBank, PromptTuning, SoftPromptModel, compile_prompt
from fastprompt.hf.prompt_state import Prompt
from fastprompt.peft.renamed_cache import right_generation
from fastprompt.serving.batching import Batcher, Row
from fastprompt.serving.compile import compiled
from fastprompt.serving.sampling import Sampling
from fastprompt.serving.text import TextStream

GREEDY = dict(max_new_tokens=NEW, do_sample=False)


@pytest.fixture(scope="module")
def base():
    return frozen("llama")


def rows_of(bank, sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for index, size in enumerate(sizes):
        rows = 0.5 * torch.randn(size, 48, generator=generator)
        bank.add(f"prompt {index}", compiled(bank.base, Prompt("prompt-tuning", rows=rows), bank.fingerprint))
    return bank


def test_200_mixed_requests_equal_peft_one_prompt_at_a_time(base):
    """Every method, several lengths, texts of several lengths; PEFT runs each prompt's requests by themselves."""
    bank, tasks, adapters = PromptBank(base), {}, {}
    for method in METHODS:
        for length in (5,) if method == "cpt" else (2, 5, 11):
            name = f"{method} {length}"
            adapters[name] = peft_model(None, method, base=base, length=length).eval()
            tasks[name] = length % 3 if method == "multitask" else None
            bank.add(name, compile_prompt(adapters[name], task_id=tasks[name]))
    ready(base)
    draw = random.Random(0)
    names = [draw.choice([*bank.names, None]) for _ in range(200)]
    ids, mask = texts("left", lengths=[draw.randint(1, WIDTH) for _ in names])
    ids = torch.randint(3, 90, ids.shape, generator=torch.Generator().manual_seed(1))
    got = torch.cat([
        bank.generate(ids[i : i + 40], mask[i : i + 40], prompts=names[i : i + 40], **GREEDY) for i in range(0, 200, 40)
    ])[:, WIDTH:]  # fmt: skip
    assert len({name for name in names}) == len(bank) + 1
    for name, length in sorted({(name or "", int(n)) for name, n in zip(names, mask.sum(1))}):
        members = [i for i in range(200) if (names[i] or "") == name and int(mask[i].sum()) == length]
        given = dict(input_ids=ids[members, WIDTH - length :], **GREEDY)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if not name:
            assert torch.equal(base.generate(**given)[:, -NEW:], got[members])
            continue
        if tasks[name] is not None:
            given["task_ids"] = torch.full((len(members),), tasks[name])
        with right_generation(adapters[name]):
            assert torch.equal(adapters[name].generate(**given)[:, -NEW:], got[members]), name


def test_500_prompts_of_mixed_lengths(base):
    bank = rows_of(PromptBank(base), [1 + i % 13 for i in range(500)])
    assert len(bank) == 500 and bank.names[0] == "prompt 0" and "prompt 499" in bank
    assert bank.nbytes == sum(bank[name].nbytes for name in bank.names)
    assert bank["prompt 12"].nbytes == 2 * 3 * 13 * 2 * 8 * 4  # keys and values, layers, positions, heads, width, bytes
    names = [f"prompt {i}" for i in range(0, 500, 8)]
    ids, _ = texts("none", lengths=[WIDTH] * len(names))
    sequences = bank.generate(ids, prompts=names, **GREEDY)
    for row in (0, 20, 62):
        assert torch.equal(bank.generate(ids[row : row + 1], prompts=names[row], **GREEDY)[0], sequences[row])


def test_every_source_of_a_prompt(base, tmp_path):
    model = peft_model(None, "p_tuning_mlp", base=base).eval()
    expected = compile_prompt(model)
    model.save_pretrained(tmp_path / "adapter")
    expected.save(tmp_path / "prompt.safetensors")
    bank = PromptBank(base)
    for name, source in (
        ("compiled", expected),
        ("file", tmp_path / "prompt.safetensors"),
        ("folder", str(tmp_path / "adapter")),
    ):
        bank.add(name, source)
        for ours, theirs in zip(bank[name].state.tensors, expected.state.tensors):
            torch.testing.assert_close(ours, theirs)
    own = SoftPromptModel(copy.deepcopy(base), MultitaskPromptTuning(4, 48, 3))
    own.save_pretrained(tmp_path / "tasks")
    bank.add("task", tmp_path / "tasks", task_id=2)
    for ours, theirs in zip(bank["task"].state.tensors, compile_prompt(own, task_id=2).state.tensors):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="task_id must be one of the 3 prompts"):
        bank.add("task", tmp_path / "tasks")
    with pytest.raises(ValueError, match="task_id must be None for a compiled prompt"):
        bank.add("file", tmp_path / "prompt.safetensors", task_id=1)


@pytest.mark.parametrize("method", PREFIXES)
def test_a_folder_of_learned_keys_and_values(base, method, tmp_path):
    model = peft_model(None, method, base=base).eval()
    model.save_pretrained(tmp_path)
    bank = PromptBank(base)
    bank.add("learned", tmp_path)
    for ours, theirs in zip(bank["learned"].state.tensors, compile_prompt(model).state.tensors):
        torch.testing.assert_close(ours, theirs)


def test_what_does_not_belong_is_refused(base, tmp_path):
    bank, other = PromptBank(base), frozen("llama", seed=1)
    prompt = compile_prompt(SoftPromptModel(other, PromptTuning(3, 48)))
    with pytest.raises(ValueError, match=f"fingerprint {prompt.fingerprint}, this one has {bank.fingerprint}"):
        bank.add("other", prompt)
    for name, source, error, message in (
        ("", prompt, TypeError, "name must be a string"),
        (3, prompt, TypeError, "name must be a string"),
        ("x", 3, TypeError, "prompt must be a CompiledPrompt, a file or an adapter's folder, got int"),
        ("x", tmp_path / "no", FileNotFoundError, "path must name a compiled prompt"),
        ("x", tmp_path, FileNotFoundError, "directory must hold adapter_config.json"),
    ):
        with pytest.raises(error, match=message):
            bank.add(name, source)
    assert len(bank) == 0
    with pytest.raises(KeyError):
        bank.remove("x")
    with pytest.raises(TypeError, match="base must be a model of transformers, got PeftModel"):
        PromptBank(peft_model(None, base=base))
    with pytest.raises(ValueError, match="max_bytes must not be negative"):
        PromptBank(base, max_bytes=-1)


def test_what_is_used_least_goes_to_disk_and_comes_back(base, tmp_path):
    one = rows_of(PromptBank(base), [4]).nbytes
    bank = rows_of(PromptBank(base, max_bytes=2 * one, folder=tmp_path), [4] * 5)
    ids, mask = texts()
    assert bank.nbytes == 2 * one and len(list(tmp_path.iterdir())) == 3 and len(bank) == 5
    expected = rows_of(PromptBank(base), [4] * 5).generate(
        ids, mask, prompts=[f"prompt {i}" for i in (0, 4, 1, 0)], **GREEDY
    )
    assert torch.equal(bank.generate(ids, mask, prompts=[f"prompt {i}" for i in (0, 4, 1, 0)], **GREEDY), expected)
    assert bank.nbytes == 2 * one
    for name in bank.names:
        assert bank[name].nbytes == one
    assert len(list(tmp_path.iterdir())) == 5 and bank.nbytes == 2 * one
    bank.add("prompt 0", bank["prompt 4"])
    for name in bank.names:
        bank.remove(name)
    assert bank.nbytes == 0 and not list(tmp_path.iterdir())


def test_a_budget_of_nothing_keeps_all_on_disk(base):
    bank = rows_of(PromptBank(base, max_bytes=0), [4, 2])
    ids, mask = texts()
    names = ["prompt 0", "prompt 1", None, "prompt 0"]
    expected = rows_of(PromptBank(base), [4, 2]).generate(ids, mask, prompts=names, **GREEDY)
    assert torch.equal(bank.generate(ids, mask, prompts=names, **GREEDY), expected) and bank.nbytes == 0
    folder = Path(bank._folder)
    assert len(list(folder.iterdir())) == 2
    del bank
    gc.collect()
    assert not folder.exists()


def test_prompts_come_and_go_while_requests_run(base):
    """Four threads ask, one changes the bank: every answer is that of the prompt which had the name at some time."""
    bank = rows_of(PromptBank(base, max_bytes=6000), [3, 5, 8])
    versions = [rows_of(PromptBank(base), [3, 5, 8], seed)["prompt 2"] for seed in (0, 1)]
    ids, mask = texts()
    names, found, errors, stop = ["prompt 0", "prompt 1", None, "prompt 2"], [], [], threading.Event()
    answers = []
    for version in versions:
        bank.add("prompt 2", version)
        answers.append(bank.generate(ids, mask, prompts=names, **GREEDY))
    assert not torch.equal(*answers)

    def ask():
        try:
            for _ in range(12):
                found.append(bank.generate(ids, mask, prompts=names, **GREEDY))
        except Exception as error:
            errors.append(error)

    def change():
        turn = 0
        while not stop.is_set():
            bank.add("prompt 2", versions[turn % 2])
            bank.add(f"extra {turn % 3}", versions[0])
            bank.names, bank.nbytes, len(bank)  # noqa: B018
            if turn % 3 == 2:
                bank.remove(f"extra {turn % 3}")
            turn += 1

    threads = [threading.Thread(target=ask) for _ in range(4)]
    changing = threading.Thread(target=change)
    for thread in (*threads, changing):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    changing.join()
    assert not errors and len(found) == 48
    assert all(any(torch.equal(one, answer) for answer in answers) for one in found)


@pytest.mark.parametrize("name", cases(["llama", "mistral_window", "qwen3_5_text"], {"qwen3_5_text": needs_states}))
@pytest.mark.parametrize("padding", ["left", "right"])
def test_log_probabilities_of_completions(name, padding):
    model = frozen(name)
    bank, (ids, mask) = bank_of(model), texts(padding)
    for completions in ([[5], [9], [30]], [[5, 7, 11], [9], [30, 31]]):
        scores = bank.logprobs(ids, mask, completions=completions, prompts=PROMPTS)
        assert scores.shape == (4, 3) and scores.dtype == torch.float32
        for row, prompt in enumerate(PROMPTS):
            for column, tokens in enumerate(completions):
                text = torch.cat([ids[row, mask[row].bool()], torch.tensor(tokens)])
                steps = logits_alone(model, prompt, text)[-len(tokens) - 1 : -1].log_softmax(-1)
                expected = steps[range(len(tokens)), tokens].sum()
                torch.testing.assert_close(scores[row, column], expected, rtol=1e-4, atol=1e-4)
    each = bank.logprobs(ids, mask, completions=[[[5]], [[9, 5]], [[1], [2, 3]], [[4]]], prompts=PROMPTS)
    assert [len(x) for x in each] == [1, 1, 2, 1]
    torch.testing.assert_close(each[0], bank.logprobs(ids, mask, completions=[[5]], prompts=PROMPTS)[0])


def test_classification_by_verbaliser(base):
    bank, (ids, mask) = bank_of(base), texts()
    verbaliser = {"animal": [5, 7], "plant": [9], "stone": [30, 2, 2]}
    scores = bank.logprobs(ids, mask, completions=list(verbaliser.values()), prompts=PROMPTS)
    expected = [list(verbaliser)[i] for i in scores.argmax(1)]
    assert bank.classify(ids, mask, verbaliser=verbaliser, prompts=PROMPTS) == expected


@pytest.mark.parametrize("options", [dict(encoder_repetition_penalty=9.0), dict(encoder_no_repeat_ngram_size=1)])
def test_penalties_of_the_input_count_its_text_alone(base, options):
    bank, (ids, mask) = bank_of(base), texts()
    options |= dict(max_new_tokens=5, do_sample=False)
    mixed = bank.generate(ids, mask, prompts=PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = bank.generate(ids[row][mask[row].bool()][None], prompts=prompt, **options)
        assert torch.equal(mixed[row, -5:], alone[0, -5:]), row


def test_wrong_completions_are_refused(base):
    bank, (ids, mask) = bank_of(base), texts()
    wrong = [
        [],
        [[]],
        [[1], []],
        [[[1]], [[2]]],
        None,
        [1, 2],
        [[-1]],
        [[2, 10**6]],
        [[True]],
        ["ab"],
        torch.ones(1, 2),
    ]
    for completions in wrong:
        with pytest.raises(ValueError, match="completions must be lists of token ids from 0 to 96, at least one each"):
            bank.logprobs(ids, mask, completions=completions)


def test_a_compiled_prompt_is_not_changed_by_its_use(base):
    bank, (ids, mask) = bank_of(base), texts()
    before = {name: [x.clone() for x in bank[name].state.tensors] for name in bank.names}
    bank.generate(ids, mask, prompts=PROMPTS, num_beams=2, **GREEDY)
    bank.generate(ids, mask, prompts=PROMPTS, cache_implementation="static", **GREEDY)
    assert all(torch.equal(x, y) for name in bank.names for x, y in zip(bank[name].state.tensors, before[name]))
    assert isinstance(bank["long"], CompiledPrompt) and bank["long"].length == len(embeddings(base)["long"])


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, **options):
        return "".join(chr(97 + token % 26) for token in ids)


def test_a_prompt_that_cannot_be_read_again_fails_its_own_request(base, tmp_path):
    """Who cleans up temporary folders takes it away; the others of the batch are answered, and those that come."""
    bank = rows_of(PromptBank(base, max_bytes=0, folder=tmp_path), [2, 3])
    names, answers = bank.names, queue.Queue()
    next(iter(tmp_path.iterdir())).unlink()  # the older one
    batcher = Batcher(bank, max_batch=2, max_wait=60, max_queue=9)
    batcher.start()
    for _ in range(2):
        rows = [
            Row(index, name, [3, 4], bank.length(name), 2, Sampling(), TextStream(Letters(), [3, 4]), answers.put)
            for index, name in enumerate(names)
        ]
        batcher.submit(rows)
        ended = []
        while len(ended) < 2:
            piece = answers.get(timeout=60)
            ended += [piece] if piece.error or piece.finish_reason else []
        assert sorted(piece.error.status if piece.error else 0 for piece in ended) == [0, 500]
    batcher.stop()
