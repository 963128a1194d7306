"""Seconds of an update's forward and backward with each prompt once, against padded sequences of prompt and response.

    python scripts/bench_packing.py [--prompt 512] [--response 64] [--group 8]

On a random Qwen2 of 6 layers and 256 dimensions, one group; seconds of the processor, median of three.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from remix.models.actor_critic import ActorCritic
    from remix.models.packing import allow_packing, pack
    from remix.models.policy import token_tensors
    from remix.types import Rollout

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.prompt + options.response,
    )
    module = ActorCritic(Qwen2ForCausalLM(config))
    allow_packing(module.backbones[0])
    prompt = torch.randint(1000, (options.prompt,))
    rollouts = [
        Rollout(prompt, torch.randint(1000, (options.response,)), torch.zeros(options.response), 0, "length", seed, "")
        for seed in range(options.group)
    ]
    ids, mask = token_tensors(rollouts)
    packed = pack(rollouts)

    def seconds(call: Callable[[], torch.Tensor]) -> float:
        module.zero_grad()
        began = time.process_time()
        call().sum().backward()
        return time.process_time() - began

    forms = [lambda: module(ids, mask, 1.0).logprobs, lambda: module(ids, mask, 1.0, packed=packed).logprobs]
    padded, once = (median(seconds(form) for _ in range(3)) for form in forms)
    print(
        f"{options.group} responses of {options.response} tokens to a prompt of {options.prompt}: {ids.numel()} tokens "
        f"in {padded:.2f} s padded, {packed.input_ids.numel()} in {once:.2f} s with the prompt once: "
        f"{ids.numel() / packed.input_ids.numel():.2f} times fewer tokens, {padded / once:.2f} times faster"
    )


if __name__ == "__main__":
    main()
