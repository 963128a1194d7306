"""transformers' generate as an engine: log-probs of the trainer, draws that depend on the seed alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remix.errors import Interrupted
from remix.models.loading import load_actor_critic, load_tokenizer
from remix.models.policy import Policy
from remix.rollout.hf import HFEngine, SeededSampler
from remix.rollout.hf_cache import ROOM
from remix.rollout.sample import rollout_seed
from remix.types import Completion, Request, Rollout, Sampling
from tests.rollout.faults import interruption
from tests.tiny import make_tiny_model, tiny_recipe

CPU = torch.device("cpu")
EOS = 1
ROUND = 32
PROMPTS = [(3,), (4, 5, 6), (7, 8), (9, 10, 11, 12, 13), (4, 5, 6), (2, 3, 4, 5, 6, 7, 8)]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS, start=100)]


def policy_of(model: Path, temperature: float = 1.0) -> Policy:
    recipe = tiny_recipe(model, Path("unused"), {"rollout": {"temperature": temperature}})
    tokenizer = load_tokenizer(recipe.model)
    return Policy(load_actor_critic(recipe, tokenizer, CPU), tokenizer, device=CPU, temperature=temperature)


def engine_of(policy: Policy, *, eos: Sequence[int] | None = None, batch_size: int = 64) -> HFEngine:
    return HFEngine(
        policy.module.lm,
        eos_token_ids=policy.module.eos_token_ids if eos is None else eos,
        batch_size=batch_size,
        device=CPU,
        autocast=lambda: policy.module.autocast(CPU),
    )


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return policy_of(tiny_model)


def as_rollout(request: Request, completion: Completion) -> Rollout:
    return Rollout(
        prompt_ids=torch.tensor(request.prompt_ids),
        response_ids=completion.response_ids,
        sampler_logprobs=completion.sampler_logprobs,
        policy_version=0,
        finish_reason=completion.finish_reason,
        seed=request.seed,
        text="",
    )


def ids(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.response_ids.tolist() for completion in completions]


@torch.no_grad()
def next_logits(policy: Policy, prompt: Sequence[int]) -> Tensor:
    policy.module.eval()
    logits: Tensor = policy.module.lm(torch.tensor([list(prompt)])).logits[0, -1]
    return logits


# --- log-probs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(tiny_model: Path, temperature: float) -> None:
    policy = policy_of(tiny_model, temperature)
    completions = engine_of(policy).generate(REQUESTS, Sampling(12, temperature=temperature))
    rollouts = [as_rollout(*pair) for pair in zip(REQUESTS, completions, strict=True)]
    assert sum(len(r.response_ids) for r in rollouts) > 30
    for rollout, score in zip(rollouts, policy.score(rollouts, tokens_per_microbatch=40), strict=True):
        assert rollout.sampler_logprobs.dtype == torch.float32
        assert rollout.response_ids.dtype == torch.int64
        torch.testing.assert_close(rollout.sampler_logprobs, score.logprobs, atol=1e-5, rtol=1e-5)


def test_greedy_is_the_argmax_and_its_log_probs_are_those_of_the_plain_policy(policy: Policy) -> None:
    completions = engine_of(policy).generate(REQUESTS, Sampling(6, temperature=0.0))
    for request, completion in zip(REQUESTS, completions, strict=True):
        prefix = list(request.prompt_ids)
        for token, logprob in zip(completion.response_ids.tolist(), completion.sampler_logprobs, strict=True):
            logits = next_logits(policy, prefix)
            assert token == logits.argmax()
            torch.testing.assert_close(logprob, logits.log_softmax(-1)[token], atol=1e-5, rtol=0)
            prefix.append(token)


# --- what a draw depends on ---------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_own_seed_alone(policy: Policy) -> None:
    sampling = Sampling(10)
    together = ids(engine_of(policy).generate(REQUESTS, sampling))
    assert ids(engine_of(policy).generate(REQUESTS, sampling)) == together, "same seeds, same tokens"
    assert ids(engine_of(policy).generate(REQUESTS[::-1], sampling))[::-1] == together, "whatever the order"
    assert ids(engine_of(policy, batch_size=2).generate(REQUESTS, sampling)) == together, "whatever the neighbours"
    alone = [ids(engine_of(policy).generate([request], sampling))[0] for request in REQUESTS]
    assert alone == together
    torch.manual_seed(5)  # nor on torch's generator
    assert ids(engine_of(policy).generate(REQUESTS, sampling)) == together


def test_other_seeds_draw_other_tokens(policy: Policy) -> None:
    requests = [Request((4, 5, 6), seed) for seed in range(8)]
    drawn = ids(engine_of(policy).generate(requests, Sampling(10)))
    assert len({tuple(row) for row in drawn}) >= 7


def test_a_longer_limit_only_adds_tokens(policy: Policy) -> None:
    short, long = (ids(engine_of(policy).generate(REQUESTS, Sampling(limit))) for limit in (4, 9))
    assert [row[:4] for row in long] == short
    assert any(len(row) > 4 for row in long)


def test_rollout_seeds_name_one_rollout_each() -> None:
    names = list(itertools.product((0, 1), ("a", "b"), (-1, 3), (0, 1)))
    seeds = [rollout_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [rollout_seed(*name) for name in names]


def test_the_engine_leaves_the_module_as_it_was(policy: Policy) -> None:
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    for training in (True, False):
        policy.module.train(training)
        engine_of(policy).generate(REQUESTS, Sampling(2))
        assert policy.module.lm.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.module.state_dict().items())


def test_an_interruption_leaves_the_module_as_it_was(policy: Policy) -> None:
    many = [Request(PROMPTS[-1], seed) for seed in range(1000)]
    policy.module.train()
    with interruption(0.2), pytest.raises(Interrupted):
        engine_of(policy, eos=[], batch_size=8).generate(many, Sampling(max_tokens=100))
    assert policy.module.lm.training
    policy.module.eval()


def test_nothing_asked_nothing_drawn(policy: Policy) -> None:
    assert engine_of(policy).generate([], Sampling(4)) == []


# --- frequencies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_frequencies_are_the_softmax(policy: Policy, temperature: float) -> None:
    draws, prompt = 4000, (4, 5, 6)
    requests = [Request(prompt, rollout_seed(0, "x", 0, i)) for i in range(draws)]
    completions = engine_of(policy, batch_size=draws).generate(requests, Sampling(1, temperature=temperature))
    counts = np.bincount([c.response_ids.item() for c in completions], minlength=len(policy.tokenizer))
    expected = draws * (next_logits(policy, prompt) / temperature).softmax(-1).double().numpy()
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    statistic += (counts[~common].sum() - expected[~common].sum()) ** 2 / max(expected[~common].sum(), 5)
    freedom = common.sum()
    # Wilson and Hilferty's approximation of the 99.9 % point.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom >= 5
    assert statistic < bound


def test_a_second_token_is_drawn_by_a_second_number() -> None:
    """Over uniform logits token t of a response is a uniform number of its own: pairs fill the square evenly."""
    vocabulary, draws = 4, 4000
    sampler = SeededSampler(list(range(draws)), Sampling(2), CPU)
    flat = torch.zeros(draws, vocabulary)
    first, second = (sampler(torch.zeros(draws, 1), flat).argmax(-1) for _ in range(2))
    counts = torch.bincount(vocabulary * first + second, minlength=16).double()
    assert ((counts - draws / 16) ** 2 / (draws / 16)).sum() < 37.7, "chi-square, 15 degrees of freedom, 0.1 %"
    assert all(torch.equal(row, torch.full((draws,), -math.log(4))) for row in sampler.logprobs)


# --- top-k and the nucleus ----------------------------------------------------------------------------------------

# Probabilities .4, .3, .2, .1 of tokens 2, 0, 3, 1.
LADDER = torch.tensor([0.3, 0.1, 0.4, 0.2]).log()


def drawn_from(sampling: Sampling, draws: int = 3000) -> Tensor:
    sampler = SeededSampler(list(range(draws)), sampling, CPU)
    chosen = sampler(torch.zeros(draws, 1), LADDER.expand(draws, -1)).argmax(-1)
    scale = sampling.temperature
    full = (LADDER / scale).log_softmax(-1)
    torch.testing.assert_close(sampler.logprobs[0], full[chosen])  # of the policy, not of what was left of it
    return torch.bincount(chosen, minlength=4) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1), [0.3, 0.1, 0.4, 0.2]),
        # The smallest set that reaches .65 is {.4, .3}: 4/7 and 3/7.
        (Sampling(1, top_p=0.65), [3 / 7, 0, 4 / 7, 0]),
        (Sampling(1, top_p=0.75), [3 / 9, 0, 4 / 9, 2 / 9]),
        (Sampling(1, top_p=0.01), [0, 0, 1, 0]),
        (Sampling(1, top_k=3), [3 / 9, 0, 4 / 9, 2 / 9]),
        (Sampling(1, top_k=1), [0, 0, 1, 0]),
        (Sampling(1, top_k=9), [0.3, 0.1, 0.4, 0.2]),
        (Sampling(1, top_k=3, top_p=0.65), [3 / 7, 0, 4 / 7, 0]),
        # At temperature 1/2 the probabilities are squared: .16, .09, .04, .01 of .3; .16 / .3 = .53 reaches .5 alone.
        (Sampling(1, temperature=0.5, top_p=0.5), [0, 0, 1, 0]),
        (Sampling(1, temperature=0.5), [9 / 30, 1 / 30, 16 / 30, 4 / 30]),
    ],
)
def test_draws_stay_inside_and_keep_their_proportions(sampling: Sampling, expected: list[float]) -> None:
    found = drawn_from(sampling)
    assert [share > 0 for share in found.tolist()] == [share > 0 for share in expected]
    # Three standard deviations of a share over 3000 draws: 3 * sqrt(.25 / 3000) = .027
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=0.0275, rtol=0)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(2000, -1)
    sampler = SeededSampler(list(range(2000)), Sampling(1), CPU)
    sampler.uniforms_BR[0], sampler.uniforms_BR[1] = 0.0, 1 - 2.0**-53  # both ends of [0, 1)
    assert set(sampler(torch.zeros(2000, 1), logits).argmax(-1).tolist()) == {1, 3}


def test_a_large_vocabulary_loses_no_rare_token() -> None:
    """One token has all the mass but 1e-5, which 2^14 others share: near 1 float32 knows only 168 numbers of it."""
    draws, rare = 400, 1e-5
    logits = torch.full((2**14,), math.log(rare / (2**14 - 1)))
    logits[0] = math.log(1 - rare)
    sampler = SeededSampler([0] * draws, Sampling(1), CPU)
    shares = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    sampler.uniforms_BR = 1 - rare + rare * shares[:, None]
    chosen = sampler(torch.zeros(draws, 1), logits.expand(draws, -1)).argmax(-1)
    # Even steps through the rare ones, but for what float32 log-probs blur at the lower end.
    assert len(chosen.unique()) > 380


# --- the end of a response ----------------------------------------------------------------------------------------


def test_a_response_ends_with_its_end_token(policy: Policy) -> None:
    requests = [Request(PROMPTS[i % 6], i) for i in range(40)]
    hot = Sampling(12, temperature=3.0)
    free = engine_of(policy, eos=[]).generate(requests, hot)
    assert all(c.finish_reason == "length" and len(c.response_ids) == 12 for c in free)
    stops = {6, 11}
    stopped = engine_of(policy, eos=sorted(stops)).generate(requests, hot)
    for whole, cut in zip(ids(free), stopped, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stops]
        expected = whole[: ends[0] + 1] if ends else whole
        assert cut.response_ids.tolist() == expected
        assert len(cut.sampler_logprobs) == len(expected)
        assert cut.finish_reason == ("stop" if ends else "length")
    assert {c.finish_reason for c in stopped} == {"stop", "length"}
    assert len({len(c.response_ids) for c in stopped}) > 3


def test_an_end_at_the_limit_is_a_stop(policy: Policy) -> None:
    (first,) = ids(engine_of(policy, eos=[]).generate(REQUESTS[:1], Sampling(1)))
    (completion,) = engine_of(policy, eos=first).generate(REQUESTS[:1], Sampling(1))
    assert completion.response_ids.tolist() == first
    assert completion.finish_reason == "stop"


def test_ended_responses_leave_the_batch_and_the_others_are_as_before(policy: Policy) -> None:
    """Over several rounds and a cache that grows: the tokens of one call without any rounds, and the trainer's
    log-probs."""
    requests = [Request(PROMPTS[i % 6], i) for i in range(24)]
    hot, stops = Sampling(3 * ROUND + 5, temperature=3.0), [6]
    free = ids(engine_of(policy, eos=[]).generate(requests, hot))
    ends = [next((place + 1 for place, token in enumerate(row) if token in stops), hot.max_tokens) for row in free]
    assert min(ends) < ROUND < 2 * ROUND < max(ends)
    assert hot.max_tokens > ROOM
    stopped = engine_of(policy, eos=stops).generate(requests, hot)
    assert ids(stopped) == [row[:end] for row, end in zip(free, ends, strict=True)]
    hotter = Policy(policy.module, policy.tokenizer, device=CPU, temperature=3.0)
    rollouts = [as_rollout(*pair) for pair in zip(requests, stopped, strict=True)]
    for rollout, score in zip(rollouts, hotter.score(rollouts, tokens_per_microbatch=500), strict=True):
        torch.testing.assert_close(rollout.sampler_logprobs, score.logprobs, atol=1e-5, rtol=1e-5)


def test_a_prompt_that_begins_with_the_padding_token_is_not_a_shorter_one(policy: Policy) -> None:
    engine = engine_of(policy)
    requests = [Request((5, 6, 7), 1), Request((engine.pad_id, 5, 6, 7), 2), Request((5, 6, 7), 3)]
    together = engine.generate(requests, Sampling(8))
    for request, completion in zip(requests, together, strict=True):
        (alone,) = engine.generate([request], Sampling(8))
        assert completion.response_ids.tolist() == alone.response_ids.tolist()
        torch.testing.assert_close(completion.sampler_logprobs, alone.sampler_logprobs, atol=1e-5, rtol=1e-5)


def test_completions_are_compact(policy: Policy) -> None:
    for completion in engine_of(policy).generate(REQUESTS, Sampling(12)):
        assert completion.response_ids.untyped_storage().nbytes() == 8 * len(completion.response_ids)
        assert completion.sampler_logprobs.untyped_storage().nbytes() == 4 * len(completion.response_ids)


def test_the_models_own_sampling_settings_are_not_applied(tmp_path: Path, policy: Policy) -> None:
    model = make_tiny_model(tmp_path)
    own: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "top_p": 0.1,
        "repetition_penalty": 5.0,
        "max_new_tokens": 2,
        "min_new_tokens": 2,
        "suppress_tokens": list(range(4, 12)),
        "eos_token_id": [EOS, 9],
        "pad_token_id": 0,
    }
    (model / "generation_config.json").write_text(json.dumps(own))
    other = policy_of(model)
    assert set(other.module.eos_token_ids) == {EOS, 9}, "of them only its ends of a response count"
    for sampling in (Sampling(8), Sampling(8, temperature=0.0)):
        plain = engine_of(policy, eos=[EOS, 9]).generate(REQUESTS, sampling)
        found = engine_of(other).generate(REQUESTS, sampling)
        assert ids(found) == ids(plain)
        for one, two in zip(found, plain, strict=True):
            torch.testing.assert_close(one.sampler_logprobs, two.sampler_logprobs, atol=1e-5, rtol=0)


def test_in_bfloat16_it_is_still_the_trainers_policy(tiny_model: Path) -> None:
    recipe = tiny_recipe(tiny_model, Path("unused"), {"model": {"path": str(tiny_model), "dtype": "bfloat16"}})
    tokenizer = load_tokenizer(recipe.model)
    policy = Policy(load_actor_critic(recipe, tokenizer, CPU), tokenizer, device=CPU, temperature=1.0)
    completions = engine_of(policy).generate(REQUESTS, Sampling(8))
    rollouts = [as_rollout(*pair) for pair in zip(REQUESTS, completions, strict=True)]
    scores = policy.score(rollouts, tokens_per_microbatch=1000)
    difference = torch.cat([s.logprobs - r.sampler_logprobs for s, r in zip(scores, rollouts, strict=True)])
    assert difference.abs().mean() < 0.05
    # Without autocast the same weights are another policy, if a near one.
    exact = HFEngine(policy.module.lm, eos_token_ids=[EOS], batch_size=8, device=CPU, autocast=nullcontext)
    float32 = exact.generate(REQUESTS, Sampling(1))
    assert any(
        abs(a.sampler_logprobs[0] - b.sampler_logprobs[0]) > 1e-4 for a, b in zip(completions, float32, strict=True)
    )
