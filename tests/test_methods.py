"""The methods against PEFT's encoders with the same parameters, their starting values, and P-Tuning's cached output."""

import copy
import pickle

import pytest
import torch
from peft import CartridgeConfig, MultitaskPromptTuningConfig, PrefixTuningConfig, PromptEncoder, PromptEncoderConfig
from peft.tuners.cartridge import CartridgeEncoder
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import nn

from fastprompt.methods import (
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    distillation_loss,
    ensemble_vote,
)

P, D, L, HEADS, DH = 5, 12, 3, 2, 4
COMMON = dict(task_type="CAUSAL_LM", num_virtual_tokens=P, num_transformer_submodules=1, num_layers=L)
WORDS = nn.Embedding(9, D)


def peft_prefix(projection=None, init=None):
    return PrefixEncoder(
        PrefixTuningConfig(
            token_dim=HEADS * DH,
            num_attention_heads=HEADS,
            prefix_projection=projection is not None,
            encoder_hidden_size=projection,
            init_weights=init,
            **COMMON,
        )
    )


def peft_encoder(encoder, hidden=7, num_layers=2, dropout=0.0):
    return PromptEncoder(
        PromptEncoderConfig(
            token_dim=D,
            num_attention_heads=HEADS,
            encoder_reparameterization_type=encoder.upper(),
            encoder_hidden_size=hidden,
            encoder_num_layers=num_layers,
            encoder_dropout=dropout,
            **COMMON,
        )
    )


def peft_multitask(tasks=3, ranks=2, **options):
    config = MultitaskPromptTuningConfig(
        token_dim=D, num_attention_heads=HEADS, num_tasks=tasks, num_ranks=ranks, **options, **COMMON
    )
    return MultitaskPromptEmbedding(config, WORDS)


def keys_and_values(flat, layer, prompt=0):
    """``[P, Hkv, Dh]`` twice, cut out of PEFT's flat prefix value by value."""
    cells = flat[prompt].reshape(P, L * 2, HEADS, DH)
    return cells[:, 2 * layer], cells[:, 2 * layer + 1]


def backward(module, out):
    """Gradients of every parameter, by name, for one fixed gradient of ``out``."""
    module.zero_grad()
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    return {name: parameter.grad for name, parameter in module.named_parameters()}


# Prefix-Tuning


def test_prefix_is_peft_s_layout_and_a_view():
    torch.manual_seed(0)
    method = PrefixTuning(P, L, HEADS, DH, num_prompts=2)
    out = method()
    assert out.shape == (L, 2, 2, P, HEADS, DH)
    assert out._base is method.prefix and out.data_ptr() == method.prefix.data_ptr()
    for layer in range(L):
        for prompt in range(2):
            keys, values = keys_and_values(method.prefix, layer, prompt)
            assert torch.equal(out[layer, 0, prompt], keys) and torch.equal(out[layer, 1, prompt], values)
    grads = backward(method, out)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(keys_and_values(grads["prefix"], 1, 1)[0], weight[1, 0, 1])


@pytest.mark.parametrize("init", [None, "zero"])
def test_projected_prefix_equals_peft_s_encoder(init):
    torch.manual_seed(0)
    theirs = peft_prefix(projection=6, init=init)
    torch.manual_seed(0)
    ours = PrefixTuning(P, L, HEADS, DH, projection=6, init=init)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    expected, got = theirs(torch.arange(P)), ours()
    torch.testing.assert_close(got.permute(2, 3, 0, 1, 4, 5).flatten(2)[0], expected)
    assert got.any() == (init is None)
    expected = backward(theirs, expected.reshape(P, L, 2, HEADS, DH).permute(1, 2, 0, 3, 4)[:, :, None])
    for name, grad in backward(ours, got).items():
        torch.testing.assert_close(grad, expected[name])


def test_prefix_starts_as_peft_s():
    torch.manual_seed(0)
    theirs = peft_prefix().embedding.weight
    torch.manual_seed(0)
    assert torch.equal(PrefixTuning(P, L, HEADS, DH).prefix[0], theirs)
    assert not PrefixTuning(P, L, HEADS, DH, init="zero").prefix.any()


def test_prefix_from_keys_and_values():
    bank = torch.randn(L, 2, 2, P, HEADS, DH, dtype=torch.float64)
    method = PrefixTuning(P, L, HEADS, DH, num_prompts=2, init=bank)
    assert method.prefix.dtype == torch.float32 and torch.equal(method(), bank.float())
    one = PrefixTuning(P, L, HEADS, DH, num_prompts=2, init=bank[:, :, 1])
    assert torch.equal(one(), bank[:, :, [1, 1]].float())
    with torch.no_grad():
        one.prefix[0] += 1
    assert torch.equal(one()[:, :, 1], bank[:, :, 1].float())  # the prompts of a bank are apart


