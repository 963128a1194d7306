"""Compiled blocks against plain ones: the same numbers and gradients, and rows of any length by the same graphs."""

from pathlib import Path

import torch
from torch._dynamo.utils import counters

from remix.models.packing import allow_packing
from remix.types import Request, Sampling
from tests.models.test_packing import LONG, ROLLOUTS, policy_of, run


def test_numbers_gradients_and_how_often_it_is_compiled(tiny_untied_model: Path, tmp_path: Path) -> None:
    torch.compiler.reset()
    counters.clear()
    plain, compiled = (
        policy_of(tiny_untied_model, tmp_path, model={"path": str(tiny_untied_model), "compile": on})
        for on in (False, True)
    )
    for policy in (plain, compiled):
        assert allow_packing(policy.module.backbones[0])
    assert plain.module.state_dict().keys() == compiled.module.state_dict().keys()
    graphs = set[int]()
    for chosen in (ROLLOUTS, ROLLOUTS[:3], ROLLOUTS[1:6]):
        (one, gradients), (other, others) = (run(policy, chosen, packs=True) for policy in (plain, compiled))
        torch.testing.assert_close(other.logprobs, one.logprobs, atol=2e-5, rtol=1e-5)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            largest = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(others[name], gradient, atol=2e-5 * largest, rtol=1e-4)
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1
    assert graphs.pop() > 0
    torch.compiler.reset()


def test_sampling_is_not_compiled(tiny_untied_model: Path, tmp_path: Path) -> None:
    from remix.rollout.hf import HFEngine

    torch.compiler.reset()
    counters.clear()
    completions = []
    for on in (False, True):
        policy = policy_of(tiny_untied_model, tmp_path, model={"path": str(tiny_untied_model), "compile": on})
        engine = HFEngine(
            policy.sampled_lm,
            eos_token_ids=policy.module.eos_token_ids,
            batch_size=2,
            device=policy.device,
            autocast=lambda of=policy: of.module.autocast(of.device),
            never=policy.module.never,
        )
        completions += engine.generate([Request(tuple(LONG), seed=3)], Sampling(max_tokens=4))
    assert torch.equal(completions[0].response_ids, completions[1].response_ids)
    assert not counters["stats"]["unique_graphs"]
