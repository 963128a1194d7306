"""Memory and seconds of log-probs and entropy, forward and backward, without all the logits and with them.

    python scripts/bench_logprobs.py [--tokens 4096] [--vocabulary 151936] [--hidden 1024] [--frozen] [--bfloat16]

The plain form is what autograd makes of `log_softmax` over all logits, and the entropy without gradient. Each form is a
process of its own; its seconds are of the processor, its memory is what it takes beyond states, weight and the gradient
of both, which either form has to have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import json, resource, sys, time
import torch
from remix.algorithms import Head, LogitRule, entropy, token_statistics
form, tokens, vocabulary, hidden, frozen, half, chunk = json.loads(sys.argv[1])
torch.manual_seed(0)
states = torch.randn(tokens, hidden).requires_grad_()
weight = (torch.randn(vocabulary, hidden) * 0.02).requires_grad_(not frozen)
labels, weights = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
trained = [states] if frozen else [states, weight]
held = [torch.zeros_like(tensor) for tensor in trained]
for tensor in held:
    tensor.fill_(1.0)  # so that the memory is there
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak()
del held
began = time.process_time()
with torch.autocast("cpu", torch.bfloat16, enabled=half):
    if form == "plain":
        logits = torch.nn.functional.linear(states, weight).float()
        logprobs = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        spread = entropy(logits.detach())
    else:
        logprobs, spread, _ = token_statistics(states, Head(weight), labels, LogitRule(chunk=chunk))
grads = torch.autograd.grad((logprobs * weights).sum(), trained)
print(json.dumps({"seconds": time.process_time() - began, "gib": peak() - before,
                  "sums": [logprobs.sum().item(), spread.sum().item(), *(g.abs().sum().item() for g in grads)]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--chunk", type=int, help="tokens; by default those of 2^25 logits")
    parser.add_argument("--frozen", action="store_true", help="the head is not trained, as under a LoRA")
    parser.add_argument("--bfloat16", action="store_true", help="logits in bfloat16")
    options = parser.parse_args()
    chunk = options.chunk or 2**25 // options.vocabulary
    sizes = [options.tokens, options.vocabulary, options.hidden, options.frozen, options.bfloat16, chunk]
    plain, ours = (measure([form, *sizes]) for form in ("plain", "chunked"))
    for one, other in zip(plain["sums"], ours["sums"], strict=True):
        assert abs(one - other) <= (2e-2 if options.bfloat16 else 1e-4) * abs(one), (plain["sums"], ours["sums"])
    print(
        f"{options.tokens} tokens, vocabulary {options.vocabulary}, hidden {options.hidden}, "
        f"{'bfloat16' if options.bfloat16 else 'float32'}, head {'frozen' if options.frozen else 'trained'}: "
        f"{plain['gib']:.2f} GiB and {plain['seconds']:.1f} s plain, {ours['gib']:.2f} GiB and {ours['seconds']:.1f} s "
        f"in chunks of {chunk}: {plain['gib'] / ours['gib']:.1f} times less memory, "
        f"{ours['seconds'] / plain['seconds']:.2f} of the time"
    )


def measure(setup: list[object]) -> dict[str, list[float] | float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, json.dumps(setup)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main()
