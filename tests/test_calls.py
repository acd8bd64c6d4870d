"""What callers do with a model beside training it: evaluate, copy, export, compile, pass unusual arguments."""

import copy
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from parity import B, P, S, assert_equal, batch, both, is_packed, known_names, peft_model, step
from peft import LoraConfig, PromptTuningConfig, inject_adapter_in_model
from test_heads import build as build_with_head
from test_heads import inputs_for
from test_parity import PACKED
from tiny_models import build

import fastprompt
from fastprompt.layout import plan_padded_input

PADDED = "fastprompt runs PEFT's own padded forward: "


@pytest.fixture
def packed():
    """No call in the test may take the padded path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt runs")
        yield


def decoded(model, inputs, following):
    """The logits of one token behind the cache that a forward returns, as a hand-written loop has them."""
    with torch.no_grad():
        cache = model(**{name: x for name, x in inputs.items() if name != "labels"}).past_key_values
        mask = inputs["attention_mask"]
        if mask is not None:
            mask = torch.cat([mask.new_ones(B, cache.get_seq_length() - S), mask, mask.new_ones(B, 1)], 1)
        return model.base_model(input_ids=following, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize(
    "name, method", [("llama", "multitask"), *itertools.product(PACKED, ["prompt_tuning", "prefix"])]
)
def test_an_evaluation_returns_the_cache_that_peft_returns(name, method, packed):
    model, following = peft_model(name, method).eval(), torch.arange(5, 5 + B)[:, None]
    # Where it sees token ids, RoBERTa does not count padding on the left: PEFT's own forward runs.
    paddings = ["none"] if (name, method) == ("roberta", "prefix") else ["none", "left"]
    inputs = {padding: batch(padding, method=method) for padding in paddings}

    def logits():
        return [decoded(model, x, following) for x in inputs.values()]

    plain = logits()
    fastprompt.accelerate(model)
    for got, expected in zip(logits(), plain, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_classifier_returns_the_cache_too(packed):
    model = peft_model(None, "prefix", task_type="SEQ_CLS", base=build_with_head("llama", "SEQ_CLS")).eval()
    inputs = inputs_for("SEQ_CLS", "none", "prefix")
    with known_names():
        plain = model(**inputs).past_key_values
    fast = fastprompt.accelerate(model)(**inputs).past_key_values
    for ours, theirs in zip(fast.layers, plain.layers):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


def test_no_cache_where_peft_returns_none(packed):
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    assert model(**inputs).past_key_values is None  # a training step gives the loss alone
    model.eval()
    assert model(**inputs, use_cache=False).past_key_values is None
    with torch.no_grad():
        assert copy.deepcopy(model(**inputs).past_key_values).get_seq_length() == P + S
    model.base_model.config.use_cache = False
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_lstm", "prefix"])
def test_a_copy_is_accelerated(how, method, packed):
    model, inputs = fastprompt.accelerate(peft_model("llama", method)), batch("right")
    plain = step(model, inputs)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model)
    assert is_packed(other, inputs)
    assert_equal(plain, step(other, inputs), inputs)
    fastprompt.restore(other)
    assert "forward" not in vars(other) and other.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in other.base_model.modules())
    assert is_packed(model, inputs)


def test_a_soft_prompt_model_is_pickled():
    model = fastprompt.SoftPromptModel(build("llama"), fastprompt.PromptTuning(P, 48))
    inputs = batch("right")
    assert_equal(step(model, inputs), step(pickle.loads(pickle.dumps(model)), inputs), inputs)


def test_accelerate_s_wrappers_are_taken_off_alone():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer in another test may have set it
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.prepare(model)
    assert is_packed(wrapped, inputs)
    bare = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert is_packed(bare, inputs)
    assert "forward" not in vars(fastprompt.restore(bare))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_there_is_one_config(method):
    model, inputs = fastprompt.accelerate(peft_model("llama", method)), batch("right")
    model(**inputs)
    assert model.config is model.base_model.config is model.base_model.model.config
    soft = fastprompt.SoftPromptModel(build("llama"), fastprompt.PrefixTuning(P, 3, 2, 8))
    assert soft.config is soft.base.config


def test_the_signature_is_peft_s():
    model = peft_model("llama")
    before = inspect.signature(model.forward)
    assert inspect.signature(fastprompt.accelerate(model).forward) == before


def test_export_sees_peft_s_forward():
    model, ids = fastprompt.accelerate(peft_model("llama")).eval(), batch("none")["input_ids"]
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    program = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_planner_stays_out_of_compiled_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    loss = model(**inputs).loss
    torch.testing.assert_close(torch.compile(model, backend=backend)(**inputs).loss, loss)
    traces = [node.meta.get("stack_trace") or "" for graph in graphs for node in graph.graph.nodes]
    assert any("modeling_llama" in trace for trace in traces)
    assert not any("/layout/plan.py" in trace or "/layout/cells.py" in trace for trace in traces)
    torch._dynamo.reset()


def test_dropout_that_is_added_later_is_drawn():
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    assert model(**inputs).loss == model(**inputs).loss
    inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False), model.base_model
    )
    model.train()
    assert model(**inputs).loss != model(**inputs).loss
    model.base_model.eval()
    assert model(**inputs).loss == model(**inputs).loss
    model.base_model.model.layers[0].self_attn.attention_dropout = 0.3
    model.base_model.model.layers[0].train()
    assert model(**inputs).loss != model(**inputs).loss


def test_a_base_in_evaluation_mode_outlasts_an_evaluation(packed):
    model = fastprompt.SoftPromptModel(build("gpt2", resid_pdrop=0.1), fastprompt.PromptTuning(P, 48))
    inputs = batch("right")
    model.base.eval()
    loss = model(**inputs).loss
    model.eval()
    model(**inputs)
    model.train()
    assert model.training and model.method.training and not model.base.training
    assert torch.equal(model(**inputs).loss, loss)
    model.base.train()  # and the other way round
    model.eval()
    assert model.train().base.training


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
@pytest.mark.parametrize("columns", ["more", "fewer"])
def test_a_mask_of_another_width_is_left_to_peft(columns, method):
    model, inputs = peft_model("llama", method).eval(), batch("right")
    inputs.pop("labels")
    if columns == "more":
        inputs["attention_mask"] = torch.cat([torch.ones(B, P, dtype=torch.int64), inputs["attention_mask"]], 1)
    else:
        inputs["attention_mask"] = inputs["attention_mask"][:, :-2]

    def result():
        try:
            return model(**inputs).logits
        except (RuntimeError, IndexError, ValueError) as error:
            return str(error)

    plain = result()
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match=PADDED + "the attention mask has shape"):
        fast = result()
    assert fast == plain if isinstance(plain, str) else torch.equal(fast, plain)
    soft = fastprompt.SoftPromptModel(build("llama"), fastprompt.PromptTuning(P, 48))
    with pytest.raises(ValueError, match=rf"attention_mask must have shape \[{B}, {S}\], got"):
        soft(**inputs)


@pytest.mark.parametrize("method", ["prompt_tuning", "multitask", "prefix", "cpt"])
def test_a_row_without_a_token(method, packed):
    model, inputs = peft_model("llama", method), batch("right", method=method, lengths=(9, 0, 3, 0))
    plain, fast = both(model, inputs)
    assert_equal(plain, fast, inputs)
    if method != "prefix":
        torch.testing.assert_close(fast[2][1, :P], plain[2][1, :P], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_tasks_is_reported_by_its_name(count):
    model = fastprompt.accelerate(peft_model("llama", "multitask"))
    inputs = dict(batch("right"), task_ids=torch.zeros(count, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"task_ids must have one entry for each of the 4 rows.*got {count}"):
        model(**inputs)


def test_tasks_that_do_not_exist_are_named():
    model = fastprompt.accelerate(peft_model("llama", "multitask"))
    for ids, error, message in (
        ([0, 3, 1, 2], ValueError, r"task_ids must lie in \[0, 3\), got values from 0 to 3"),
        ([-7, 0, 1, 2], ValueError, r"task_ids must lie in \[0, 3\), got values from -7 to 2"),
        ([0.0, 1.0, 1.0, 2.0], TypeError, "task_ids must have one of the dtypes .* got torch.float32"),
    ):
        with pytest.raises(error, match=message):
            model(**batch("right"), task_ids=torch.tensor(ids))


def test_prompt_ids_may_be_a_list_and_must_be_integers():
    bank = torch.randn(2, P, 48)
    model, inputs = fastprompt.SoftPromptModel(build("llama"), fastprompt.PromptTuning(P, 48, 2, bank)), batch("right")
    loss = model(**inputs, prompt_ids=torch.tensor([1, 0, 0, 1])).loss
    assert torch.equal(model(**inputs, prompt_ids=[1, 0, 0, 1]).loss, loss)
    for wrong, error, message in (
        ([0.0, 1.0, 0.0, 1.0], TypeError, "prompt_ids must be integers, one a row, got torch.float32"),
        ([True] * 4, TypeError, "prompt_ids must be integers, one a row, got torch.bool"),
        ([[0, 1, 0, 1]], ValueError, r"prompt_ids must have shape \[B\], got \[1, 4\]"),
        ([0, 1], ValueError, r"prompt_ids must have shape \[4\], got \[2\]"),
        ([0, 1, 0, 2], ValueError, r"prompt_ids must lie in \[0, 2\), got values from 0 to 2"),
        ("none", TypeError, "prompt_ids must be integers"),
    ):
        with pytest.raises(error, match=message):
            model(**inputs, prompt_ids=wrong)


@pytest.mark.parametrize("weighted", ["none", "decay"])
@pytest.mark.parametrize("types", [False, True])
def test_cpt_s_head_runs_on_labelled_rows_only(types, weighted, packed):
    model, inputs = peft_model("llama", "cpt"), batch("right", "part")
    model.peft_config["default"].opt_weighted_loss_type = weighted
    if types:
        inputs["input_type_mask"] = torch.tensor([4, 4, 8, 8, 1, 2, 12, 12, 12]).repeat(B, 1)

    def fresh():  # PEFT writes into what it is given
        return {name: x.clone() for name, x in inputs.items()}

    rows = []
    model.base_model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    plain = step(model, fresh())
    fastprompt.accelerate(model)
    rows.clear()
    given = fresh()
    fast = step(model, given)
    assert_equal(plain, fast, inputs)
    assert all(torch.equal(x, inputs[name]) for name, x in given.items())
    assert rows[0] <= int((inputs["labels"] != -100).sum()) + B * P < B * (P + S)


def test_padded_logits_are_made_once():
    plan = plan_padded_input(B, S, P, attention_mask=batch("right")["attention_mask"])
    rows = torch.randn(len(plan.source), 7)
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor)
                and out.shape == (B, P + S, 7)
                and "_" != function.__name__.split(".")[0][-1]
            ):
                made.append(function.__name__)
            return out

    with Sizes():
        unpacked = plan.unpack(rows)
    assert len(made) == 1 and not unpacked[plan.grid < 0].any()


def test_an_adapter_that_is_added_behind_a_copy(packed):
    model, inputs = fastprompt.accelerate(peft_model("llama")), batch("right")
    other = pickle.loads(pickle.dumps(model))
    other.add_adapter("longer", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + 2))
    other.set_adapter("longer")
    assert is_packed(other, inputs)


@pytest.mark.parametrize("labelled", [15, 24])
def test_a_step_has_the_same_bits_every_time(labelled):
    """The prompt's last row predicts the first token of all 16 rows; 240 labels go through the model's own loss."""
    before = torch.get_num_threads()
    base = build("llama", hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
    model = fastprompt.accelerate(peft_model(None, base=base))
    ids = torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(24) < labelled, ids, -100)
    gradients = set()
    try:
        torch.set_num_threads(2)
        for _ in range(10):
            model.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            gradients.add(next(model.prompt_encoder.parameters()).grad.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(gradients) == 1


@pytest.mark.filterwarnings("ignore:fastprompt runs PEFT's own padded forward")
def test_a_call_without_tokens_fails_as_it_does_in_peft():
    model, inputs = peft_model("llama"), {"attention_mask": torch.ones(2, 3)}
    with pytest.raises(Exception) as of_peft:
        model(**inputs)
    with pytest.raises(type(of_peft.value)) as ours:
        fastprompt.accelerate(model)(**inputs)
    assert str(ours.value) == str(of_peft.value)
