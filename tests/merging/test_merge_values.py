"""Each merge method on numbers small enough to follow by hand."""

import math

import pytest
import torch

from remix.merging.methods import (
    align,
    consensus,
    dare_linear,
    dare_ties,
    della,
    fisher,
    karcher,
    linear,
    magmax,
    misaligned_fraction,
    model_stock,
    pam,
    regmean,
    slerp,
    tall,
    tall_mask,
    task_arithmetic,
    task_seed,
    ties,
)

BASE = torch.tensor([10.0, 10.0, 10.0, 10.0])
TASKS = [torch.tensor([4.0, -1.0, 0.5, 2.0]), torch.tensor([-2.0, -3.0, 0.1, 1.0]), torch.tensor([1.0, 2.0, -0.2, 3.0])]
# The two largest of each: [4, 0, 0, 2], [-2, -3, 0, 0], [0, 2, 0, 3].
ZERO = torch.zeros(2)
X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def close(result, *expected):
    torch.testing.assert_close(result, torch.tensor(expected).view_as(result), atol=2e-6, rtol=0)


def test_linear_is_the_mean_of_the_models():
    # Models [11, 5], [13, 3]: (1·11 + 3·13)/4 = 12.5, (1·5 + 3·3)/4 = 3.5.
    base, tasks = torch.tensor([10.0, 4.0]), [torch.tensor([1.0, 1.0]), torch.tensor([3.0, -1.0])]
    close(linear(base, tasks, [1, 3]), 12.5, 3.5)
    close(linear(base, tasks, [1, 3], normalize=False), 20.0, 2.0)  # 10 + 1 + 9, 4 + 1 - 3


def test_task_arithmetic_adds_and_subtracts():
    close(task_arithmetic(BASE, TASKS[:2], [1, -0.5]), 15.0, 10.5, 10.45, 11.5)  # 10 + 4 + 1, 10 - 1 + 1.5, …
    close(task_arithmetic(BASE, TASKS[:2], [1, -0.5], density=0.5), 15.0, 11.5, 10.0, 12.0)  # of the trimmed


def test_ties_trims_elects_and_averages():
    # Σ = 2, -1, 0, 5: signs + - + +. Agreeing: {4}, {-3}, {}, {2, 3}.
    close(ties(BASE, TASKS, [1, 1, 1], density=0.5), 14.0, 7.0, 10.0, 12.5)
    # One vote each: 0, 0, 0, 2, so + everywhere; of entry 1 only 2 agrees.
    close(ties(BASE, TASKS, [1, 1, 1], density=0.5, elect="frequency"), 14.0, 12.0, 10.0, 12.5)


def test_ties_weighs_after_the_election_or_before_it():
    weights = [0.5, 1.0, 2.0]  # weighted: [2, 0, 0, 1], [-2, -3, 0, 0], [0, 4, 0, 6]
    close(ties(BASE, TASKS, weights, density=0.5), 12.0, 7.0, 10.0, 13.5)  # still {4}, {-3}, {}, {2, 3}; (1 + 6)/2
    # Σ weighted = 0, 1, 0, 7: + everywhere: {2}, {4}, {}, {1, 6}.
    before = {"density": 0.5, "elect_weighted": True}
    close(ties(BASE, TASKS, weights, **before), 12.0, 14.0, 10.0, 13.5)
    close(ties(BASE, TASKS, weights, **before, mean="sum"), 12.0, 14.0, 10.0, 17.0)
    # Weights that cancel divide nothing: 2 - 5.
    close(ties(ZERO, [2 * X, 5 * X], [1, -1], density=1.0, mean="weight"), -3.0, 0.0)
    # 2/.5, 4/2, 7/(.5 + 2), then halved.
    close(ties(BASE, TASKS, weights, **before, mean="weight", scale=0.5), 12.0, 11.0, 10.0, 11.4)


def test_opposite_votes_cancel_whatever_their_order():
    # In float32 0.1 + 0.2 - 0.3 is 0, which elects +, and 0.2 - 0.3 + 0.1 is below; the exact sum of the three decides.
    tasks = [torch.tensor([value]) for value in (0.1, 0.2, -0.3)]
    one, other = (
        ties(torch.zeros(1), order, [1, 1, 1], density=1.0) for order in (tasks, [tasks[1], tasks[2], tasks[0]])
    )
    assert torch.equal(one, other)


