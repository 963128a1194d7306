"""Statistics over the vocabulary from hidden states, against autograd through all the logits."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remix.algorithms import Head, LogitRule, TokenStatistics, entropy, kl_full, token_statistics

N, H, V = 11, 6, 37


def plain(hidden: Tensor, head: Head, labels: Tensor, rule: LogitRule, anchors=()) -> TokenStatistics:
    def logits_of(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = torch.nn.functional.linear(states, weight, bias).float()
        if rule.softcap is not None:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        logits = logits / rule.temperature
        return logits.index_fill(-1, torch.tensor(rule.never, dtype=torch.long), -torch.inf)

    logits = logits_of(hidden, *head)
    logprobs = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    divergences = tuple(kl_full(logits, logits_of(states, *other)) for states, other in anchors)
    return TokenStatistics(logprobs, entropy(logits), divergences)


def case(bias: bool, num_anchors: int) -> tuple[Tensor, Head, Tensor, list[tuple[Tensor, Head]]]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    labels = torch.randint(2, V, (N,), generator=generator)
    anchors = [(draw(N, H).detach(), Head(draw(V, H).detach(), draw(V).detach())) for _ in range(num_anchors)]
    return draw(N, H), Head(draw(V, H), draw(V) if bias else None), labels, anchors


def gradients(of, hidden: Tensor, head: Head, labels: Tensor, rule: LogitRule, anchors, used: str) -> list[Tensor]:
    found = of(hidden, head, labels, rule, anchors)
    chosen = {"logprobs": [found.logprobs], "entropy": [found.entropy], "divergences": list(found.divergences)}
    outputs = [*chosen["logprobs"], *chosen["entropy"], *chosen["divergences"]] if used == "all" else chosen[used]
    weights = torch.randn(len(outputs), N, generator=torch.Generator().manual_seed(5))
    loss = sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True))
    trained = [tensor for tensor in (hidden, *head) if tensor is not None]
    return list(torch.autograd.grad(loss, trained))


RULES = [
    LogitRule(),
    LogitRule(temperature=0.7, chunk=4),
    LogitRule(softcap=1.5, never=(0, 1), chunk=1),
    LogitRule(temperature=1.3, softcap=2.0, never=(1,), chunk=5),
]


@pytest.mark.parametrize(("rule", "bias"), [*itertools.product(RULES, (True, False))])
def test_values_and_gradients_are_those_through_all_logits(rule: LogitRule, bias: bool) -> None:
    hidden, head, labels, anchors = case(bias, num_anchors=2)
    expected, found = (of(hidden, head, labels, rule, anchors) for of in (plain, token_statistics))
    for one, other in zip([*expected[:2], *expected[2]], [*found[:2], *found[2]], strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    for used in ("all", "logprobs", "entropy", "divergences"):
        for one, other in zip(
            *(gradients(of, hidden, head, labels, rule, anchors, used) for of in (plain, token_statistics)), strict=True
        ):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


def test_by_hand() -> None:
    """z = (0, ln 3), so p = (1/4, 3/4): log p_1 = ln(3/4), H = ¼ ln 4 + ¾ ln(4/3), and against a uniform anchor
    KL = ln 2 − H. ∂(log p_1)/∂z = (−¼, ¼), which times the weight's rows is the gradient of the state."""
    ln3 = 1.0986122886681098
    hidden = torch.tensor([[1.0]], requires_grad=True)
    head = Head(torch.tensor([[0.0], [ln3]]))
    uniform = (torch.zeros(1, 1), head)
    found = token_statistics(hidden, head, torch.tensor([1]), LogitRule(), [uniform])
    assert found.logprobs.item() == pytest.approx(-0.2876820724517809)
    assert found.entropy.item() == pytest.approx(0.5623351446188083)
    assert found.divergences[0].item() == pytest.approx(0.1308120359411370, abs=1e-6)
    (gradient,) = torch.autograd.grad(found.logprobs.sum(), hidden)
    assert gradient.item() == pytest.approx(0.25 * ln3)


def test_a_token_that_is_never_drawn_has_no_part() -> None:
    """With two tokens out of it, the distribution is that of the other two."""
    hidden, weight = torch.randn(5, H), torch.randn(4, H)
    labels = torch.tensor([2, 3, 3, 2, 2])
    found = token_statistics(hidden, Head(weight), labels, LogitRule(never=(0, 1)), [(hidden, Head(weight + 1))])
    two = token_statistics(hidden, Head(weight[2:]), labels - 2, LogitRule(), [(hidden, Head(weight[2:] + 1))])
    # KL to an anchor that gives the other tokens a share is larger by the log of what it leaves.
    torch.testing.assert_close(found[:2], two[:2])
    torch.testing.assert_close(found.divergences, two.divergences, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_under_autocast(trained: bool) -> None:
    """As autocast itself would have it: logits in bfloat16, statistics in float32."""
    hidden, head, labels, _ = case(bias=False, num_anchors=0)
    head = Head(head.weight.requires_grad_(trained))
    inputs = [hidden, head.weight] if trained else [hidden]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (of(hidden, head, labels, LogitRule(chunk=4)) for of in (token_statistics, plain))
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(f.logprobs.sum(), inputs) for f in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_only_the_head_is_trained() -> None:
    hidden, head, labels, _ = case(bias=True, num_anchors=0)
    hidden = hidden.detach()
    ours, theirs = (
        torch.autograd.grad(of(hidden, head, labels, LogitRule(chunk=4)).logprobs.sum(), head)
        for of in (token_statistics, plain)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_logits_of_all_tokens_never_exist() -> None:
    tokens, vocabulary = 400, 500
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with Largest() as largest:
        found = token_statistics(hidden, Head(weight), labels, LogitRule(chunk=10), [(hidden, Head(weight * 2))])
        (found.logprobs + found.entropy + found.divergences[0]).sum().backward()
    assert largest.numbers == 10 * vocabulary  # a chunk; states and weight have fewer


def test_no_tokens() -> None:
    found = token_statistics(torch.zeros(0, H), Head(torch.zeros(V, H)), torch.zeros(0, dtype=torch.long), LogitRule())
    assert [len(found.logprobs), len(found.entropy)] == [0, 0]
