"""Model FLOPs utilisation, tokens a second and peak memory of the update, on random weights of a model's size.

    python scripts/bench_gpu.py [--size 1.5b] [--responses 2048 8192] [--prompt 512] [--group 8] [--prompts 4]
                                [--tokens 16384] [--compile] [--peak-tflops X]

The trainer's own updates, full weights and LoRA: packed groups, gradient checkpointing where activations would not fit,
AdamW. Prints a markdown table with the hardware's name. `--size tiny` tries it on any machine; its numbers say nothing.

MFU = operations of an update / (seconds x peak operations a second). Operations are the model's own, however they are
computed: 2 a multiplied and added pair, forward; what is computed again (checkpointing, logits) is not counted twice.

    forward   L·2B + N·2VH + 4a·blocks·pairs      L places of the rows, N trained tokens, B parameters in the blocks'
                                                  matrices, [V, H] the head, a the attention's width, pairs of places
                                                  of which one sees the other
    backward  twice that; under frozen weights (LoRA) once for B and the head, twice for attention and the LoRA
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from remix.models.policy import Policy
    from remix.types import Rollout, Sample

SIZES: dict[str, dict[str, Any]] = {
    "1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 131072,
             "tie_word_embeddings": True, "rope_theta": 1e6},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131072,
             "tie_word_embeddings": True},
}  # fmt: skip
"""Of Qwen2 models; the first is Qwen2.5-1.5B's."""
PEAK_TFLOPS = (("H200", 989.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("A100", 312.0),
               ("B200", 2250.0), ("L40S", 362.0), ("L4", 121.0), ("RTX 4090", 165.0))  # fmt: skip
"""Dense bfloat16 by what a device's name holds, as the makers' data sheets say; the first that fits."""
LORA = {"type": "lora", "rank": 16, "alpha": 32.0}


@dataclass(frozen=True)
class Work:
    """Of one update."""

    places: int
    """L of all rows, were each group one row."""
    trained: int
    """N."""
    pairs: int


def work(groups: int, prompt: int, responses: int, length: int) -> Work:
    """Of a response the last token is left out: nothing is predicted from it."""
    rest = length - 1
    pairs = prompt * (prompt + 1) // 2 + responses * (rest * prompt + rest * (rest + 1) // 2)
    return Work(groups * (prompt + responses * rest), groups * responses * length, groups * pairs)


def operations(done: Work, size: dict[str, Any], adapter: int) -> float:
    """As above. `adapter`: parameters of the LoRA; 0 = all weights are trained."""
    hidden, mlp, blocks = size["hidden_size"], size["intermediate_size"], size["num_hidden_layers"]
    kv = hidden // size["num_attention_heads"] * size["num_key_value_heads"]
    matrices = blocks * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp)
    linear = 2.0 * (done.places * matrices + done.trained * hidden * size["vocab_size"])
    attention = 4.0 * hidden * blocks * done.pairs
    of_adapter = 2.0 * done.places * adapter
    return linear * (2 if adapter else 3) + 3 * (attention + of_adapter)


def peak_tflops(device_name: str | None, given: float | None) -> float | None:
    """None without a GPU and a word. Raises ValueError for a GPU that is not in the table."""
    if given is not None or device_name is None:
        return given
    for name, peak in PEAK_TFLOPS:
        if name in device_name:
            return peak
    raise ValueError(f"{device_name} is not in the table of this script: give its dense bfloat16 peak by --peak-tflops")


def rollouts_of(options: argparse.Namespace, length: int, vocabulary: int) -> list[Rollout]:
    import torch

    from remix.types import Rollout

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (options.prompts, options.prompt), generator=generator)
    return [
        Rollout(
            prompt_ids=prompt,
            response_ids=torch.randint(vocabulary, (length,), generator=generator),
            sampler_logprobs=torch.zeros(length),
            policy_version=0,
            finish_reason="length",
            seed=seed,
            text="",
        )
        for prompt in prompts
        for seed in range(options.group)
    ]


def samples_of(policy: Policy, rollouts: Sequence[Rollout], budget: int) -> list[Sample]:
    """Fresh ones, half of them better than the other half."""
    from dataclasses import replace

    import torch

    from remix.types import Sample

    scores = policy.score(rollouts, tokens_per_microbatch=budget)
    return [
        Sample(
            replace(rollout, behaviour_logprobs=score.logprobs, sampler_logprobs=score.logprobs),
            policy_lag=0,
            advantages=torch.full(score.logprobs.shape, 1.0 if index % 2 else -1.0),
            proximal_logprobs=score.logprobs,
        )
        for index, (rollout, score) in enumerate(zip(rollouts, scores, strict=True))
    ]


