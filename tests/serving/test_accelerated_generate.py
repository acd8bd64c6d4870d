"""generate of an accelerated PeftModel: prompts run once, adapters row by row, right on every transformers."""

import copy
import pickle
import warnings

import pytest
import torch
from parity import METHODS, peft_model
from serving_models import WIDTH, frozen, ready, texts
from test_renamed_cache import greedy as greedy_step_by_step

import fastprompt
from fastprompt import PrefixTuning, PromptTuning, SoftPromptModel
from fastprompt.peft.renamed_cache import right_generation

NEW = 5
GREEDY = dict(max_new_tokens=NEW, do_sample=False)


def model_of(method, **options):
    model = peft_model("llama", method, **options)
    ready(model.base_model)
    return model.eval()


def with_adapters(method):
    """Adapters "default" and "second", of other lengths."""
    model = model_of(method)
    config = copy.deepcopy(model.peft_config["default"])
    if method != "cpt":
        config.num_virtual_tokens = 3
    model.add_adapter("second", config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.prompt_encoder["second"].parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model.eval()


def row_by_row(model, ids, mask, names, tasks):
    """PEFT's own tokens, one row at a time and without padding."""
    found = []
    for row, name in enumerate(names):
        model.set_adapter(name)
        text = ids[row, mask[row].bool()][None]
        given = {} if tasks is None else {"task_ids": tasks[row : row + 1]}
        with right_generation(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(
                model.generate(input_ids=text, attention_mask=torch.ones_like(text), **given, **GREEDY)[0, -NEW:]
            )
    model.set_adapter("default")
    return torch.stack(found)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_every_row_behind_its_own_adapter(method, padding):
    model, names = with_adapters(method), ["second", "default", "default", "second"]
    tasks = torch.tensor([0, 2, 1, 2]) if method == "multitask" else None
    ids, mask = texts(padding)
    expected = row_by_row(model, ids, mask, names, tasks)
    active = row_by_row(model, ids, mask, ["default"] * 4, tasks)
    fastprompt.accelerate(model)
    given = {} if tasks is None else {"task_ids": tasks}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt")
        got = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **given, **GREEDY)
        given |= {"adapter_names": ["default"] * 4}
        assert torch.equal(model.generate(ids, attention_mask=mask, **given, **GREEDY)[:, WIDTH:], active)
    assert torch.equal(got[:, :WIDTH], ids) and torch.equal(got[:, WIDTH:], expected)
    assert model.active_adapter == "default" and not torch.equal(expected, active)


def calls_of_rows(model, run):
    """The widths of what the base model ran."""
    widths = []

    def note(module, args, kwargs, output):
        widths.append(output.last_hidden_state.shape[:2])

    base = model.base if isinstance(model, SoftPromptModel) else model.base_model
    hook = base.model.register_forward_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return widths


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_lstm", "prefix"])
def test_a_prompt_is_run_once_until_a_parameter_changes(method):
    model = fastprompt.accelerate(model_of(method))
    ids, mask = texts("none")
    learned = method == "prefix"

    def run():
        return model.generate(input_ids=ids, attention_mask=mask, **GREEDY)

    first = run()
    assert calls_of_rows(model, run) == [(4, WIDTH)] + [(4, 1)] * (NEW - 1)
    parameter = next(model.prompt_encoder["default"].parameters())
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert len(calls_of_rows(model, run)) == NEW + (not learned)
    changed = run()
    assert not torch.equal(changed, first)
    parameter.data.add_(-parameter.grad * -1.0)  # unseen by autograd
    assert torch.equal(run(), first)
    with torch.no_grad():
        model.base_model.lm_head.weight.mul_(-1)
    assert not torch.equal(run(), first)


def test_a_model_that_trains_keeps_nothing():
    model = fastprompt.accelerate(model_of("p_tuning_lstm")).train()
    ids, mask = texts("none")
    for _ in range(2):
        widths = calls_of_rows(model, lambda: model.generate(input_ids=ids, attention_mask=mask, **GREEDY))
        assert (1, 5) in widths
    assert model.training and model.prompt_encoder.training
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()


def test_inference_mode_and_turns():
    model = fastprompt.accelerate(with_adapters("prompt_tuning"))
    ids, mask = texts()
    names = ["second", "default", "default", "second"]
    options = dict(GREEDY, return_dict_in_generate=True)
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **GREEDY)
    output = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
    longer = torch.cat([output.sequences, ids[:, :2]], 1)
    real = torch.cat([mask, torch.ones(4, NEW + 2).long()], 1)
    expected = row_by_row(fastprompt.restore(model), longer, real, names, None)
    fastprompt.accelerate(model)
    output = model.generate(input_ids=longer, attention_mask=real, past_key_values=output.past_key_values, **options)
    assert torch.equal(output.sequences[:, -NEW:], expected)


