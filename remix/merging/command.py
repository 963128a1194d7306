"""The options of `remix merge`. Nothing heavy up here: `remix --help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from remix.terminal import showable

USAGE = (
    "remix merge --base B (--adapters A1 A2 ... | --models M1 M2 ...) --method M [--weights w1 w2 ...] --out DIR\n"
    "                   [--density d] [--param key=value] [--lora-form factors|delta] [--rank r] [--as model|adapter]\n"
    "                   [--seed s] [--dtype float32|bfloat16] [--rollouts RUN1 RUN2 ...] [--evaluate SUITE] [options]\n"
    "       remix merge --recipe merge.yaml [options]\n"
    "       remix merge --list"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option but three is a key of the recipe under its own name, and overrides it."""
    add = parser.add_argument
    add("--list", action="store_true", help="the methods, with their papers and parameters")
    add("--recipe", metavar="FILE", help="all of this as YAML, and weights and parameters by tensor (overrides)")
    add("--base", metavar="B", help="hub id or directory of the model that the parents were trained from")
    add("--adapters", nargs="+", metavar="A", help="PEFT adapters for it, hub ids or directories")
    add("--models", nargs="+", metavar="M", help="or whole models that were fine-tuned from it")
    add("--method", metavar="M", help="see --list")
    add("--weights", nargs="+", type=float, metavar="w", help="one to each parent (default: 1)")
    add("--density", type=float, metavar="d", help="share of entries that methods which thin out keep")
    add("--param", action="append", metavar="key=value", help="another parameter of the method; repeatable")
    add("--lora-form", choices=("delta", "factors"), help="merge the products B·A (default), or A and B each by itself")
    add("--as", dest="save_as", choices=("model", "adapter"), help="what is written (default: model)")
    add("--rank", type=int, metavar="r", help="of an adapter from products (default: the parents' largest)")
    add("--seed", type=int, metavar="s", help="of methods that draw (default 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="of what is written (default: the base's)")
    add("--shard-size", type=float, metavar="GB", help="of a file of the output, and of memory for it (default 2)")
    add("--rollouts", nargs="+", metavar="RUN", help="for fisher and regmean: the run directory of each parent")
    add("--samples", type=int, metavar="n", help="most rollouts of each that are read (default 64)")
    add("--evaluate", metavar="SUITE", help="compare base, parents and merged model on these benchmarks")
    add("--data-dir", "--data_dir", metavar="DIR", help="local copies of the benchmarks (default: the hub)")
    add("--limit", type=int, metavar="n", help="only the first n problems of each benchmark")
    add("--engine", choices=("vllm", "hf"), help="that evaluates (default: vllm where it and a GPU are there, else hf)")
    add("--out", metavar="DIR", help="a new directory")


def main(options: argparse.Namespace, *, has_gpu: bool) -> int:
    """Exit status: 0 done, 130 interrupted. Raises ValueError where the request is wrong."""
    if options.list:
        _show_methods()
        return 0
    # Spinning OpenMP threads on shared cores cost more than they give; torch reads these when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError("--engine vllm: vLLM is not installed; run `bash scripts/setup.sh vllm`, or use --engine hf")
    from remix.merging.request import load_request
    from remix.merging.run import check, write
    from remix.models.loading import quiet

    quiet()
    request = load_request(options.recipe, _given(options))
    engine: Literal["vllm", "hf"] = options.engine or ("vllm" if has_gpu and find_spec("vllm") else "hf")
    merge, rollouts = check(request)
    if request.evaluate is not None:
        from remix.merging.evaluating import check_evaluation, evaluate_all, show

        check_evaluation(merge, engine)
    try:
        record = write(merge, rollouts)
    except KeyboardInterrupt:
        print("interrupted; nothing has been written", file=sys.stderr)
        return 130
    energy = record["energy_kept"].values()
    kept = f"; energy kept {min(energy):.4f} at least, {sum(energy) / len(energy):.4f} in the mean" if energy else ""
    print(showable(f"{request.out}: {len(merge.parents)} merged by {request.method}{kept}"))
    if request.evaluate is not None:
        try:
            show(evaluate_all(merge, record, engine))
        except KeyboardInterrupt:
            print(showable(f"interrupted; {request.out} is there, its evaluation is not"), file=sys.stderr)
            return 130
    return 0


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The keys of a request that the command line sets."""
    own = ("list", "recipe", "param", "engine", "command", "words", "arguments")
    given = {key: value for key, value in vars(options).items() if key not in own and value is not None}
    return given | ({"params": _parameters(options.param)} if options.param else {})


def _parameters(words: Sequence[str]) -> dict[str, Any]:
    import yaml

    from remix.config.reading import read_yaml

    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise ValueError(f"--param {word}: expected key=value, for example --param elect=frequency")
        try:
            found[key] = read_yaml(text)
        except yaml.YAMLError:
            found[key] = text
    return found


def _show_methods() -> None:
    from rich.console import Console
    from rich.table import Table

    from remix.merging.methods import METHODS

    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="dim")
    for column in ("method", "what it does", "parameters (default)", "paper"):
        table.add_column(column, overflow="fold", no_wrap=column == "method")
    for name, method in METHODS.items():
        parameters = [
            f"{key} ({parameter.default}): {parameter.meaning}" for key, parameter in method.parameters.items()
        ]
        needs = {"fisher": "needs --rollouts", "gram": "needs --rollouts", None: ""}[method.statistics]
        table.add_row(name, "; ".join(filter(None, (method.summary, needs))), "\n".join(parameters), method.paper)
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=160, markup=False, emoji=False, highlight=False)
    console.print(table)
