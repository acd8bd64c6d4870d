"""What attaching finds out about a model, and that it leaves no trace: leaks, states, losses, interruptions."""

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from covering import covering_array
from parity import P, assert_equal, assert_identical, batch, peft_model, step
from tiny_hybrids import build_hybrid
from tiny_models import VOCABULARY, build

import fastprompt
from fastprompt.hf.abilities import Abilities
from fastprompt.hf.masks import UnsupportedAttention

PADDED = "fastprompt runs PEFT's own padded forward: "
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaked(x, share):
    """Every token with a share of the one before it."""
    return x + share * F.pad(x[:, :-1], (0, 0, 1, 0))


def before_layer(model, share, layer):
    def hook(module, args, kwargs):
        return (leaked(args[0], share), *args[1:]), kwargs

    model.model.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)


def behind_mlp(model, share, layer):
    model.model.layers[layer].mlp.register_forward_hook(lambda module, args, output: leaked(output, share))


def by_another_class(model, share, layer):
    mlp = model.model.layers[layer].mlp
    plain = type(mlp)
    mlp.__class__ = type("LeakingMLP", (plain,), {"forward": lambda self, x: leaked(plain.forward(self, x), share)})


def by_a_forward_of_its_own(model, share, layer):
    attention = model.model.layers[layer].self_attn
    original = attention.forward
    attention.forward = lambda hidden_states, **kwargs: original(leaked(hidden_states, share), **kwargs)


LEAKS = [before_layer, behind_mlp, by_another_class, by_a_forward_of_its_own]


@pytest.mark.parametrize(
    "place, dtype, share",
    covering_array([*zip(LEAKS, (0, 1, 2, 0)), (before_layer, 2)], DTYPES, [1e-3, 1e-2, 1e-1]),
)
def test_a_leak_between_neighbours_is_found(place, dtype, share):
    (leak, layer), base = place, build("llama", dtype)
    leak(base, share, layer)
    with pytest.warns(UserWarning, match=PADDED + "packed rows give another output"):
        fastprompt.accelerate(peft_model(None, base=base))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leak_is_found_behind_a_prefix(dtype):
    base = build("llama", dtype)
    before_layer(base, 1e-2, 1)
    with pytest.warns(UserWarning, match="packed rows give another output"):
        fastprompt.SoftPromptModel(base, fastprompt.PrefixTuning(P, 3, 2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "gpt_oss"])
