"""Every merge method by name, what it takes, and the check of a request before anything is written."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from remix.merging.methods.arithmetic import linear, task_arithmetic, ties
from remix.merging.methods.tensors import normalised


@dataclass(frozen=True, slots=True)
class Parameter:
    """One keyword of a merge method."""

    default: Any
    """What the function has as its default."""
    meaning: str
    """One line for people."""
    valid: str
    """Which values there are, for people: "a number in [0, 1]"."""
    accepts: Callable[[Any], bool]
    """Whether a value is one of them."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: `function(base, tasks, weights, **parameters)`, of one tensor."""

    function: Callable[..., Tensor]
    """Also takes `seeds` if `random`, `fishers` or `grams` by its `statistics`: one per task vector."""
    paper: str
    """Title and arXiv id or venue."""
    summary: str
    """One line."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """By keyword."""
    min_parents: int = 1
    max_parents: int | None = None
    """How many task vectors it takes; None: any number."""
    ordered: bool = False
    """The order of the task vectors matters."""
    random: bool = False
    """It draws: `seeds`, one per task vector, see `task_seed`."""
    statistics: Literal["fisher", "gram"] | None = None
    """What it needs of each parent beside its weights."""
    weights: Literal["factors", "shares"] = "factors"
    """`factors` scale each task vector, and 0 for all gives the base. `shares` are those of a mean: only their ratios
    count, none is negative and their sum is not 0."""

    def takes_shares(self, parameters: Mapping[str, Any]) -> bool:
        """Whether only the ratios of the weights count, under these (complete) parameters."""
        return self.weights == "shares" and bool(parameters.get("normalize", True))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(default: float, meaning: str, low: float = -math.inf, high: float = math.inf) -> Parameter:
    valid = "a number" if low == -math.inf else f"a number from {low:g}" + (f" to {high:g}" if high < math.inf else "")
    return Parameter(default, meaning, valid, lambda value: _is_number(value) and low <= value <= high)


def _choice(default: str, meaning: str, *others: str) -> Parameter:
    names = (default, *others)
    return Parameter(default, meaning, "one of " + ", ".join(names), lambda value: value in names)


def _flag(default: bool, meaning: str) -> Parameter:
    return Parameter(default, meaning, "true or false", lambda value: isinstance(value, bool))


_VOTE = {
    "elect": _choice("total", "what elects a sign: summed values, or one vote per task", "frequency"),
    "elect_weighted": _flag(False, "tasks vote after they are weighted"),
    "mean": _choice(
        "count", "what divides the sum of those that agree: their number, their weight, or 1", "weight", "sum"
    ),
    "scale": _number(1.0, "multiplies the merged task vector"),
}

METHODS: dict[str, Method] = {
    "linear": Method(
        linear,
        "Model soups, arXiv 2203.05482",
        "weighted mean of the models",
        {"normalize": _flag(True, "divide by the sum of the weights")},
        weights="shares",
    ),
    "task_arithmetic": Method(
        task_arithmetic,
        "Editing Models with Task Arithmetic, arXiv 2212.04089",
        "weighted sum of the task vectors",
        {"density": _number(1.0, "share of entries kept of each task vector, the largest", 0, 1)},
    ),
    "ties": Method(
        ties,
        "TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708",
        "trim, elect a sign, average what agrees",
        {"density": _number(0.2, "share of entries kept of each task vector, the largest", 0, 1), **_VOTE},
    ),
}


def find_method(name: str) -> Method:
    """The method of that name; ValueError names the nearest."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? All: " if near else "choose from "
    raise ValueError(f"no merge method {name!r}; {hint}{', '.join(METHODS)}")


def check_request(
    name: str, *, parents: int, weights: Sequence[float], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters with defaults filled in, or one ValueError saying what to change."""
    method = find_method(name)
    most = method.max_parents
    if parents < method.min_parents or (most is not None and parents > most):
        need = f"exactly {most}" if most == method.min_parents else f"at least {method.min_parents}"
        raise ValueError(f"{name} merges {need} models or adapters, not {parents}; choose a method for that many")
    if len(weights) != parents:
        raise ValueError(f"{len(weights)} weights for {parents} models or adapters; give one to each, in their order")
    unknown = sorted(set(parameters) - set(method.parameters))
    if unknown:
        takes = ", ".join(method.parameters) or "none"
        near = difflib.get_close_matches(unknown[0], method.parameters, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{name} has no parameter {unknown[0]!r}; {hint}its parameters: {takes}")
    complete = {key: parameters.get(key, parameter.default) for key, parameter in method.parameters.items()}
    for key, value in complete.items():
        if not method.parameters[key].accepts(value):
            raise ValueError(f"{name}: {key} is {value!r}, but must be {method.parameters[key].valid}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {list(weights)} are not finite; give finite weights")
    if method.takes_shares(complete):
        normalised(weights)
    return complete
