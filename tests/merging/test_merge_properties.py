"""What holds of every merge method, on random tensors of every shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remix.merging.methods import METHODS, linear, magmax, task_arithmetic

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 2), (0, 4), (300, 300)]
"""The last is worked on in two chunks."""
FACTORS = [name for name, method in METHODS.items() if method.weights == "factors"]
SHARES = [name for name, method in METHODS.items() if method.weights == "shares"]
FAST = settings(max_examples=30, deadline=None)


class Case:
    """Random parents of a method, with whatever it needs of each; a fifth of the entries are 0, others are halves, so
    that ties and cancellation are common."""

    def __init__(self, name: str, shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.method, self.name = METHODS[name], name
        rng = torch.Generator().manual_seed(seed)
        low, high = self.method.min_parents, self.method.max_parents or 4
        count = int(torch.randint(low, high + 1, (), generator=rng))
        self.base = torch.randn(shape, generator=rng).to(dtype)
        self.tasks = [self._task(shape, rng).to(dtype) for _ in range(count)]
        self.weights = (torch.randint(1, 9, (count,), generator=rng) / 4).tolist()
        self.fishers = [torch.rand(shape, generator=rng) for _ in range(count)]
        width = shape[1] if len(shape) == 2 else 1
        inputs = [torch.randn(2 * width, width, generator=rng) for _ in range(count)]
        self.grams = [x.T @ x for x in inputs]
        self.seeds = torch.randint(0, 2**31, (count,), generator=rng).tolist()

    @staticmethod
    def _task(shape: Sequence[int], rng: torch.Generator) -> Tensor:
        values = torch.randn(shape, generator=rng)
        kind = torch.rand(shape, generator=rng)
        return torch.where(kind < 0.2, 0.0, torch.where(kind < 0.5, (values * 2).round() / 2, values))

    def merge(
        self, weights: Sequence[float] | None = None, order: Sequence[int] | None = None, **changes: Any
    ) -> Tensor:
        order = range(len(self.tasks)) if order is None else order
        weights = self.weights if weights is None else weights
        given: Mapping[str, Sequence[Any]] = {"seeds": self.seeds, "fishers": self.fishers, "grams": self.grams}
        kind = "seeds" if self.method.random else f"{self.method.statistics}s"
        extra = {kind: [given[kind][i] for i in order]} if kind in given else {}
        if self.name == "consensus":
            changes.setdefault("k", min(2, len(self.tasks)))
        if self.name == "tall" and order:
            changes["task"] = list(order).index(0)
        return self.method.function(
            self.base, [self.tasks[i] for i in order], [weights[i] for i in order], **extra, **changes
        )

    def only_the_first(self) -> Tensor:
        """One task at weight 1, nothing thinned out."""
        changes = {"density": 1.0} if "density" in self.method.parameters else {}
        if self.name == "consensus":
            changes["k"] = 1
        if self.method.min_parents == 1:
            return self.merge([1.0] * len(self.tasks), [0], **changes)
        return self.merge([1.0] + [0.0] * (len(self.tasks) - 1), **changes)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


cases = st.tuples(st.sampled_from(SHAPES), st.integers(0, 2**31))


@pytest.mark.parametrize("name", FACTORS)
@FAST
@given(cases, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_weights_of_0_give_the_base_to_the_bit(name, case, dtype):
    case = Case(name, *case, dtype)
    case.base.view(-1)[:1] = -0.0
    assert torch.equal(bits(case.merge([0.0] * len(case.tasks))), bits(case.base))


@pytest.mark.parametrize("name", SHARES)
def test_shares_that_add_up_to_0_are_refused(name):
    case = Case(name, (3, 5), 1)
    for weights in ([0.0] * len(case.tasks), [1.0] + [-1.0] * (len(case.tasks) - 1), [-1.0] * len(case.tasks)):
        if min(weights) <= 0:
            with pytest.raises(ValueError, match="shares of a mean"):
                case.merge(weights)


@pytest.mark.parametrize("name", SHARES)
@FAST
@given(cases)
def test_of_shares_only_ratios_count(name, case):
    case = Case(name, *case)
    torch.testing.assert_close(case.merge([4 * weight for weight in case.weights]), case.merge(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "model_stock"])
@FAST
@given(cases, st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_task_at_weight_1_and_density_1_is_that_task(name, case, dtype):
    case = Case(name, *case, dtype)
    expected = (case.base.float() + case.tasks[0].float()).to(dtype)
    assert torch.equal(case.only_the_first(), expected)


def test_two_of_the_same_are_that_one_to_model_stock():
    case = Case("model_stock", (3, 5), 4)
    merged = METHODS["model_stock"].function(case.base, [case.tasks[0]] * 2, [1.0, 0.5])
    torch.testing.assert_close(merged, case.base + case.tasks[0])


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.ordered])
@FAST
@given(cases, st.randoms(use_true_random=False))
def test_the_order_of_parents_changes_nothing(name, case, random):
    case = Case(name, *case)
    order = list(range(len(case.tasks)))
    random.shuffle(order)
    torch.testing.assert_close(case.merge(order=order), case.merge(), rtol=1e-5, atol=2e-6)
    if name == "magmax":
        assert torch.equal(bits(case.merge(order=order)), bits(case.merge()))


@pytest.mark.parametrize("name", METHODS)
@FAST
@given(cases, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_a_merge_is_deterministic_and_leaves_its_inputs_alone(name, case, dtype):
    case = Case(name, *case, dtype)
    before = [tensor.clone() for tensor in (case.base, *case.tasks, *case.fishers, *case.grams)]
    merged = case.merge()
    assert merged.dtype == dtype
    assert merged.shape == case.base.shape
    assert torch.equal(bits(case.merge()), bits(merged))
    for tensor, copy in zip((case.base, *case.tasks, *case.fishers, *case.grams), before, strict=True):
        assert torch.equal(bits(tensor), bits(copy))


@pytest.mark.parametrize("name", METHODS)
def test_layout_in_memory_changes_nothing(name):
    case = Case(name, (5, 3), 8)
    merged = case.merge()
    case.base, case.tasks = case.base.T.contiguous().T, [task.T.contiguous().T for task in case.tasks]
    torch.testing.assert_close(case.merge(), merged)


@pytest.mark.parametrize("name", METHODS)
def test_arithmetic_is_in_float32(name):
    """In bfloat16 small steps would be lost before the last rounding."""
    case = Case(name, (3, 5), 8)
    case.base, case.tasks = case.base.bfloat16(), [task.bfloat16() for task in case.tasks]
    merged = case.merge()
    case.base, case.tasks = case.base.float(), [task.float() for task in case.tasks]
    assert torch.equal(merged, case.merge().bfloat16())


@pytest.mark.parametrize("name", METHODS)
def test_all_zeros_stay_zeros(name):
    case = Case(name, (3, 5), 8)
    case.base, case.tasks = torch.zeros(3, 5), [torch.zeros(3, 5) for _ in case.tasks]
    assert not case.merge().any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name, bad):
    case = Case(name, (3, 5), 8)
    case.base[0, 0] = bad
    with pytest.raises(ValueError, match="the base holds values that are not finite"):
        case.merge()
    case = Case(name, (3, 5), 8)
    case.tasks[-1][2, 4] = bad
    with pytest.raises(ValueError, match=f"task vector {len(case.tasks) - 1} holds values that are not finite"):
        case.merge()
    with pytest.raises(ValueError, match="are not finite"):
        case.merge([bad] * len(case.tasks))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_what_is_no_float_of_16_bits_or_more_is_refused(dtype):
    whole = torch.ones(3).to(dtype)
    with pytest.raises(ValueError, match=f"the base is of {dtype}; merge 16, 32 and 64-bit floats"):
        linear(whole, [torch.ones(3)], [1])
    with pytest.raises(ValueError, match=f"task vector 0 is of {dtype}"):
        linear(torch.ones(3), [whole], [1])


@pytest.mark.parametrize("name", METHODS)
def test_parents_that_do_not_fit_are_refused(name):
    case = Case(name, (3, 5), 8)
    function = METHODS[name].function
    extra = {"seeds": [1]} if METHODS[name].random else {}
    extra |= {f"{METHODS[name].statistics}s": [1]} if METHODS[name].statistics else {}
    with pytest.raises(ValueError, match=r"0 task vectors and 0 weights"):
        function(case.base, [], [], **extra)
    with pytest.raises(ValueError, match=r"1 task vectors and 2 weights"):
        function(case.base, case.tasks[:1], [1, 1], **extra)
    with pytest.raises(ValueError, match=r"task vector 0 has shape \[5, 3\], not \[3, 5\]"):
        function(case.base, [case.tasks[0].T, *case.tasks[1:]], [1] * len(case.tasks), **extra)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.random])
def test_each_task_has_its_seed(name):
    case = Case(name, (3, 5), 8)
    with pytest.raises(ValueError, match=rf"1 seeds for {len(case.tasks) + 1} task vectors"):
        METHODS[name].function(case.base, [*case.tasks, case.tasks[0]], [1.0] * (len(case.tasks) + 1), seeds=[1])
    large = Case(name, (300, 300), 8)
    merged = large.merge()
    large.seeds[0] += 1
    assert not torch.equal(large.merge(), merged)


def test_large_finite_values_pass_and_an_overflow_is_named():
    huge = torch.full((8,), 3e38)  # the sum overflows float32, no value does
    assert torch.equal(linear(huge, [torch.zeros(8)], [1]), huge)
    half = torch.full((8,), 60000.0, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"overflows torch\.float16; lower the weights or merge in a wider dtype"):
        task_arithmetic(half, [half], [1])
    assert torch.equal(magmax(half, [half], [0]), half)
