"""What a step of decoding runs in a mixed batch, and in the bare model on a cache of the same length."""

import pytest
import torch
from serving_models import NEW, SIZES, WIDTH, bank_of, frozen, texts
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria


class Operations(TorchDispatchMode):
    """Operators and the sizes and strides of the tensors that they read, but for ids, step by step."""

    def __init__(self):
        super().__init__()
        self.steps = [[]]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
        floats = [x for x in read if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.steps[-1].append((str(function), [(x.shape, x.stride()) for x in floats]))
        return function(*args, **(kwargs or {}))

    @property
    def at_each_token(self):
        operations = self

        class NextStep(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                operations.steps.append([])
                return torch.zeros(len(input_ids), dtype=torch.bool)

        return [NextStep()]

    def decoding(self):
        """Those of the steps but the prefill and what comes behind the last token."""
        return self.steps[1:-1]


@pytest.mark.parametrize("prompts", [("long",) * 4, ("long", "short", None, "long")], ids=["alike", "mixed"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_runs_what_it_runs_in_the_bare_model(name, prompts):
    """Operator by operator; where prompts are uneven the bare model has as much padding on the left."""
    base, longest = frozen(name), SIZES["long"]
    ids, _ = texts("none")
    lengths = torch.tensor([SIZES.get(prompt, 0) for prompt in prompts])
    columns = (torch.arange(longest + WIDTH) >= longest - lengths[:, None]).long()
    options = dict(max_new_tokens=NEW, do_sample=False)
    bank = bank_of(base)
    with Operations() as mixed:
        bank.generate(ids, prompts=list(prompts), stopping_criteria=mixed.at_each_token, **options)
    text = torch.cat([ids.new_full((len(ids), longest), 5), ids], 1)
    with Operations() as bare:
        base.generate(text, attention_mask=columns, stopping_criteria=bare.at_each_token, **options)
    assert len(mixed.decoding()) == NEW - 1 and mixed.decoding() == bare.decoding()