def test_trimming_keeps_exactly_k_and_of_equals_the_first():
    equal = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    base = torch.zeros(2, 3)
    close(ties(base, [equal], [1], density=0.5), 1.0, -1.0, 1.0, 0.0, 0.0, 0.0)
    close(ties(base, [equal], [1], density=0.01), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # at least one
    close(ties(base, [equal], [1], density=0.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    mixed = torch.tensor([0.0, 3.0, -1.0, 0.0, 3.0])
    close(ties(torch.zeros(5), [mixed], [1], density=0.39), 0.0, 3.0, 0.0, 0.0, 0.0)  # 1.95 entries are one
    close(ties(torch.zeros(5), [mixed], [1], density=0.4), 0.0, 3.0, 0.0, 0.0, 3.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_trimming_finds_the_threshold_in_every_dtype(dtype):
    task = torch.randn(5000, generator=torch.Generator().manual_seed(3)).to(dtype)
    kept = ties(torch.zeros_like(task), [task], [1], density=0.3) != 0
    assert kept.sum() == 1500
    assert task[kept].abs().min() >= task[~kept].abs().max()


def test_dare_drops_and_rescales():
    task = torch.arange(1.0, 41.0)
    base = torch.zeros(40)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(7)) < 0.25
    assert 0 < mask.sum() < 40
    for method in (dare_linear, dare_ties):  # of one task there is nothing to elect
        close(method(base, [task], [1], seeds=[7], density=0.25), *(4 * task * mask).tolist())
        close(method(base, [task], [1], seeds=[7], density=0.25, rescale="none"), *(task * mask).tolist())
        kept_norm = method(base, [task], [1], seeds=[7], density=0.25, rescale="l1")
        assert math.isclose(kept_norm.sum().item(), 820.0, rel_tol=1e-6)  # 1 + … + 40
        assert torch.equal(kept_norm != 0, mask)
        assert not method(base, [task], [1], seeds=[7], density=0.0, rescale="l1").any()
        assert not method(base, [task], [1], seeds=[7], density=0.0).any()
    close(dare_linear(base, [task, task], [1, 2], seeds=[7, 7], density=0.25), *(12 * task * mask).tolist())


def test_dare_ties_elects_among_what_is_left():
    ones = torch.ones(64)
    first, second = (torch.rand(64, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (1, 2))
    merged = dare_ties(torch.zeros(64), [ones, -3 * ones], [1, 1], seeds=[1, 2], density=0.5)
    # Left of both is 2 and -6: - wins and stands alone; else whichever is left.
    expected = torch.where(second, -6.0, torch.where(first, 2.0, 0.0))
    assert torch.equal(merged, expected)


def test_della_keeps_the_larger_more_often():
    row = torch.tensor([3.0, -1.0, 5.0, 2.0, -4.0])  # ranks 2, 0, 4, 1, 3 of 0..4
    keep = torch.tensor([0.5, 0.3, 0.7, 0.4, 0.6])  # .5 - .4/2 + .4·rank/4
    tasks = [row.expand(20000, 5)]
    base = torch.zeros(20000, 5)
    merged = della(base, tasks, [1], seeds=[5], density=0.5, epsilon=0.4)
    left = merged != 0
    torch.testing.assert_close(left.float().mean(0), keep, atol=0.015, rtol=0)  # four standard errors
    torch.testing.assert_close(merged, torch.where(left, row / keep, 0.0))
    torch.testing.assert_close(merged.mean(0), row, atol=0.15, rtol=0)  # expectation is kept
    unscaled = della(base, tasks, [1], seeds=[5], density=0.5, epsilon=0.4, rescale="none")
    assert torch.equal(unscaled, torch.where(left, row, 0.0))
    same_norm = della(base, tasks, [1], seeds=[5], density=0.5, epsilon=0.4, rescale="l1")
    assert math.isclose(same_norm.abs().sum().item(), 15.0 * 20000, rel_tol=1e-5)


def test_dellas_window_shrinks_at_the_ends():
    row = torch.tensor([1.0, 2.0, 3.0]).expand(20000, 3)
    left = della(torch.zeros(20000, 3), [row], [1], seeds=[5], density=0.9, epsilon=1.0) != 0
    torch.testing.assert_close(left.float().mean(0), torch.tensor([0.8, 0.9, 1.0]), atol=0.012, rtol=0)
    assert not della(torch.zeros(4), [torch.ones(4)], [1], seeds=[5], density=0.0).any()
    single = della(torch.zeros(1), [torch.ones(1)], [1], seeds=[5], density=0.5)  # one entry: kept with .5, doubled
    assert single.item() in (0.0, 2.0)


def test_magmax_takes_the_largest_magnitude():
    base, tasks = torch.zeros(4), [torch.tensor([1.0, -5.0, 2.0, 0.0]), torch.tensor([-3.0, 4.0, -2.0, 0.0])]
    close(magmax(base, tasks, [1, 1]), -3.0, -5.0, 2.0, 0.0)  # of 2 and -2 the positive
    close(magmax(base, tasks, [2, 0.5]), 2.0, -10.0, 4.0, 0.0)  # of [2, -10, 4, 0] and [-1.5, 2, -1, 0]


def test_slerp_follows_the_arc():
    # Ω = 90°, t = 1/3: sin 60°, sin 30°.
    close(slerp(ZERO, [X, Y], [2, 1]), math.sqrt(3) / 2, 0.5)
    close(slerp(ZERO, [2 * X, Y], [2, 1]), math.sqrt(3), 0.5)
    # Ω = 60°, t = 1/2: sin 30°/sin 60° = 1/√3 of each of [1, 0] and [1/2, √3/2].
    close(slerp(ZERO, [X, torch.tensor([0.5, math.sqrt(3) / 2])], [1, 1]), math.sqrt(3) / 2, 0.5)
    # The weights themselves: models [1, 0] and [0, 1], base [1, 0].
    close(slerp(X, [ZERO, Y - X], [1, 1], origin="zero"), math.sqrt(0.5), math.sqrt(0.5))


def test_slerp_is_straight_where_there_is_no_arc():
    close(slerp(ZERO, [X + Y, 3 * (X + Y)], [1, 1]), 2.0, 2.0)
    close(slerp(ZERO, [X, -X], [3, 1]), 0.5, 0.0)
    close(slerp(ZERO, [X, ZERO], [1, 1]), 0.5, 0.0)
    close(slerp(ZERO, [X, Y], [1, 1], threshold=0.0), math.sqrt(0.5), math.sqrt(0.5))
    close(slerp(ZERO, [X, X + Y], [1, 1], threshold=0.5), 1.0, 0.5)  # cos 45° is above .5


def test_slerp_is_of_two():
    with pytest.raises(ValueError, match="exactly 2 models or adapters, not 3; karcher merges any number"):
        slerp(ZERO, [X, Y, X], [1, 1, 1])


def test_karcher_is_the_middle_of_the_arc():
    close(karcher(ZERO, [X, Y], [2, 1]), math.sqrt(3) / 2, 0.5)  # 30° from the first
    # One step from [2, 1]/√5 along the arc is all of it: -2/3·atan(1/2) + 1/3·atan 2 = 30° - atan(1/2).
    close(karcher(ZERO, [X, Y], [2, 1], iterations=1), math.sqrt(3) / 2, 0.5)
    close(karcher(ZERO, [X], [2]), 1.0, 0.0)
    # The first guess, along [1, 2], is one of the parents: its pull is 0, the others' go on to (2·90° + 3·63.43°)/6.
    angle, length = (2 * math.pi / 2 + 3 * math.atan(2)) / 6, (1 + 2 + 3 * math.sqrt(5)) / 6
    close(karcher(ZERO, [X, Y, X + 2 * Y], [1, 2, 3]), length * math.cos(angle), length * math.sin(angle))
    close(karcher(ZERO, [3 * X, Y], [1, 1]), math.sqrt(2), math.sqrt(2))  # 45°, of length (3 + 1)/2
    third = math.sqrt(1 / 3)
    close(karcher(torch.zeros(3), list(torch.eye(3)), [1, 1, 1]), third, third, third)
    close(karcher(X, [ZERO, Y - X], [1, 1], origin="zero"), math.sqrt(0.5), math.sqrt(0.5))
    close(karcher(ZERO, [2 * X, ZERO], [1, 1]), 1.0, 0.0)  # no direction, but length (2 + 0)/2
    close(karcher(ZERO, [X, -X], [3, 1]), 1.0, 0.0)  # the antipode pulls nowhere
    close(karcher(ZERO, [X, -X], [1, 1]), 0.0, 0.0)  # no middle: straight
    close(karcher(ZERO, [ZERO, ZERO], [1, 1]), 0.0, 0.0)


def test_karcher_balances_the_pulls():
    """At the mean the weighted log maps add up to 0; worked out in the whole space, in float64."""
    generator = torch.Generator().manual_seed(1)
    tasks = [torch.randn(30, generator=generator, dtype=torch.float64) + 0.7 for _ in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    merged = karcher(torch.zeros(30, dtype=torch.float64), tasks, weights, tolerance=1e-12)
    assert math.isclose(merged.norm(), sum(w * t.norm() for w, t in zip(weights, tasks, strict=True)), rel_tol=1e-9)
    m, pull = merged / merged.norm(), torch.zeros(30, dtype=torch.float64)
    for task, weight in zip(tasks, weights, strict=True):
        u = task / task.norm()
        angle = torch.acos(u @ m)
        pull += weight * angle / angle.sin() * (u - (u @ m) * m)
    assert pull.norm() < 1e-7
    one_step = karcher(torch.zeros(30, dtype=torch.float64), tasks, weights, iterations=1)
    assert 1e-7 < (one_step - merged).norm() < 0.05 * merged.norm()


def test_model_stock_draws_towards_the_base():
    # cos 45° = .7071: t = 2·.7071/1.7071 = .8284 of the mean [1, .5].
    close(model_stock(ZERO, [X, X + Y], [1, 1]), 0.8284271, 0.4142136)
    # Cosines 1, 0, 0, mean 1/3: t = 1/(1 + 2/3) = .6 of [2/3, 1/3].
    close(model_stock(ZERO, [X, X, Y], [1, 1, 1]), 0.4, 0.2)
    close(model_stock(ZERO, [2 * X, X], [1, 1]), 1.5, 0.0)  # of one direction: the mean
    close(model_stock(ZERO, [2 * X, X], [3, 1]), 1.75, 0.0)
    for other in (Y, -X, ZERO):  # nothing in common, or no direction: the base
        close(model_stock(torch.tensor([5.0, 6.0]), [X, other], [1, 1]), 5.0, 6.0)
    with pytest.raises(ValueError, match="at least 2"):
        model_stock(ZERO, [X], [1])


def test_fisher_trusts_who_is_sure():
    tasks, fishers = (
        [torch.tensor([2.0, 2.0]), torch.tensor([-2.0, 6.0])],
        [torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])],
    )
    close(fisher(ZERO, tasks, [1, 1], fishers=fishers), -1.0, 3.0)  # (2 - 6)/4, (6 + 6)/4
    close(fisher(ZERO, tasks, [3, 1], fishers=fishers), 0.0, 2.4)  # (6 - 6)/6, (18 + 6)/10
    tiny = [information * 1e-40 for information in fishers]  # below float32's normal range
    torch.testing.assert_close(fisher(ZERO, tasks, [1, 1], fishers=tiny), torch.tensor([-1.0, 3.0]), atol=1e-3, rtol=0)
    close(fisher(ZERO, tasks, [1, 1], fishers=[torch.tensor([0.0, 3.0]), torch.tensor([0.0, 1.0])]), 0.0, 3.0)
    close(fisher(ZERO, tasks, [3, 1], fishers=[ZERO, ZERO]), 1.0, 3.0)  # nobody is: the weighted mean
    close(fisher(ZERO, tasks, [3, 1], fishers=[fishers[0], None]), 1.0, 3.0)  # one is not asked
    # A floor of half the largest: 1.5 and 3, 3 and 1.5: (3 - 6)/4.5, (6 + 9)/4.5.
    close(fisher(ZERO, tasks, [1, 1], fishers=fishers, floor=0.5), -3 / 4.5, 15 / 4.5)


def test_fisher_refuses_what_is_no_information():
    for fishers, said in (
        ([X], "1 Fisher tensors for 2"),
        ([X, -Y], "Fisher tensor 1 has entries below 0"),
        ([X, torch.ones(3)], "Fisher tensor 1 has shape"),
        ([torch.tensor([math.inf, 1.0]), X], "Fisher tensor 0 holds values that are not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            fisher(ZERO, [X, Y], [1, 1], fishers=fishers)


def test_regmean_on_uncorrelated_inputs_weighs_each_column():
    # One row, G diagonal: columns (1·2 + 3·-2)/4 and (3·2 + 1·6)/4.
    tasks, grams = (
        [torch.tensor([[2.0, 2.0]]), torch.tensor([[-2.0, 6.0]])],
        [torch.diag(X + 3 * Y), torch.diag(3 * X + Y)],
    )
    close(regmean(torch.zeros(1, 2), tasks, [1, 1], grams=grams, ridge=1e-12), -1.0, 3.0)
    close(regmean(torch.zeros(1, 2), tasks, [3, 1], grams=grams, ridge=1e-12), 0.0, 2.4)


def test_regmean_is_least_squares_on_all_inputs():
    generator = torch.Generator().manual_seed(2)
    inputs = [
        torch.randn(20, 4, generator=generator, dtype=torch.float64) @ torch.randn(4, 4, generator=generator).double()
        for _ in range(3)
    ]
    base = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    tasks = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    grams = [x.T @ x for x in inputs]
    merged = regmean(base, tasks, [1, 1, 1], grams=grams, off_diagonal=1.0, ridge=1e-12)
    outputs = torch.cat([x @ (base + task).T for x, task in zip(inputs, tasks, strict=True)])
    torch.testing.assert_close(merged, torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T, atol=1e-8, rtol=0)
    # α = 0 forgets correlations.
    diagonal = [torch.diag(gram.diagonal()) for gram in grams]
    torch.testing.assert_close(
        regmean(base, tasks, [1, 1, 1], grams=grams, off_diagonal=0.0), regmean(base, tasks, [1, 1, 1], grams=diagonal)
    )


def test_regmean_without_inputs_is_the_weighted_mean():
    row = [torch.tensor([[2.0, 2.0]]), torch.tensor([[-2.0, 6.0]])]
    alive = torch.diag(X)
    for grams in ([alive, None], [torch.zeros(2, 2)] * 2):
        close(regmean(torch.zeros(1, 2), row, [3, 1], grams=grams), 1.0, 3.0)
    close(regmean(ZERO, [row[0][0], row[1][0]], [3, 1], grams=[alive, alive]), 1.0, 3.0)  # a bias
    close(regmean(torch.zeros(1, 2), row, [3, 1], grams=[3 * alive, alive]), 1.6, 3.0)  # (9·2 - 2)/10; a dead input
    with pytest.raises(ValueError, match="Gram matrix 1 has shape"):
        regmean(torch.zeros(1, 2), row, [1, 1], grams=[alive, torch.eye(3)])
    with pytest.raises(ValueError, match="1 Gram matrices for 2"):
        regmean(torch.zeros(1, 2), row, [1, 1], grams=[alive])


def test_tall_masks_and_their_consensus():
    base, tasks = torch.full((3,), 7.0), [torch.tensor([2.0, 1.0, 0.0]), torch.tensor([2.0, -3.0, 1.0])]
    merged = torch.tensor([4.0, -2.0, 1.0])
    # λ·|τ_MTL - τ_1| = .4·[2, 3, 1] against [2, 1, 0]; of τ_2 .4·[2, 1, 0] against [2, 3, 1].
    assert tall_mask(tasks[0], merged, 0.4).tolist() == [True, False, False]
    assert tall_mask(tasks[1], merged, 0.4).tolist() == [True, True, True]
    close(tall(base, tasks, [1, 1], task=0), 11.0, 7.0, 7.0)
    close(tall(base, tasks, [1, 1], task=1), 11.0, 5.0, 8.0)
    close(tall(base, tasks, [1, 1], task=1, threshold=1.5), 7.0, 5.0, 8.0)  # 1.5·2 is above 2
    assert tall_mask(torch.ones(1), torch.full((1,), 2.0), 1.0).tolist() == [True]  # 1 ≥ 1·|2 - 1|
    close(consensus(base, tasks, [1, 1]), 11.0, 7.0, 7.0)
    close(consensus(base, tasks, [1, 1], k=1), 11.0, 5.0, 8.0)
    close(consensus(base, tasks, [1, 1], k=0), 11.0, 5.0, 8.0)
    with pytest.raises(ValueError, match="no task 2 among 2"):
        tall(base, tasks, [1, 1], task=2)
    with pytest.raises(ValueError, match="k = 3 of 2"):
        consensus(base, tasks, [1, 1], k=3)


def test_alignment_gives_important_entries_their_sign_back():
    global_, task = torch.tensor([4.0, -3.0, 0.1, 2.0]), torch.tensor([-1.0, -1.0, -1.0, 1.0])
    aligned, mask = align(task, global_, share=0.5)  # I = {0, 1}, of which 0 has turned
    close(aligned, 4.0, -1.0, -1.0, 1.0)
    assert mask.tolist() == [True, False, False, False]
    assert misaligned_fraction(task, global_, share=0.5) == 0.5
    close(align(task, global_, share=0.5, reset="zero")[0], 0.0, -1.0, -1.0, 1.0)
    moved = torch.tensor([0.0, 0.0, 9.0, 9.0])  # I = {2, 3}, of which 2 has turned
    close(align(task, global_, share=0.5, importance=moved)[0], -1.0, -1.0, 0.1, 1.0)
    assert misaligned_fraction(task, global_, share=1.0, importance=moved) == 0.5
    only_last = torch.tensor([0.0, 0.0, 0.0, 9.0])  # what has not moved is not important: I = {3}
    assert not align(task, global_, share=1.0, importance=only_last)[1].any()
    close(align(task, global_, share=1.0)[0], 4.0, -1.0, 0.1, 1.0)
    assert misaligned_fraction(task, global_, share=1.0) == 0.5


def test_what_has_no_direction_is_not_aligned():
    global_, task = torch.tensor([1.0, 0.0, -0.0, 0.0]), torch.tensor([0.0, 1.0, -1.0, 0.0])
    aligned, mask = align(task, global_, share=1.0)
    close(aligned, 1.0, 1.0, -1.0, 0.0)  # a task at 0 does differ from a global that is not
    assert mask.tolist() == [True, False, False, False]
    assert misaligned_fraction(task, global_, share=1.0) == 1.0
    everywhere = torch.ones(4)  # a global weight back at 0 may be important, but has no sign
    assert align(task, global_, share=1.0, importance=everywhere)[1].tolist() == [True, False, False, False]
    assert misaligned_fraction(task, global_, share=1.0, importance=everywhere) == 1.0
    assert misaligned_fraction(task, torch.zeros(4), share=1.0) == 0.0
    assert misaligned_fraction(-global_, global_, share=0.0) == 0.0
    with pytest.raises(ValueError, match="the task's weights has shape"):
        align(task[:2], global_, share=0.5)
    with pytest.raises(ValueError, match="the importance has shape"):
        align(task, global_, share=0.5, importance=torch.ones(3))


def test_alignment_keeps_the_tasks_dtype_and_no_gradient():
    task = torch.tensor([-1.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    aligned, _ = align(task, torch.tensor([1.1, 1.0]), share=1.0)
    assert not aligned.requires_grad
    assert aligned.dtype == torch.bfloat16
    assert aligned.tolist() == [1.1015625, 1.0]


def test_pam_aligns_and_averages_in_order():
    tasks = [torch.tensor(row) for row in ([4.0, -3.0, 0.1, 2.0], [-1.0, -1.0, -1.0, 1.0], [-2.0, 2.0, 1.0, -1.0])]
    base = torch.zeros(4)
    # The second becomes [4, -1, -1, 1], g = [4, -2, -.45, 1.5]; of this I = {0, 1}: the third becomes [4, -2, 1, -1].
    close(pam(base, tasks[:2], [1, 1]), 4.0, -2.0, -0.45, 1.5)
    close(pam(base, tasks, [1, 1, 1]), 4.0, -2.0, 0.275, 0.25)
    # g + (w - g)/3.
    close(pam(base, tasks, [1, 1, 1], average="running_mean"), 4.0, -2.0, 1 / 30, 2 / 3)
    close(pam(base, tasks[:2], [1, 1], reset="zero"), 2.0, -2.0, -0.45, 1.5)
    close(pam(base, tasks[:2], [1, 1], share=0.0), 1.5, -2.0, -0.45, 1.5)  # a plain average
    close(pam(base, tasks[:2], [1, 2]), 4.0, -2.5, -0.95, 2.0)  # of [4, -2, -2, 2]
    assert not torch.equal(pam(base, tasks, [1, 1, 1]), pam(base, tasks[::-1], [1, 1, 1]))


def test_seeds_belong_to_names():
    seeds = {
        task_seed(seed, adapter, tensor) for seed in (0, 1) for adapter in ("a", "b", "ab") for tensor in ("x", "bx")
    }
    assert len(seeds) == 12
    assert task_seed(3, "math", "layers.0.q_proj") == task_seed(3, "math", "layers.0.q_proj")
    assert all(0 <= seed < 2**32 for seed in seeds)