def test_frozen_tokens_equal_peft_s_cartridge():
    torch.manual_seed(0)
    config = CartridgeConfig(token_dim=HEADS * DH, num_attention_heads=HEADS, num_frozen_tokens=2, **COMMON)
    theirs = CartridgeEncoder(config)
    init = theirs.weight.detach().reshape(P, L, 2, HEADS, DH).permute(1, 2, 0, 3, 4)
    ours = PrefixTuning(P, L, HEADS, DH, init=init, frozen_tokens=2)
    assert torch.equal(ours()[:, :, 0], init)
    assert [n for n, _ in ours.named_parameters()] == ["prefix"] and ours.prefix.shape == (1, P - 2, L * 2 * HEADS * DH)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.5)
    ours().square().sum().backward()
    optimizer.step()
    assert torch.equal(ours()[:, :, 0, :2], init[:, :, :2]) and not (ours()[:, :, 0, 2:] == init[:, :, 2:]).any()
    out = theirs(torch.zeros(1, P)).reshape(P, L, 2, HEADS, DH).permute(1, 2, 0, 3, 4)[:, :, None]
    expected = backward(theirs, out)
    assert torch.equal(backward(ours, ours())["prefix"][0], expected["trainable_embedding"])


def test_prefix_layers():
    assert PrefixTuning(P, L, HEADS, DH).layers == (0, 1, 2)
    assert PrefixTuning(P, L, HEADS, DH, layers=[0, 2, 5]).layers == (0, 2, 5)


# P-Tuning

ENCODERS = [("lstm", 7, 2), ("lstm", 12, 1), ("lstm", 4, 3), ("mlp", 7, 2)]


@pytest.mark.parametrize("encoder, hidden, num_layers", ENCODERS)
def test_p_tuning_equals_peft_s_encoder(encoder, hidden, num_layers):
    torch.manual_seed(0)
    theirs = peft_encoder(encoder, hidden, num_layers)
    torch.manual_seed(0)
    ours = PTuning(P, D, encoder=encoder, hidden_size=hidden, num_layers=num_layers)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    expected, got = theirs(torch.arange(P)), ours()
    assert got.shape == (P, D)
    torch.testing.assert_close(got, expected)
    expected = backward(theirs, expected)
    for name, grad in backward(ours, got).items():
        torch.testing.assert_close(grad, expected[name])
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(), theirs.eval()(torch.arange(P)))


def test_p_tuning_drops_in_training_only():
    method = PTuning(P, D, dropout=0.5)
    assert not torch.equal(method(), method())
    torch.manual_seed(0)
    first = method()
    torch.manual_seed(0)
    assert torch.equal(method(), first)
    assert torch.equal(method.eval()(), method.train().encode())


def test_p_tuning_without_an_encoder_is_its_embedding():
    init = torch.randn(P, D)
    method = PTuning(P, D, encoder=None, init=init)
    assert method() is method.embedding.weight and torch.equal(method(), init)
    assert len(list(method.parameters())) == 1


@pytest.fixture
def cached():
    """A method in evaluation mode that has its output cached."""
    torch.manual_seed(0)
    method = PTuning(P, D, hidden_size=3).eval()
    with torch.no_grad():
        assert method() is method()
    return method


def write_weight(method, write):
    with torch.no_grad():
        write(method.mlp_head[0].weight)


