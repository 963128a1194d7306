"""Peak memory and seconds of a merge, against the model's size, mergekit and PEFT.

    python scripts/bench_merge.py [--gb 1.5] [--shards 10] [--mergekit PYTHON]

Builds a random model, two fine-tuned copies and two LoRAs of it in a temporary folder, then does the same work with
each tool, every one in a process of its own: whole models by task arithmetic and by TIES (against mergekit, where
`--mergekit` names the Python that has it), and adapters written into the weights (against PEFT: `add_weighted_adapter`
of type `cat`, which is exact, then `merge_and_unload`). Results are compared number by number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Nothing heavy up here: a child's peak memory begins at that of its parent.

BUILD = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
folder, gb, shards = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
hidden, vocabulary = 1024, 32768
layer = 4 * hidden**2 + 3 * hidden * 4096
layers = max(1, round((gb * 1e9 / 2 - vocabulary * hidden) / layer))
config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4096, num_hidden_layers=layers,
                     num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True, dtype="bfloat16")
with torch.device("meta"):
    lm = Qwen2ForCausalLM(config)
lm.to_empty(device="cpu").to(torch.bfloat16)
lm.tie_weights()
size = sum(parameter.nbytes for parameter in lm.parameters())
generator = torch.Generator().manual_seed(0)
for index, name in enumerate(("base", "one", "two")):
    for parameter in lm.parameters():
        change = torch.empty(parameter.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=generator)
        parameter.data = change if name == "base" else base[id(parameter)] + change * 0.1
    if name == "base":
        base = {id(parameter): parameter.data for parameter in lm.parameters()}
    lm.save_pretrained(folder / name, max_shard_size=size // shards)
for parameter in lm.parameters():
    parameter.data = base[id(parameter)]
for name in ("lora_one", "lora_two"):
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(lm, lora)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / name)
    lm = adapted.unload()
print(size)
"""

IMPORTS = "import torch, transformers, peft, remix.merging.run"

BY_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder, shard, out = sys.argv[1:]
lm = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype="auto")
lm = PeftModel.from_pretrained(lm, f"{folder}/lora_one", adapter_name="one_lora")
lm.load_adapter(f"{folder}/lora_two", "two_lora")
lm.add_weighted_adapter(["one_lora", "two_lora"], [0.7, 0.3], "both_loras", "cat")
lm.set_adapter("both_loras")
lm.merge_and_unload(adapter_names=["both_loras"]).save_pretrained(out, max_shard_size=int(shard))
"""

COMPARE = """
import sys
from pathlib import Path
from remix.models.shards import checkpoint
one, two = (checkpoint(Path(path)) for path in sys.argv[1:])
assert one.specs.keys() == two.specs.keys()
print(max((one.tensor(name).float() - two.tensor(name).float()).abs().max().item() for name in one.specs))
"""

MERGEKIT = """
base_model: {folder}/base
models:
  - {{model: {folder}/one, parameters: {{weight: 0.7}}}}
  - {{model: {folder}/two, parameters: {{weight: 0.3}}}}
merge_method: {method}
parameters: {{normalize: false, density: 0.5, int8_mask: false}}
dtype: bfloat16
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and seconds of a merge.")
    parser.add_argument("--gb", type=float, default=1.5, help="size of the model, bfloat16 (default 1.5)")
    parser.add_argument("--shards", type=int, default=10, help="files that it is in (default 10)")
    parser.add_argument("--mergekit", metavar="PYTHON", help="a Python that has mergekit")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=".") as name:  # on the disk that models are on
        folder = Path(name).resolve()
        built = _run("build", [sys.executable, "-c", BUILD, str(folder), str(options.gb), str(options.shards)])
        size = int(built.output.strip().splitlines()[-1])
        shard = size // options.shards
        print(f"a model of {size / 1e6:,.0f} MB in {options.shards} files of {shard / 1e6:,.0f} MB, two parents")
        base = _run("imports", [sys.executable, "-c", IMPORTS]).peak
        print(f"this project's libraries alone: {base / 1e6:,.0f} MB\n")
        print(f"{'':32}{'peak MB':>9}{'above':>8}{'/ model':>9}{'/ shard':>9}{'seconds':>9}")
        for method, own in (("task_arithmetic", []), ("ties", ["--density", "0.5", "--param", "elect_weighted=true",
                                                               "--param", "mean=sum"])):  # fmt: skip
            ours = _ours(folder, shard, method, "--models", ["one", "two"], own)
            _row(f"{method}, remix", ours, base, size, shard)
            if options.mergekit:
                theirs = _mergekit(options.mergekit, folder, shard, method)
                _row(f"{method}, mergekit", theirs, base, size, shard)
                _compared(ours, theirs, folder, f"{method}_mergekit", f"{method}_remix")
        ours = _ours(folder, shard, "task_arithmetic", "--adapters", ["lora_one", "lora_two"], [])
        _row("two adapters, remix", ours, base, size, shard)
        peft = [sys.executable, "-c", BY_PEFT, str(folder), str(shard), str(folder / "peft")]
        theirs = _run("PEFT", peft)
        _row("two adapters, PEFT", theirs, base, size, shard)
        _compared(ours, theirs, folder, "peft", "task_arithmetic_remix")


class _Done:
    """What a process took."""

    def __init__(self, output: str, peak: int, seconds: float) -> None:
        self.output, self.peak, self.seconds = output, peak, seconds


def _run(what: str, command: Sequence[str], environment: dict[str, str] | None = None) -> _Done:
    root = Path(__file__).resolve().parent.parent
    environment = environment or {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{what} failed:\n{errors.read()[-3000:]}")
        return _Done(output.read(), usage.ru_maxrss * 1024, seconds)


def _ours(folder: Path, shard: int, method: str, kind: str, parents: Sequence[str], options: Sequence[str]) -> _Done:
    out = folder / f"{method}_remix"
    shutil.rmtree(out, ignore_errors=True)
    words = [
        "merge",
        "--base",
        str(folder / "base"),
        kind,
        *(str(folder / name) for name in parents),
        "--method",
        method,
    ]
    words += ["--weights", "0.7", "0.3", "--shard-size", str(shard / 1e9), "--out", str(out), *options]
    return _run("remix merge", [sys.executable, "-m", "remix.cli", *words])


def _mergekit(python: str, folder: Path, shard: int, method: str) -> _Done:
    config = folder / f"{method}.yaml"
    config.write_text(MERGEKIT.format(folder=folder, method=method))
    command = [str(Path(python).parent / "mergekit-yaml"), str(config), str(folder / f"{method}_mergekit")]
    # Its shards are counted in parameters, of two bytes here.
    command += ["--out-shard-size", str(shard // 2), "--no-copy-tokenizer", "--quiet"]
    return _run("mergekit", command, {**os.environ, "HF_HUB_OFFLINE": "1"})


def _row(name: str, done: _Done, base: int, size: int, shard: int) -> None:
    above = done.peak - base
    numbers = f"{done.peak / 1e6:9,.0f}{above / 1e6:8,.0f}{above / size:9.2f}{above / shard:9.1f}{done.seconds:9.1f}"
    print(f"{name:32}{numbers}", flush=True)


def _compared(ours: _Done, theirs: _Done, folder: Path, their_out: str, our_out: str) -> None:
    done = _run("comparison", [sys.executable, "-c", COMPARE, str(folder / our_out), str(folder / their_out)])
    print(
        f"{'':4}theirs / ours: memory {theirs.peak / ours.peak:.2f}, seconds {theirs.seconds / ours.seconds:.2f}; "
        f"largest difference {float(done.output):.2g}\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