def test_rounding_is_no_leak(name, dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt")
        model = fastprompt.accelerate(peft_model(name, dtype=dtype))
    assert model._fastprompt.engine.abilities.makes_cache


class _OneMemory(torch.nn.Module):
    """An MLP whose result always stands in the same memory, in the dtype of the model."""

    def __init__(self, mlp, share):
        super().__init__()
        self.mlp, self.share = mlp, share
        self.one = torch.eye(mlp.down_proj.out_features, dtype=mlp.down_proj.weight.dtype)
        self.memory = torch.empty_like(self.one)

    def forward(self, x):
        x = leaked(self.mlp(x), self.share)
        torch.mm(x.flatten(0, 1), self.one.to(x.dtype), out=self.memory.resize_(x.flatten(0, 1).shape))
        return self.memory.view_as(x)


@pytest.mark.parametrize("share", [0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_model_writes_into_keeps_its_dtype(dtype, share):
    """Such a model is asked in its own precision from there on, and no longer in a wider one."""
    base = build("llama", dtype)
    base.model.layers[1].mlp = _OneMemory(base.model.layers[1].mlp, share)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        fastprompt.accelerate(peft_model(None, base=base))
    refused = [str(w.message) for w in caught if PADDED in str(w.message)]
    assert len(refused) == (share > 0)


def test_a_row_that_depends_on_its_batch_is_refused():
    base = build("llama")
    base.model.layers[0].register_forward_hook(lambda module, args, output: output + 0.1 * output.roll(1, 0))
    with pytest.warns(UserWarning, match=PADDED + "a row's output depends on the batch it stands in"):
        fastprompt.accelerate(peft_model(None, base=base))


def test_the_untouched_model_is_asked():
    """What differs because the model was changed shows, although the changed model agrees with itself."""
    base = build("llama")

    def tell(module, args, output):
        return output * (1 if base.config._attn_implementation == "sdpa" else 2)

    base.lm_head.register_forward_hook(tell)
    model, inputs = peft_model(None, base=base), batch("right")
    plain = step(model, inputs)
    with pytest.warns(UserWarning, match=PADDED + "packed rows give another output"):
        fastprompt.accelerate(model)
    assert_identical(plain, step(model, inputs))


_SIZES = dict(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_attention_heads=6, pad_token_id=0)
_GQA = dict(_SIZES, num_key_value_heads=2, head_dim=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_no_cache_holds_is_refused_by_structure(dtype):
    """RecurrentGemma keeps its states in its modules."""
    config = hf.RecurrentGemmaConfig(**_GQA, num_hidden_layers=3, lru_width=48, attention_window_size=8)
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model, inputs = peft_model(None, base=base, dtype=dtype), batch("right")
    plain = model(**inputs).loss
    with pytest.warns(
        UserWarning, match=PADDED + "RecurrentGemmaModel has layers of type (linear_attention|recurrent)"
    ):
        fastprompt.accelerate(model)
    assert torch.equal(model(**inputs).loss, plain)


def test_an_encoder_of_images_is_not_asked_about_text():
    """Phi-4 multimodal has one, with a convolution, among its layers."""
    base = build("llama")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    base.model.images = hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes, image_size=8, patch_size=4))
    assert fastprompt.accelerate(peft_model(None, base=base))._fastprompt.engine.refusal is None


def test_abilities_are_frozen():
    with pytest.raises(AttributeError):
        fastprompt.accelerate(peft_model("llama"))._fastprompt.engine.abilities.layout = "packed"
    assert Abilities().refusal is None


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_by_the_width_of_the_batch(kind, method):
    """PEFT counts padding: a batch padded beyond the limit takes its forward, and one that is not runs packed."""
    if kind == "dynamic":
        rope = dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)
        base = build("llama", max_position_embeddings=12, rope_parameters=rope)
    else:
        rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
        rope["original_max_position_embeddings"] = 12
        limits = dict(max_position_embeddings=64, original_max_position_embeddings=12)
        base = build("phi3", rope_parameters=rope, **limits)
    model, inputs = peft_model(None, method, base=base), batch("right", lengths=(5, 4, 1, 3))
    tight = {name: x[:, :5] for name, x in inputs.items()}
    plain, plain_tight = step(model, inputs), step(model, tight)
    fastprompt.accelerate(model)
    with pytest.warns(UserWarning, match="its rotary frequencies depend on the width of the batch"):
        assert_equal(plain, step(model, inputs), inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastprompt")
        assert_equal(plain_tight, step(model, tight), tight)


@pytest.mark.parametrize("change", ["nothing", "hook", "reentrant", "not reentrant"])
def test_a_model_that_looks_more_up_by_token_id_keeps_the_ids(change):
    """Gemma 3n adds embeddings of every layer by token id."""
    config = hf.Gemma3nTextConfig(
        **dict(_GQA, num_hidden_layers=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2),
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        altup_num_inputs=2,
    )
    torch.manual_seed(0)
    base = hf.Gemma3nForCausalLM(config)
    with torch.no_grad():
        for parameter in base.parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape) * size)
    model, inputs = peft_model(None, "prefix", base=base), batch("right")
    plain = step(model, inputs)
    if change == "hook":
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: None)
    fastprompt.accelerate(model)
    if "reentrant" in change:
        base.gradient_checkpointing_enable({"use_reentrant": change == "reentrant"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if change == "hook" else "error", message="fastprompt")
        fast = step(model, inputs)
    if (
        change == "reentrant"
    ):  # Hugging Face loses the gradient through keys that layers share there, in front of PEFT, too
        fast = fast[0], plain[1], fast[2]
    assert_equal(plain, fast, inputs)


def snapshot(model):
    """All that an interruption might leave behind in a model, by identity."""
    state = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            content = tuple(value.items()) if isinstance(value, dict) else None
            state[name, attribute] = (id(value), content) if attribute != "training" else value
        config = vars(module).get("config")
        if config is not None:
            state[name, "config's"] = {key: repr(value) for key, value in vars(config).items()}
    state.update({name: parameter.requires_grad for name, parameter in model.named_parameters()})
    return state


def interrupted(call, at):
    """``call()`` with Ctrl-C at the ``at``-th line that runs in the package; False if it ended before."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "/fastprompt/" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


ATTACH = {
    "states": (lambda: peft_model(None, base=build_hybrid("lfm2")), fastprompt.accelerate),
    "accelerate": (lambda: peft_model("llama"), fastprompt.accelerate),
    "soft prompt": (
        lambda: build("llama"),
        lambda model: fastprompt.SoftPromptModel(model, fastprompt.PromptTuning(P, 48)),
    ),
    "prefix": (
        lambda: build("llama"),
        lambda model: fastprompt.SoftPromptModel(model, fastprompt.PrefixTuning(P, 3, 2, 8)),
    ),
    "patch": (lambda: build("llama"), fastprompt.patch_attention),
}


@pytest.mark.parametrize("kind", ATTACH)
def test_an_interruption_leaves_no_trace(kind):
    make, attach = ATTACH[kind]
    model = make()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: None)
    before, at, tried = snapshot(model), 1, 0
    while interrupted(lambda: attach(model), at):
        after = snapshot(model)
        different = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        assert not different, f"interrupted at line {at}: {sorted(map(str, different))}"
        at, tried = int(at * 1.25) + 1, tried + 1
    assert tried > 20


@pytest.mark.parametrize("kind", ["openai_gpt", "error", "leak"])
def test_a_refused_model_is_left_as_it_was(kind):
    base = build("openai_gpt" if kind == "openai_gpt" else "llama")
    if kind == "leak":
        before_layer(base, 0.1, 1)
    if kind == "error":
        base.model.layers[1].mlp.forward = lambda x: x.view(3, 8, 48)  # not on packed rows
    model = peft_model(None, base=base)
    before = snapshot(base)
    with pytest.warns(UserWarning, match=PADDED):
        fastprompt.accelerate(model)
    assert snapshot(base) == before
    with pytest.warns(UserWarning, match="the model's own padded forward"):
        soft = fastprompt.SoftPromptModel(base, fastprompt.PromptTuning(P, 48))
    assert soft.release() is base and snapshot(base) == before


def test_release_gives_the_model_back():
    base, inputs = build("llama"), batch("right")
    base.model.norm.requires_grad_(False)
    before, plain = snapshot(base), base(**inputs).logits
    model = fastprompt.SoftPromptModel(base, fastprompt.PrefixTuning(P, 3, 2, 8))
    loss = model(**inputs).loss
    assert snapshot(base) != before and not any(p.requires_grad for p in base.parameters())
    assert model.release() is base and snapshot(base) == before
    assert torch.equal(base(**inputs).logits, plain)
    with pytest.warns(UserWarning, match="the model was released"):
        torch.testing.assert_close(model(**inputs).loss, loss)


@pytest.mark.parametrize("make", [lambda: build("llama"), lambda: build_hybrid("lfm2")])
def test_restore_gives_every_object_back(make):
    model = peft_model(None, base=make())
    before = snapshot(model)
    fastprompt.restore(fastprompt.accelerate(model))
    assert snapshot(model) == before
    fastprompt.unpatch_attention(fastprompt.patch_attention(model.base_model))
    assert snapshot(model) == before


def test_users_of_one_base_may_leave_in_any_order():
    first = peft_model("llama")
    second = peft_model(None, "prefix", base=first.base_model)
    before = snapshot(first), snapshot(second)
    for order in ((first, second), (second, first)):
        fastprompt.accelerate(first)
        fastprompt.patch_attention(first.base_model)
        fastprompt.accelerate(second)
        fastprompt.unpatch_attention(first.base_model)
        for model in order:
            fastprompt.restore(model)
        assert (snapshot(first), snapshot(second)) == before


SIZES = dict(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80)


def big_bird():
    config = hf.BigBirdConfig(**SIZES, block_size=2, num_random_blocks=1, max_position_embeddings=80)
    return hf.BigBirdForSequenceClassification(config)


def test_what_a_model_remembers_of_a_call_it_does_not_remember_of_the_probe():
    """The attention of BigBird, sparse in long rows, is full for good behind a short one."""
    torch.manual_seed(0)
    model = peft_model(None, base=big_bird(), task_type="SEQ_CLS").eval()
    ids = torch.randint(3, VOCABULARY, (2, 59))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with pytest.raises(UnsupportedAttention):
            fastprompt.patch_attention(model.base_model)
        with pytest.warns(UserWarning, match="attends to blocks, or to all that it sees"):
            fastprompt.accelerate(model)
        torch.testing.assert_close(model(input_ids=ids).logits, plain)


def test_an_expert_s_capacity_is_that_of_a_row():
    """Packed rows would fill the experts with the tokens of all sequences, and leave out others."""
    sizes = dict(vocab_size=VOCABULARY, d_model=48, d_kv=8, d_ff=80, num_layers=2, num_heads=6, num_experts=2)
    base = hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**sizes, expert_capacity=16))
    with pytest.warns(UserWarning, match="leaves tokens out beyond an expert's capacity"):
        fastprompt.accelerate(peft_model(None, base=base, task_type="SEQ_2_SEQ_LM"))
