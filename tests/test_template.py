"""Template: virtual tokens and anchor words in front of, between and behind an example's fields."""

import pytest
import torch
from parity import assert_equal, step
from tiny_models import build

from fastprompt import PromptTuning, SoftPromptModel, Template


class Words:
    """A tokenizer: a word is the number that it says."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def test_a_template_puts_everything_in_its_place():
    template = Template("[P] 7 [P]{a} 8 [P] {b}", Words())
    assert template.num_virtual_tokens == 3 and template.fields == ["a", "b"]
    assert template.encode(a="20 21", b="30") == ([0, 7, 0, 20, 21, 8, 0, 30], [0, -1, 1, -1, -1, -1, 2, -1])


def test_a_batch_is_padded_and_labelled():
    batch = Template("[P]{x}[P]", Words())([{"x": "5"}, {"x": "5 6 7"}], labels=["9", "10 11"])
    assert batch["input_ids"].tolist() == [[0, 5, 0, 9, 0, 0, 0], [0, 5, 6, 7, 0, 10, 11]]
    assert batch["virtual_tokens"].tolist() == [[0, -1, 1, -1, -1, -1, -1], [0, -1, -1, -1, 1, -1, -1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert batch["labels"].tolist() == [[-100] * 3 + [9] + [-100] * 3, [-100] * 5 + [10, 11]]
    assert "labels" not in Template("[P]{x}", Words())([{"x": "5"}])
    assert Template("[P]{x}", Words())([])["input_ids"].shape == (0, 0)


def test_the_head_of_a_template_is_run_once_and_gives_the_same():
    template = Template("[P] 7 8 [P]{x} 9 [P]", Words())
    inputs = template([{"x": "20 21"}, {"x": "20 22 23"}, {"x": "24"}], labels=["30", "31", "32"])
    model = SoftPromptModel(build("llama"), PromptTuning(3, 48, init=torch.randn(3, 48)))
    rows = []
    hook = model.base.model.layers[0].register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    once = step(model, inputs)
    hook.remove()
    # [P] 7 8 [P] stands in all three rows
    assert int(inputs["attention_mask"].sum()) - 2 * 4 in rows
    model._engine.refusal = "switched off by the test"
    with pytest.warns(UserWarning, match="switched off by the test"):
        assert_equal(step(model, inputs), once, inputs)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Template("{x}", Words()), r"template must hold \[P\] and a \{field\}, got '\{x\}'"),
        (lambda: Template("[P]", Words()), r"template must hold \[P\] and a \{field\}"),
        (
            lambda: Template("[P]{x}", Words()).encode(y="1"),
            r"values must be given for the fields \['x'\], got \['y'\]",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