def fused_step(method):
    """A training step in evaluation mode, with a look at the prompt before its backward and after it."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1, fused=True)  # counts no version up
    prompt = method()
    with torch.no_grad():
        method()
    prompt.sum().backward()
    with torch.no_grad():
        method()
    optimizer.step()
    optimizer.zero_grad()


CHANGES = {
    "in place": lambda m: write_weight(m, lambda w: w.add_(1)),
    "one element": lambda m: write_weight(m, lambda w: w[0, 0].fill_(9)),
    "lstm": lambda m: nn.init.zeros_(m.lstm_head.bias_hh_l1_reverse),
    "embedding": lambda m: nn.init.zeros_(m.embedding.weight),
    "data replaced": lambda m: setattr(m.embedding.weight, "data", torch.zeros(P, D)),
    "parameter replaced": lambda m: setattr(m.embedding, "weight", nn.Parameter(torch.zeros(P, D))),
    "load_state_dict": lambda m: m.load_state_dict(PTuning(P, D, hidden_size=3).state_dict()),
    "load_state_dict assign": lambda m: m.load_state_dict(PTuning(P, D, hidden_size=3).state_dict(), assign=True),
    "cast and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "double": lambda m: m.double(),
    "data and eval": lambda m: (m.embedding.weight.data.zero_(), m.eval()),
    "data and a part of a model": lambda m: (m.embedding.weight.data.zero_(), nn.Sequential(m).eval()),
    "fused optimizer": fused_step,
}


@pytest.mark.parametrize("change", CHANGES)
def test_cached_output_is_never_stale(cached, change):
    with torch.no_grad():
        before = cached().clone()
        with torch.enable_grad():
            CHANGES[change](cached)
        got = cached()
        assert torch.equal(got, cached.encode()) and not torch.equal(got.float(), before)
        assert cached() is got


def test_memory_given_to_another_tensor_is_not_taken_for_the_parameter():
    method = PTuning(500, D, encoder="mlp").eval()
    with torch.no_grad():
        before, weight = method(), method.embedding.weight
        address = weight.data_ptr()
        weight.data = torch.empty(0)
        taken = [torch.zeros(500, D) for _ in range(100)]  # an allocator soon hands out again what was set free
        weight.data = next((x for x in taken if x.data_ptr() == address), taken[0])
        assert torch.equal(method(), method.encode()) and not torch.equal(method(), before)


def test_a_caller_s_write_on_the_output_stays_his_own(cached):
    with torch.no_grad():
        cached().zero_()
        assert torch.equal(cached(), cached.encode()) and cached().any()


def test_cached_output_has_the_dtype_autocast_asks_for(cached):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert cached().dtype == cached.encode().dtype == torch.bfloat16
    with torch.no_grad():
        assert cached().dtype == torch.float32


def test_nothing_is_cached_where_a_gradient_is_wanted(cached):
    assert cached().requires_grad and cached() is not cached()
    cached.train()
    with torch.no_grad():
        assert cached() is not cached()


def test_output_cached_in_inference_mode_serves_a_gradient_later(cached):
    cached.eval()
    with torch.inference_mode():
        inside = cached()
    with torch.no_grad():
        assert cached() is inside
    scale = torch.ones((), requires_grad=True)
    (inside * scale).sum().backward()
    torch.testing.assert_close(scale.grad, inside.sum())


def test_the_cache_is_not_pickled(cached):
    pickled = pickle.dumps(cached)
    cached.eval()
    assert len(pickled) == len(pickle.dumps(cached))
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickled)(), cached())


def test_a_copy_has_a_cache_of_its_own(cached):
    other = copy.deepcopy(cached)
    with torch.no_grad():
        for a, b in zip(cached.parameters(), other.parameters()):
            while b._version < a._version:  # a copy counts from 0 again
                b.add_(1)
        assert torch.equal(other(), other.encode()) and torch.equal(cached(), cached.encode())
        assert not torch.equal(other(), cached())


@pytest.mark.parametrize("encoder", ["lstm", "mlp", None])
@pytest.mark.parametrize("training", [True, False])
def test_p_tuning_compiles_whole(encoder, training):
    method = PTuning(P, D, encoder=encoder).train(training)
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(), method())
    if training:
        compiled().sum().backward()
        assert all(p.grad.any() for p in method.parameters())


# Multitask Prompt Tuning


def test_multitask_equals_peft_s_embedding():
    torch.manual_seed(0)
    theirs = peft_multitask()
    torch.manual_seed(0)
    ours = MultitaskPromptTuning(P, D, 3, num_ranks=2)
    named = dict(shared=theirs.embedding.weight, rows=theirs.prefix_task_cols, cols=theirs.prefix_task_rows)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, named[name])
    tasks = torch.tensor([2, 0])
    expected, got = theirs(torch.arange(P).expand(2, P), tasks).flatten(0, 1), ours(tasks)
    assert got.shape == (2 * P, D)
    torch.testing.assert_close(got, expected)
    backward(theirs, expected)
    for name, grad in backward(ours, got).items():
        torch.testing.assert_close(grad, named[name].grad)
    assert not ours.rows.grad[1].any() and ours.rows.grad[0].any()
    assert torch.equal(ours(), ours(torch.arange(3))) and torch.equal(ours()[:P], ours(torch.tensor([0])))


@pytest.mark.parametrize(
    "task, mode",
    [
        ("average", "AVERAGE_SOURCE_TASKS"),
        (1, "EXACT_SOURCE_TASK"),
        ("shared", "ONLY_SOURCE_SHARED"),
    ],
)
def test_target_tasks_start_as_in_peft(tmp_path, task, mode):
    source = MultitaskPromptTuning(P, D, 3, num_ranks=2)
    state = dict(prompt_embeddings=source.shared, prefix_task_cols=source.rows, prefix_task_rows=source.cols)
    torch.save({name: x.detach() for name, x in state.items()}, tmp_path / "source.bin")
    torch.manual_seed(0)
    path = str(tmp_path / "source.bin")
    theirs = peft_multitask(
        1, prompt_tuning_init=mode, prompt_tuning_init_task=1, prompt_tuning_init_state_dict_path=path
    )
    ours = MultitaskPromptTuning.from_source(source, task)
    assert torch.equal(ours.shared, theirs.embedding.weight) and ours.num_tasks == 1
    if task == "shared":
        assert ours.rows.std() < 0.1 and not (ours.rows == source.rows[:1]).any()
        assert MultitaskPromptTuning.from_source(source, task, 4).cols.shape == (4, 2, D)
    else:
        assert torch.equal(ours.rows, theirs.prefix_task_cols) and torch.equal(ours.cols, theirs.prefix_task_rows)
        assert torch.equal(MultitaskPromptTuning.from_source(source, task, 2).rows, ours.rows.expand(2, -1, -1))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert source.shared.all() and source.rows.all() and source.cols.all()


def test_parameter_groups_give_the_parts_their_own_learning_rate():
    method = MultitaskPromptTuning(P, D, 2)
    before = copy.deepcopy(method)
    optimizer = torch.optim.SGD(method.parameter_groups(0.5, 0.25))
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, lr in dict(shared=0.5, rows=0.25, cols=0.25).items():
        torch.testing.assert_close(getattr(method, name), getattr(before, name) - lr)


def test_distillation_loss_is_the_written_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 9, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    near, far = (torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss = distillation_loss(student, teacher, near, far, weight=0.5, temperature=2.0)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 0.5 * ((p * (p / q).log()).sum() / 4 + ((near - far) ** 2).sum() / 18)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(near.grad, (near - far).detach() / 18)
    torch.testing.assert_close(student.grad, 0.5 * (q - p).detach() / 2 / 4)
    assert teacher.grad is None and far.grad is None
    assert distillation_loss(teacher, teacher, far, far) == 0


def test_distillation_loss_is_summed_in_fp32():
    student, teacher = (torch.randn(3, 5000).bfloat16() for _ in range(2))
    hidden = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4)
    got = distillation_loss(student, teacher, *hidden, weight=1)
    expected = distillation_loss(student.double(), teacher.double(), *(x.double() for x in hidden), weight=1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


# Prompt Tuning


def test_prompts_from_class_labels():
    embedding = nn.Embedding(9, D)
    method = PromptTuning.from_labels([[3], [1, 8, 8]], embedding, 4, 2, torch.Generator().manual_seed(0))
    assert method.prompt.shape == (2, 4, D) and method.token_dim == D
    for prompt in method.prompt:
        assert torch.equal(prompt[0], embedding.weight[3])
        torch.testing.assert_close(prompt[1], (embedding.weight[1] + 2 * embedding.weight[8]) / 3)
    rest = method.prompt[:, 2:].flatten(0, 1)
    assert all((embedding.weight == row).all(1).any() for row in rest) and len(rest.unique(dim=0)) > 2
    assert torch.equal(PromptTuning.from_labels([[3]], embedding, 1).prompt[0, 0], embedding.weight[3])


def test_ensemble_vote():
    logits = torch.zeros(3, 4, 3)
    logits[:2, 0, 1], logits[2, 0, 2] = 1, 50  # two weak votes outvote a strong one
    logits[0, 1, 0], logits[1, 1, 1], logits[2, 1, 2] = 1, 3, 2  # a tie: the highest mean
    logits[:, 2] = torch.tensor([[5.0, 9, 0], [9, 8, 0], [0, 8, 9]])  # 1 has the highest mean of three single votes
    logits[:, 3] = torch.tensor([[0.0, 1, -torch.inf], [-torch.inf, 0, 1], [-torch.inf, 0, 1]])  # 2 by vote, not mean
    assert ensemble_vote(logits).tolist() == [1, 1, 1, 2]
    tie = torch.tensor([[[9.0, -torch.inf, -torch.inf, 10]], [[9, 10, -torch.inf, -torch.inf]]])
    assert ensemble_vote(tie).item() in (1, 3)  # 0 has the highest mean and no vote


# Errors

KV = torch.zeros(L, 2, P, HEADS, DH)


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda: PrefixTuning(P, 0, HEADS, DH), "num_layers must be an int >= 1, got 0"),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, init=KV[:, :, 1:]),
            r"init must have shape \[3, 2, 1, 5, 2, 4\] or \[3, 2, 5, 2, 4\], got \[3, 2, 4, 2, 4\]",
        ),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, init="ones"),
            "init must be None, \"zero\" or a tensor, got 'ones'",
        ),
        (TypeError, lambda: PrefixTuning(P, L, HEADS, DH, init=3), "init must be a torch.Tensor of shape .*, got int"),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, init=KV, projection=6),
            'init must be None or "zero" with projection, .* got Tensor',
        ),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, num_prompts=2, projection=6),
            "num_prompts must be 1 with projection, got 2",
        ),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, frozen_tokens=1, projection=6),
            "frozen_tokens must be 0 with projection, got 1",
        ),
        (ValueError, lambda: PrefixTuning(P, L, HEADS, DH, projection=0), "projection must be an int >= 1, got 0"),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, frozen_tokens=6),
            r"frozen_tokens must be an int in \[0, 5\], got 6",
        ),
        (
            ValueError,
            lambda: PrefixTuning(P, L, HEADS, DH, layers=[0, 1]),
            r"layers must hold num_layers=3 ascending indices, got \[0, 1\]",
        ),
        (ValueError, lambda: PrefixTuning(P, L, HEADS, DH, layers=[0, 2, 1]), r"ascending indices, got \[0, 2, 1\]"),
        (ValueError, lambda: PTuning(P, D, encoder="gru"), 'encoder must be "lstm", "mlp" or None, got \'gru\''),
        (ValueError, lambda: PTuning(P, D, hidden_size=0), "hidden_size must be an int >= 1, got 0"),
        (ValueError, lambda: PTuning(P, D, dropout=1.5), r"dropout must lie in \[0, 1\), got 1.5"),
        (
            ValueError,
            lambda: PTuning(P, D, encoder="mlp", num_layers=3),
            'num_layers and dropout must be left alone but for encoder="lstm", got 3 and 0.0',
        ),
        (ValueError, lambda: PTuning(P, D, init=torch.zeros(P, 3)), r"init must have shape \[5, 12\], got \[5, 3\]"),
        (ValueError, lambda: MultitaskPromptTuning(P, D, 0), "num_tasks must be an int >= 1, got 0"),
        (
            ValueError,
            lambda: MultitaskPromptTuning(P, D, 2)(torch.tensor([2])),
            r"task_ids must lie in \[0, 2\), got values from 2 to 2",
        ),
        (
            ValueError,
            lambda: MultitaskPromptTuning.from_source(MultitaskPromptTuning(P, D, 2), 2),
            r'task must be "average", "shared" or an int in \[0, 2\), got 2',
        ),
        (
            ValueError,
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3), torch.ones(2, 3)),
            r"teacher_logits must have shape \[2, 3\], got \[2, 4\]",
        ),
        (
            ValueError,
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(0, 3), torch.ones(0, 3)),
            "student_hidden must hold at least one row",
        ),
        (
            ValueError,
            lambda: distillation_loss(*[torch.ones(2, 3)] * 4, temperature=0),
            "temperature must be above 0, got 0",
        ),
        (TypeError, lambda: PromptTuning(P, D, init=[0.0]), "init must be a torch.Tensor of shape .*, got list"),
        (
            ValueError,
            lambda: PromptTuning.from_labels([[1], []], nn.Embedding(9, D), 4),
            "label_token_ids must hold at least one token a label, got none for label 1",
        ),
        (
            ValueError,
            lambda: PromptTuning.from_labels([[1], [2]], nn.Embedding(9, D), 1),
            "label_token_ids must hold 1 to num_virtual_tokens=1 labels, got 2",
        ),
        (ValueError, lambda: ensemble_vote(torch.zeros(2, 3)), r"logits must have shape \[N, B, C\], got \[2, 3\]"),
        (
            TypeError,
            lambda: ensemble_vote(torch.zeros(1, 2, 3, dtype=torch.int64)),
            "logits must have one of the dtypes",
        ),
    ],
)
def test_errors_name_the_argument(error, call, message):
    with pytest.raises(error, match=message):
        call()