def test_copies_compile_their_own():
    model = fastprompt.accelerate(model_of("prompt_tuning"))
    ids, mask = texts("none")
    expected = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(input_ids=ids, attention_mask=mask, **GREEDY), expected)
    with model.disable_adapter():
        bare = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        assert torch.equal(bare, model.base_model.generate(ids, attention_mask=mask, **GREEDY))
        with pytest.raises(ValueError, match="adapter_names needs compiled prompts, but the adapters are disabled"):
            model.generate(input_ids=ids, attention_mask=mask, adapter_names=["default"] * 4, **GREEDY)
    assert not torch.equal(bare, expected)


def test_what_is_not_taken_is_peft_s_own():
    model = fastprompt.accelerate(model_of("prompt_tuning"))
    ids, mask = texts("none")
    expected = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    with pytest.warns(UserWarning, match="fastprompt runs PEFT's own generate: use_cache must be True"):
        got = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="adapter_names needs compiled prompts, but use_cache must be True"):
        model.generate(input_ids=ids, adapter_names=["default"] * 4, use_cache=False, **GREEDY)
    for names, message in (
        (["default"], "one entry for each of the 4 rows, got 1"),
        (["nobody"] * 4, r"got \['nobody'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(input_ids=ids, adapter_names=names, **GREEDY)


def test_everything_as_in_peft_if_that_is_asked_for():
    model = fastprompt.accelerate(model_of("prompt_tuning"), heads="peft")
    ids, mask = texts("none")
    assert calls_of_rows(model, lambda: model.generate(input_ids=ids, attention_mask=mask, **GREEDY))[0][1] > WIDTH


@pytest.mark.parametrize("method", METHODS)
def test_sequences_follow_step_by_step(method):
    """The forward of an accelerated model, one token after the other, gives the same tokens."""
    model = fastprompt.accelerate(peft_model("gpt2", method).eval())
    ids = torch.tensor([[5, 9, 11, 20], [7, 8, 3, 30]])
    given = {"task_ids": torch.tensor([2, 0])} if method == "multitask" else {}
    got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                         pad_token_id=0, eos_token_id=None, **given)  # fmt: skip
    assert torch.equal(got, greedy_step_by_step(model, method))


@pytest.mark.parametrize("learned", [False, True])
def test_a_soft_prompt_model_runs_its_prompts_once_and_padded_rows_as_alone(learned):
    base = ready(frozen("llama"))
    method = PrefixTuning(4, 3, 2, 8, num_prompts=2) if learned else PromptTuning(4, 48, 2, torch.randn(2, 4, 48))
    model = SoftPromptModel(base, method).eval()
    ids, mask = texts("right")
    prompts = [1, 0, 1, 1]
    got = model.generate(ids, mask, prompt_ids=prompts, **GREEDY)
    for row, prompt in enumerate(prompts):
        text = ids[row, mask[row].bool()][None]
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(input_ids=text, prompt_ids=[prompt]).logits
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        assert got[row, WIDTH:].tolist() == text[0, -NEW:].tolist()
    widths = calls_of_rows(model, lambda: model.generate(ids, mask, prompt_ids=prompts, **GREEDY))
    assert widths == [(4, WIDTH)] + [(4, 1)] * (NEW - 1)
    with torch.no_grad():
        next(method.parameters()).mul_(-1)
    assert not torch.equal(model.generate(ids, mask, prompt_ids=prompts, **GREEDY), got)
