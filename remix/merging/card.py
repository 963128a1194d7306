"""What a merge leaves beside its weights: a record for programs, a card for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from remix import __version__
from remix.merging.apply import Merge
from remix.merging.base import RECORD, merge_record
from remix.merging.methods import check_request
from remix.terminal import markdown_code, markdown_text

LIBRARIES = ("torch", "safetensors", "transformers", "peft")


def record(merge: Merge, energy: Mapping[str, float]) -> dict[str, Any]:
    """All that the output follows from, by hashes; with the same record anyone gets the same bytes."""
    request = merge.request
    setting = request.setting("")
    parents = [
        {
            "path": _place(parent.path),
            "sha256": parent.sha256,
            "kind": parent.kind,
            "weight": setting.weights[index],
            "rollouts": request.rollouts[index] if request.rollouts else None,
        }
        for index, parent in enumerate(merge.parents)
    ]
    parameters = check_request(
        request.method, parents=len(parents), weights=setting.weights, parameters=setting.parameters
    )
    return {
        "method": request.method,
        "parameters": parameters,
        "base": {
            "path": _place(merge.base.path),
            "sha256": merge.base.sha256,
            "merge": merge_record(merge.base.folder),
        },
        "parents": parents,
        "overrides": [override.model_dump(mode="json") for override in request.overrides],
        "lora_form": request.lora_form if request.adapters else None,
        "save_as": request.save_as,
        "seed": request.seed,
        "dtype": request.dtype,
        "samples": request.samples if request.rollouts else None,
        "energy_kept": dict(energy),
        "versions": {"remix": __version__, **{library: version(library) for library in LIBRARIES}},
    }


def card(record: Mapping[str, Any], paper: str, scores: Sequence[Mapping[str, Any]] = ()) -> str:
    """Markdown with the metadata that model hubs read. `scores`: rows of the evaluation, if there was one."""
    adapter = record["save_as"] == "adapter"
    base = record["base"]["path"]
    metadata = {
        "base_model": [base],
        "library_name": "peft" if adapter else "transformers",
        "tags": ["merge", "remix", record["method"]],
    }
    name = markdown_text(base.rstrip("/").rsplit("/", 1)[-1])
    what = "An adapter for it" if adapter else "It"
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}, merged by {record['method']}",
        "",
        f"{what} was merged by ReMix {__version__} from {len(record['parents'])} parents; `{RECORD}` has this as JSON.",
        "",
        *_table([("", ""), *_facts(record, paper)]),
        "",
        "## Parents",
        "",
        *_table([("parent", "kind", "weight", "sha256"), *_parents(record)]),
        "",
    ]
    if scores:
        lines += [
            "## Evaluation",
            "",
            "avg@k in percent: the share of correct responses.",
            "",
            *_table(score_rows(scores)),
        ]
        lines.append("")
    return "\n".join(lines)


def score_rows(scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Heading and one row for base, each parent, and what was merged."""
    benchmarks = list(scores[0]["benchmarks"])
    rows = [("", *benchmarks, *(["average"] if len(benchmarks) > 1 else []))]
    for row in scores:
        shares = [row["benchmarks"][name]["avg@k"] for name in benchmarks]
        shares += [row["macro_average"]["avg@k"]] if len(benchmarks) > 1 else []
        rows.append((str(row["name"]), *(f"{100 * share:.1f}" for share in shares)))
    return rows


def _facts(record: Mapping[str, Any], paper: str) -> Iterator[tuple[str, str]]:
    yield "base", f"{markdown_code(record['base']['path'])}, sha256 `{record['base']['sha256']}`"
    if record["base"]["merge"] is not None:
        yield "the base is itself a merge of", str(len(record["base"]["merge"]["parents"])) + " parents"
    yield "method", f"`{record['method']}`: {markdown_text(paper)}"
    yield "parameters", ", ".join(f"{key} {value}" for key, value in record["parameters"].items()) or "none"
    for override in record["overrides"]:
        yield f"tensors {markdown_code(override['match'])}", markdown_text(_changed(override))
    if record["lora_form"] is not None:
        yield "of LoRAs", "A and B each" if record["lora_form"] == "factors" else "products B·A"
    energy = record["energy_kept"].values()
    if energy:
        yield "energy kept by the rank", f"{min(energy):.4f} at least, {sum(energy) / len(energy):.4f} in the mean"
    yield "seed", str(record["seed"])
    yield "dtype", record["dtype"] or ("float32" if record["save_as"] == "adapter" else "the base's")
    if record["samples"]:
        yield "statistics", f"of at most {record['samples']} rollouts of each parent"
    yield "versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())


def _changed(override: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in override.items() if key not in ("match", "params") and value is not None}
    return ", ".join(f"{key} {value}" for key, value in (shown | override["params"]).items())


def _parents(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for parent in record["parents"]:
        yield markdown_code(parent["path"]), parent["kind"], f"{parent['weight']:g}", f"`{parent['sha256']}`"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def _place(path: str) -> str:
    """A directory from the root, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
