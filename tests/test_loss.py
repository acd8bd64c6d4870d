"""The chunked loss against torch's own cross-entropy over all logits at once."""

import pytest
import torch

from fastprompt.hf.loss import SummedCrossEntropy


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 600])
@pytest.mark.parametrize("vocabulary", [5, 2048, 5000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_cross_entropy(rows, vocabulary, with_bias):
    """More rows and columns than a chunk holds, and fewer; large logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64) * 5
        for s in ((rows, 16), (vocabulary, 16), (vocabulary,))
    )
    bias = bias if with_bias else None
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    results = []
    for loss_of in (
        lambda h: SummedCrossEntropy.apply(h, weight, bias, labels),
        lambda h: torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(h, weight, bias), labels, reduction="sum"
        ),
    ):
        leaf = hidden.clone().requires_grad_()
        loss = loss_of(leaf)
        (loss * 0.3).backward()
        results.append((loss.detach(), leaf.grad))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_without_a_gradient_and_twice():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, 2])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(SummedCrossEntropy.apply(hidden, weight, None, labels), expected)
    loss = SummedCrossEntropy.apply(hidden.requires_grad_(), weight, None, labels)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()  # the saved gradient was not written into
    torch.testing.assert_close(hidden.grad, 2 * first)