def plain_recipe(
    options: argparse.Namespace, folder: Path, length: int, adapter: dict[str, Any], *, on_gpu: bool
) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "steps": 100,
        "model": {"path": str(folder / "model"), "dtype": "bfloat16" if on_gpu else "float32",
                  "compile": options.compile, "gradient_checkpointing": "auto"},
        "kl": {"weight": 0.0},
        "adapter": adapter,
        "tasks": [{"type": "arithmetic"}],
        "prompt": {"max_tokens": options.prompt},
        "rewards": [{"type": "length", "free_tokens": 1, "max_tokens": length}],
        "rollout": {"group_size": options.group, "max_tokens": length},
        "batch": {"prompts": options.prompts, "tokens_per_microbatch": max(options.tokens, options.prompt + length)},
    }  # fmt: skip


def measure(options: argparse.Namespace, folder: Path, length: int, adapter: dict[str, Any]) -> list[str]:
    """A row of the table."""
    import torch

    from remix.config import parse_recipe
    from remix.models.loading import load_actor_critic, load_tokenizer
    from remix.models.policy import Policy
    from remix.training.activations import choose_checkpointing, device_memory
    from remix.training.distributed import Cluster
    from remix.training.memory import estimate_memory
    from remix.training.objective import Objective
    from remix.training.packable import start_packing
    from remix.training.update import Updater
    from remix.types import Prompt

    on_gpu, size = torch.cuda.is_available(), SIZES[options.size]
    plain = plain_recipe(options, folder, length, adapter, on_gpu=on_gpu)
    budget = plain["batch"]["tokens_per_microbatch"]
    recipe = parse_recipe(plain)
    with Cluster() as cluster:
        memory = estimate_memory(recipe)
        chosen = choose_checkpointing(recipe, memory, device_memory(cluster.device))
        decided = parse_recipe(plain | {"model": plain["model"] | {"gradient_checkpointing": chosen.on}})
        tokenizer = load_tokenizer(decided.model)
        module = load_actor_critic(decided, tokenizer, cluster.device)
        policy = Policy(module, tokenizer, device=cluster.device, temperature=1.0)
        rollouts = rollouts_of(options, length, size["vocab_size"])
        tried = [Prompt("0", "", "", "bench", tuple(rollouts[0].prompt_ids.tolist()))]
        refused = start_packing(
            policy, tried, tokens_per_microbatch=budget, longest=options.prompt + length, message=print
        )
        if refused is not None:
            raise ValueError(f"sequences are not packed: {refused}")
        updater = Updater(decided, policy, Objective(decided), cluster)
        samples = samples_of(policy, rollouts, budget)
        seconds = timed(lambda step: updater.run(samples, step=step, passes=1, kl_lambda=0.0)[0], options.updates)
        cluster.forget()
    done = work(options.prompts, options.prompt, options.group, length)
    found = operations(done, size, (memory.trained or 0) if adapter["type"] == "lora" else 0)
    peak = peak_tflops(torch.cuda.get_device_name() if on_gpu else None, options.peak_tflops)
    used = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        "all weights" if adapter["type"] == "none" else f"LoRA, rank {adapter['rank']}",
        f"{length:,}",
        f"{seconds:.3f}",
        f"{done.trained / seconds:,.0f}",
        "unknown" if peak is None else f"{found / seconds / (peak * 1e12):.1%}",
        f"{used / 2**30:.2f}",
        "on" if chosen.on else "off",
        "FlexAttention" if policy.flex else "SDPA",
    ]


def timed(update: Any, count: int) -> float:
    """Median seconds of one, after one to warm up."""
    from statistics import median

    import torch

    seconds = []
    for step in range(count + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        metrics = update(step)
        if metrics["updates"] != 1:
            raise RuntimeError("the update was skipped: its loss or gradient is not finite")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def build_model(folder: Path, size: dict[str, Any]) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "embedded" / "base")
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(**size, **ids)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="1.5b")
    parser.add_argument("--responses", type=int, nargs="+", default=[2048, 8192], metavar="TOKENS")
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--group", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--prompts", type=int, default=4, help="of an update")
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch (batch.tokens_per_microbatch)")
    parser.add_argument("--updates", type=int, default=3, help="timed, after one to warm up")
    parser.add_argument("--compile", action="store_true", help="model.compile")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, where the table lacks it")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch

    from remix.models.loading import quiet

    quiet()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        peak_tflops(name, options.peak_tflops)
    except ValueError as error:
        parser.error(str(error))
    if name is None and options.size != "tiny":
        parser.error("no GPU is here: `--size tiny` tries the script without one")
    heads = ("trained", "response tokens", "s an update", "trained tokens/s", "MFU", "peak GiB", "checkpointing",
             "attention")  # fmt: skip
    print(f"Qwen2 of size {options.size}, {options.prompts} x {options.group} responses, prompts of {options.prompt}; "
          f"{name or 'CPU, to try the script: no measurement of a GPU'}; torch {torch.__version__}"
          f"{', compiled blocks' * options.compile}\n")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    with tempfile.TemporaryDirectory(prefix="remix-bench-") as folder:
        build_model(Path(folder) / "model", SIZES[options.size])
        for length in options.responses:
            for adapter in ({"type": "none"}, LORA):
                gc.collect()  # or what is left of the row above would count in this one
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                print(f"| {' | '.join(measure(options, Path(folder), length, adapter))} |", flush=True)


if __name__ == "__main__":
    main()
