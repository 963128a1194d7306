"""Seconds of a GRPO step, tokens per second and peak memory, against TRL's GRPOTrainer on the same work.

    python scripts/bench_vs_trl.py --trl PYTHON [--steps 6] [--rounds 2]

PYTHON is an interpreter of an environment with `trl`. Both train the embedded model on-policy with the same prompts,
batch (8 prompts x 8 responses), lengths and learning rate, no KL, one pass, one thread, by transformers' sampling; the
model's end token is one that it hardly ever writes, so that responses have nearly full length, and speed is counted in
tokens. Each run is a process of its own; seconds are of the processor, rounds alternate, and the medians over all steps
but each first are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "recipes" / "embedded" / "base"
PROMPTS, GROUP, LR = 8, 8, 1e-5
CASES = {"short prompt": (12, 64), "long response": (12, 256), "shared prompt of 512": (512, 64)}
"""Tokens of prompt and response."""

HARDLY_WRITTEN = "~"

PREPARE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
base, folder, end = sys.argv[1:]
lm, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
tokenizer.eos_token = end
lm.generation_config.eos_token_id = lm.config.eos_token_id = tokenizer.eos_token_id
lm.config.max_position_embeddings = 1024
lm.save_pretrained(folder)
tokenizer.save_pretrained(folder)
"""

BY_REMIX = """
import json, resource, sys, time
from pathlib import Path
from remix.config import load_recipe
from remix.tracking.progress import Progress
from remix.tracking.run_log import read_metrics
from remix.training.build import open_trainer
from remix.training.distributed import Cluster
recipe = load_recipe(sys.argv[1])
progress = Progress("bench", recipe.run_dir, recipe.last_step, enabled=False)
seconds = []
with Cluster() as cluster, open_trainer(recipe, cluster, progress, resume=False) as trainer:
    step_of = trainer._step
    def timed(step):
        began = time.process_time()
        metrics = step_of(step)
        seconds.append(time.process_time() - began)
        return metrics
    trainer._step = timed
    trainer.fit()
lines = read_metrics(Path(recipe.run_dir))
print(json.dumps({
    "seconds": seconds,
    "tokens": [line["tokens/sampled"] for line in lines],
    "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""

BY_TRL = """
import json, resource, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
setup = json.loads(sys.argv[1])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(setup["model"])
model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype="float32")
seconds, tokens = [], []

def reward(completion_ids, **_):
    tokens.append(sum(map(len, completion_ids)))
    return [float(ids[0] % 7) for ids in completion_ids]

class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.began = time.process_time()
    def on_step_end(self, *_, **__):
        seconds.append(time.process_time() - self.began)

options = GRPOConfig(
    output_dir=setup["out"], use_cpu=True, bf16=False, max_steps=setup["steps"], report_to=[], save_strategy="no",
    logging_steps=1, disable_tqdm=True, learning_rate=setup["lr"], lr_scheduler_type="constant", beta=0.0,
    per_device_train_batch_size=setup["prompts"] * setup["group"], gradient_accumulation_steps=1,
    num_generations=setup["group"], max_completion_length=setup["response"], num_iterations=1, temperature=1.0,
    generation_kwargs={"top_k": 0}, gradient_checkpointing=False, seed=0,
)
trainer = GRPOTrainer(model=model, args=options, train_dataset=Dataset.from_list(setup["rows"]),
                      reward_funcs=reward, processing_class=tokenizer, callbacks=[Clock()])
trainer.train()
print(json.dumps({"seconds": seconds, "tokens": tokens,
                  "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", required=True, metavar="PYTHON")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, PREPARE, str(BASE), str(folder / "model"), HARDLY_WRITTEN)
        print("| case | prompt + response | ReMix s/step | TRL s/step | speed | ReMix tokens/s | peak memory GiB |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for case, (prompt, response) in CASES.items():
            rows = problems(prompt)
            (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            ours, theirs = [], []
            for number in range(options.rounds):
                out = folder / f"{case}-{number}".replace(" ", "-")
                ours.append(by_remix(folder, out, response, options.steps))
                theirs.append(by_trl(options.trl, folder, rows, out, response, options.steps))
            print(line(case, f"{prompt} + {response}", ours, theirs), flush=True)


def problems(length: int) -> list[dict[str, str]]:
    """As many as are in a batch, of `length` characters, which are tokens."""
    return [
        {"problem": ("+".join(str((i * 7 + j) % 90 + 10) for j in range(length))[: length - 1]) + "=", "answer": "1"}
        for i in range(PROMPTS)
    ]


def by_remix(folder: Path, out: Path, response: int, steps: int) -> dict[str, object]:
    file = str(folder / "problems.jsonl")
    recipe = {
        "run_dir": str(out / "remix"),
        "steps": steps,
        "model": {"path": str(folder / "model")},
        "tasks": [{"type": "jsonl", "path": file, "eval_path": file, "id": None}],
        "prompt": {"max_tokens": 512},
        "rewards": [{"type": "exact_match"}],
        "rollout": {
            "engine": {"type": "hf"},
            "group_size": GROUP,
            "max_tokens": response,
            "drop_uniform_groups": False,
        },
        "batch": {"prompts": PROMPTS},
        "objective": {"entropy_weight": 0.0},
        "kl": {"weight": 0.0},
        "optimizer": {"lr": LR},
        "eval": {"every": 0, "before": False, "prompts": 1},
        "checkpoint": {"every": 0},
        "log": {"trackers": [], "completions_every": 0},
    }
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return run(sys.executable, BY_REMIX, str(out / "recipe.yaml"))


def by_trl(
    python: str, folder: Path, rows: list[dict[str, str]], out: Path, response: int, steps: int
) -> dict[str, object]:
    setup = {
        "model": str(folder / "model"),
        "out": str(out / "trl"),
        "rows": [{"prompt": row["problem"]} for row in rows],
        "steps": steps,
        "lr": LR,
        "prompts": PROMPTS,
        "group": GROUP,
        "response": response,
    }
    return run(python, BY_TRL, json.dumps(setup))


def run(python: str, program: str, *arguments: str) -> dict[str, object]:
    """What a program prints last, as JSON; {} if nothing."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run([python, "-c", program, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-3000:]}")
    last = done.stdout.strip().splitlines()[-1:] or ["{}"]
    return dict(json.loads(last[0])) if last[0].startswith("{") else {}


def line(case: str, tokens: str, ours: list[dict], theirs: list[dict]) -> str:
    def middle(runs: list[dict], key: str) -> float:
        return median(value for found in runs for value in found[key][1:])

    lengths = {count for found in (*ours, *theirs) for count in found["tokens"]}
    assert max(lengths) < 1.2 * min(lengths), f"responses of different lengths: {sorted(lengths)}"
    mine, other = middle(ours, "seconds"), middle(theirs, "seconds")
    rate, their_rate = middle(ours, "tokens") / mine, middle(theirs, "tokens") / other
    memory = [max(found["gib"] for found in runs) for runs in (ours, theirs)]
    speed = f"{rate / their_rate:.1f}x | {rate:,.0f}"
    return (
        f"| {case} | {tokens} | {mine:.2f} | {other:.2f} | {speed} | "
        f"{memory[0]:.2f} against {memory[1]:.2f} ({memory[0] / memory[1]:.0%}) |"
    )


if __name__ == "__main__":
    main()
