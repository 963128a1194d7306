"""The arithmetic task: chains by hand, splits that cannot leak, and errors that say what to do."""

from __future__ import annotations

import pytest

from remix.tasks.arithmetic import KINDS, answer, careful_chain, chain, generate, problems, split_of, work

ALL_KINDS = tuple(KINDS)


def test_chains_by_hand() -> None:
    # 3+8 = 11, 11+4 = 15, 15+9 = 24
    assert careful_chain("3+8+4+9=") == "11;15;24#24"
    # 3+8 = 11, 11-4 = 7, 7+9 = 16
    assert careful_chain("3+8-4+9=") == "11;7;16#16"
    # 6*7 = 42, 3*4 = 12, 42+12 = 54, 2*5 = 10, 54+10 = 64
    assert careful_chain("6*7+3*4+2*5=") == "42;12;54;10;64#64"
    assert careful_chain("1+1=") == "2#2"
    assert answer("9-9+1=") == "1"


def test_a_slip_is_carried_on() -> None:
    assert work("3+8+4+9=") == [11, 15, 24]
    assert work("3+8+4+9=", slip_step=1, slip=-2) == [11, 13, 22]  # 15 -> 13, then 13+9
    assert work("6*7+3*4=", slip_step=0, slip=1) == [43, 12, 55]  # 42 -> 43, then 43+12
    assert chain([11, 13, 22]) == "11;13;22#22"


@pytest.mark.parametrize("text", ["", "3+8", "3=", "3+10=", "0+1=", "3+-8=", "3/8=", "3*4=", "3 + 8="])
def test_what_is_not_a_problem_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an arithmetic problem"):
        work(text)


def test_prompts_state_the_problem_and_its_answer() -> None:
    prompts = generate(kinds=ALL_KINDS, min_terms=3, max_terms=6, split="train", size=600, seed=1)
    assert len({prompt.id for prompt in prompts}) == len({prompt.content for prompt in prompts}) == 600
    for prompt in prompts:
        assert isinstance(prompt.content, str)
        assert prompt.id == f"arithmetic/train/{prompt.content}"
        assert prompt.task == "arithmetic"
        # Python itself is the judge: the problem without '=' is an expression.
        assert int(prompt.answer) == eval(prompt.content.removesuffix("="))
        assert careful_chain(prompt.content).rpartition("#")[2] == prompt.answer
        assert min(work(prompt.content)) >= 0


def test_kinds_and_terms_take_turns() -> None:
    first = generate(kinds=ALL_KINDS, min_terms=3, max_terms=4, split="train", size=6, seed=0)
    shapes = ["".join("d" if character.isdigit() else character for character in str(p.content)) for p in first]
    assert shapes[0::3] == ["d+d+d=", "d+d+d+d="]
    assert all("-" in shape for shape in shapes[1::3])
    assert shapes[2::3] == ["d*d+d*d+d*d=", "d*d+d*d+d*d+d*d="]


def test_splits_are_disjoint_whatever_the_seed_and_size() -> None:
    drawn: dict[str, set[str]] = {"train": set(), "test": set()}
    for seed, size in [(0, 50), (1, 400), (2, 900), (1234, 1200)]:
        for split in ("train", "test"):
            found = generate(kinds=ALL_KINDS, min_terms=3, max_terms=5, split=split, size=size, seed=seed)
            drawn[split] |= {str(prompt.content) for prompt in found}
    assert not drawn["train"] & drawn["test"]
    assert all(split_of(problem) == split for split, found in drawn.items() for problem in found)


def test_seed_alone_decides() -> None:
    def contents(seed: int, size: int, kinds: tuple[str, ...] = ("sum", "sum_subtract")) -> list[str]:
        prompts = generate(kinds=kinds, min_terms=3, max_terms=5, split="train", size=size, seed=seed)
        return [str(prompt.content) for prompt in prompts]

    assert contents(7, 200) == contents(7, 200)
    assert contents(7, 50) == contents(7, 200)[:50]  # a smaller size is a prefix
    assert contents(7, 200) != contents(8, 200)
    # A kind draws the same problems whether or not another stands beside it.
    assert contents(7, 60, ("sum",)) == [problem for problem in contents(7, 120) if "-" not in problem]


def test_every_problem_is_there_once() -> None:
    train, test = (list(problems("sum", 3, split, seed=5)) for split in ("train", "test"))
    assert len(train) + len(test) == 9**3 == len({*train, *test})
    assert 0.05 < len(test) / 9**3 < 0.20  # one in eight, by hash
    # a-b with a >= b: 9 * 10 / 2 pairs of digits.
    assert len([*problems("sum_subtract", 2, "train", 0), *problems("sum_subtract", 2, "test", 0)]) == 45


def test_a_short_kind_leaves_its_turn_to_the_others() -> None:
    # Two-term sums number 81 over both splits, so most of these have three terms.
    prompts = generate(kinds=["sum"], min_terms=2, max_terms=3, split="train", size=500, seed=0)
    assert len({prompt.content for prompt in prompts}) == 500


def test_errors_say_the_remedy() -> None:
    def ask(kinds: list[str], min_terms: int = 2, max_terms: int = 2, size: int = 1) -> None:
        generate(kinds=kinds, min_terms=min_terms, max_terms=max_terms, split="train", size=size, seed=0)

    exist = len(list(problems("sum", 2, "train", 0)))
    ask(["sum"], size=exist)
    with pytest.raises(ValueError, match=f"only {exist}: lower size, raise max_terms or add a kind"):
        ask(["sum"], size=exist + 1)
    with pytest.raises(ValueError, match=r"unknown kind of arithmetic 'division'.*sum_subtract"):
        ask(["division"])
    with pytest.raises(ValueError, match="at least one kind"):
        ask([])
    with pytest.raises(ValueError, match="each once"):
        ask(["sum", "sum"])
    with pytest.raises(ValueError, match="min_terms <= max_terms"):
        ask(["sum"], min_terms=4, max_terms=3)
    with pytest.raises(ValueError, match="2 <= min_terms"):
        ask(["sum"], min_terms=1, max_terms=3)
