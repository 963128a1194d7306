"""The two readings of LoRA: by hand, and what each keeps exactly."""

import math

import pytest
import torch

from remix.merging.lora import (
    concatenated,
    delta,
    dora_delta,
    factor_weights,
    lora_scaling,
    padded,
    refactor,
    refactor_product,
    rescaled_factors,
)

A = torch.tensor([[1.0, 2.0, 0.0]])  # [r 1, in 3]
B = torch.tensor([[3.0], [-1.0]])  # [out 2, r 1]
RNG = torch.Generator().manual_seed(0)


def random_pair(rank, outputs=6, inputs=5, dtype=torch.float32):
    return torch.randn(rank, inputs, generator=RNG).to(dtype), torch.randn(outputs, rank, generator=RNG).to(dtype)


def test_scalings():
    assert lora_scaling(16, 32) == 2.0
    assert lora_scaling(16, 32, rslora=True) == 8.0  # 32/√16


def test_delta_is_the_scaled_product():
    assert delta(A, B, 2.0).tolist() == [[6.0, 12.0, 0.0], [-2.0, -4.0, 0.0]]
    assert delta(A, B, 2.0, fan_in_fan_out=True).tolist() == [[6.0, -2.0], [12.0, -4.0], [0.0, 0.0]]


def test_delta_is_in_float32_at_least():
    a, b = random_pair(4, dtype=torch.bfloat16)
    product = delta(a, b, 0.3)
    assert product.dtype == torch.float32
    assert torch.equal(product, (b.float() @ a.float()) * 0.3)
    assert delta(a.double(), b, 1.0).dtype == torch.float64


@pytest.mark.parametrize(("a", "b"), [(A, B.T), (A[0], B), (A, B[..., None])])
def test_what_is_no_pair_is_refused(a, b):
    with pytest.raises(ValueError, match=r"are no pair \[r, in\], \[out, r\]; give A and B of one adapter"):
        delta(a, b, 1.0)


def test_dora_sets_the_length_of_each_output():
    weight = torch.tensor([[0.0, -2.0, 4.0], [1.0, 2.0, 3.0]])
    # V = W + B·A = [[3, 4, 4], [0, 0, 3]], lengths √41 and 3; magnitudes 2·√41 and 1: V' = [[6, 8, 8], [0, 0, 1]].
    magnitude = torch.tensor([2 * math.sqrt(41), 1.0])
    expected = torch.tensor([[6.0, 10.0, 4.0], [-1.0, -2.0, -2.0]])
    torch.testing.assert_close(dora_delta(weight, A, B, 1.0, magnitude), expected)
    transposed = dora_delta(weight.T, A, B, 1.0, magnitude, fan_in_fan_out=True)
    torch.testing.assert_close(transposed, expected.T)
    # The magnitudes of W + B·A themselves: plain LoRA.
    torch.testing.assert_close(dora_delta(weight, A, B, 1.0, torch.tensor([math.sqrt(41), 3.0])), delta(A, B, 1.0))


def test_dora_needs_its_own_weight():
    for weight, magnitude in ((torch.ones(2, 4), torch.ones(2)), (torch.ones(2, 3), torch.ones(3))):
        with pytest.raises(ValueError, match="give the weight of the layer that it was trained on"):
            dora_delta(weight, A, B, 1.0, magnitude)


def test_padding_keeps_the_product():
    a, b = random_pair(2)
    assert torch.equal(delta(padded(a, 5, "A"), padded(b, 5, "B"), 1.0), delta(a, b, 1.0))
    assert padded(a, 5, "A").shape == (5, 5)
    assert padded(b, 5, "B").shape == (6, 5)
    assert torch.equal(padded(a, 2, "A"), a)
    with pytest.raises(ValueError, match="a factor of rank 2 does not fit into rank 1"):
        padded(b, 1, "B")


def test_factors_share_a_weight_between_them():
    # Ratios 4·.5/2 = 1 and -2·4/2 = -4: roots 1 and 2, the sign on A.
    assert factor_weights([4.0, -2.0], [0.5, 4.0], "A", scaling=2.0) == [1.0, -2.0]
    assert factor_weights([4.0, -2.0], [0.5, 4.0], "B", scaling=2.0) == [1.0, 2.0]
    a, b = random_pair(3)
    on_a, on_b = (factor_weights([-0.7], [1.5], side)[0] for side in ("A", "B"))
    torch.testing.assert_close(delta(a * on_a, b * on_b, 1.0), -0.7 * delta(a, b, 1.5))
    assert factor_weights([1.0], [3.0], "A", scaling=3.0) == [1.0]  # an adapter alone stays what it is


def test_rescaled_factors_have_one_scaling():
    a, b = random_pair(3)
    (a_,), (b_,) = rescaled_factors([a], [2.0], scaling=0.5), rescaled_factors([b], [2.0], scaling=0.5)
    torch.testing.assert_close(delta(a_, b_, 0.5), delta(a, b, 2.0))
    assert torch.equal(rescaled_factors([a], [3.0], scaling=3.0)[0], a)


def test_side_by_side_the_sum_is_exact():
    pairs, weights, scalings = [random_pair(2), random_pair(4)], [0.5, -2.0], [2.0, 0.25]
    a, b = concatenated([pair[0] for pair in pairs], [pair[1] for pair in pairs], weights, scalings)
    assert (a.shape, b.shape) == ((6, 5), (6, 6))
    expected = sum(w * delta(*pair, s) for pair, w, s in zip(pairs, weights, scalings, strict=True))
    torch.testing.assert_close(delta(a, b, 1.0), expected)


def test_refactoring_keeps_the_largest_directions():
    change = torch.diag(torch.tensor([3.0, 1.0, 2.0]))[:, :3]
    a, b, energy = refactor(change, 2)
    torch.testing.assert_close(delta(a, b, 1.0), torch.diag(torch.tensor([3.0, 0.0, 2.0])))
    assert math.isclose(energy, 13 / 14)  # (9 + 4)/(9 + 4 + 1)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # balanced
    torch.testing.assert_close(a.norm(dim=1), torch.tensor([3.0, 2.0]).sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_refactoring_to_the_full_rank_loses_nothing(dtype):
    change = torch.randn(6, 4, generator=RNG).to(dtype)
    a, b, energy = refactor(change, 4)
    assert a.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(delta(a, b, 1.0), change.to(a.dtype))
    assert math.isclose(energy, 1.0)
    wide_a, wide_b, _ = refactor(change, 7)  # more than the weight has
    assert (wide_a.shape, wide_b.shape) == ((7, 4), (6, 7))
    torch.testing.assert_close(delta(wide_a, wide_b, 1.0), change.to(a.dtype))


def test_refactoring_nothing():
    a, b, energy = refactor(torch.zeros(3, 4), 2)
    assert not a.any()
    assert not b.any()
    assert energy == 1.0
    with pytest.raises(ValueError, match="rank 0 cannot be"):
        refactor(torch.zeros(3, 4), 0)


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
@pytest.mark.parametrize("own", [4, 7])
def test_a_product_is_refactored_without_being_formed(own, rank):
    a, b = random_pair(own)
    for x, y in ((a, b), (a * torch.tensor(0.0), b)):
        small_a, small_b, energy = refactor_product(x, y, rank)
        full_a, full_b, full_energy = refactor(delta(x, y, 1.0), rank)
        torch.testing.assert_close(delta(small_a, small_b, 1.0), delta(full_a, full_b, 1.0), atol=2e-5, rtol=0)
        assert math.isclose(energy, full_energy, rel_tol=1e-5)
        assert (small_a.shape, small_b.shape) == (full_a.shape, full_b.shape)
