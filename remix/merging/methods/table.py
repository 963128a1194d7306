"""Every merge method by name, what it takes, and the check of a request before anything is written."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from remix.merging.methods.arithmetic import dare_linear, dare_ties, della, linear, magmax, task_arithmetic, ties
from remix.merging.methods.masks import consensus, pam, tall
from remix.merging.methods.means import fisher, karcher, model_stock, regmean, slerp
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
    trims: bool = False
    """It first trims each whole task vector to its `density`, and else looks at each entry by itself: of part of a
    tensor it takes `keeps`, what that has kept."""
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


def _number(default: float, meaning: str, low: float, high: float = math.inf) -> Parameter:
    valid = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number from {low:g}"
    return Parameter(default, meaning, valid, lambda value: _is_number(value) and low <= value <= high)


def _count(default: int, meaning: str, low: int) -> Parameter:
    return Parameter(
        default,
        meaning,
        f"a whole number from {low}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low,
    )


def _choice(default: str, meaning: str, *others: str) -> Parameter:
    names = (default, *others)
    return Parameter(default, meaning, "one of " + ", ".join(names), lambda value: value in names)


def _flag(default: bool, meaning: str) -> Parameter:
    return Parameter(default, meaning, "true or false", lambda value: isinstance(value, bool))


_VOTE = {
    "elect": _choice("total", "what elects a sign: summed values, or one vote per task", "frequency"),
    "elect_weighted": _flag(False, "whether task vectors vote with their weights"),
    "mean": _choice(
        "count", "what the sum of those that agree is divided by: number, weight, nothing", "weight", "sum"
    ),
    "scale": Parameter(1.0, "multiplies the merged task vector", "a number", _is_number),
}
_TRIM = "share of entries kept of each task vector, the largest"
_DROP = {
    "density": _number(0.5, "share of entries kept of each task vector, at random", 0, 1),
    "rescale": _choice("density", "what makes up for the dropped: division by the chance, the L1 norm", "l1", "none"),
}
_ORIGIN = {"origin": _choice("base", "centre of the sphere: task vectors, or the weights themselves", "zero")}
_THRESHOLD = {"threshold": _number(0.4, "λ of the masks: higher gives each task fewer entries", 0)}

METHODS: dict[str, Method] = {
    "linear": Method(
        linear,
        "Model soups: averaging weights of multiple fine-tuned models, arXiv 2203.05482",
        "weighted mean",
        {"normalize": _flag(True, "whether to divide by the sum of the weights")},
        weights="shares",
    ),
    "task_arithmetic": Method(
        task_arithmetic,
        "Editing Models with Task Arithmetic, arXiv 2212.04089",
        "weighted sum of task vectors",
        {"density": _number(1.0, _TRIM, 0, 1)},
        trims=True,
    ),
    "ties": Method(
        ties,
        "TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708",
        "trim, elect a sign, average what agrees",
        {"density": _number(0.2, _TRIM, 0, 1), **_VOTE},
        trims=True,
    ),
    "dare_linear": Method(
        dare_linear,
        "Language Models are Super Mario (DARE), arXiv 2311.03099",
        "drop at random, rescale, sum",
        _DROP,
        random=True,
    ),
    "dare_ties": Method(
        dare_ties,
        "Language Models are Super Mario (DARE), arXiv 2311.03099",
        "drop at random, rescale, elect a sign, average what agrees",
        {**_DROP, **_VOTE},
        random=True,
    ),
    "della": Method(
        della,
        "DELLA-Merging: Magnitude-Based Sampling, arXiv 2406.11617",
        "drop at random but small entries more often, elect a sign, average what agrees",
        {
            **_DROP,
            "epsilon": _number(0.3, "chance of the largest entry of a row less that of the smallest", 0, 1),
            **_VOTE,
        },
        random=True,
    ),
    "magmax": Method(
        magmax,
        "MagMax: Leveraging Model Merging for Seamless Continual Learning, arXiv 2407.06322",
        "the entry of largest magnitude wins",
    ),
    "slerp": Method(
        slerp,
        "Animating rotation with quaternion curves, SIGGRAPH 1985",
        "along the arc between two",
        {**_ORIGIN, "threshold": _number(0.9995, "cosine above which the arc is taken for straight", 0, 1)},
        min_parents=2,
        max_parents=2,
        weights="shares",
    ),
    "karcher": Method(
        karcher,
        "Riemannian center of mass and mollifier smoothing, CPAM 1977",
        "centre of mass on the sphere: SLERP of any number",
        {
            **_ORIGIN,
            "iterations": _count(100, "most steps towards the centre", 1),
            "tolerance": _number(1e-7, "length in radians of a step that is the last", 0),
        },
        weights="shares",
    ),
    "model_stock": Method(
        model_stock,
        "Model Stock: All we need is just a few fine-tuned models, arXiv 2403.19522",
        "mean, drawn towards the base the more the task vectors differ in direction",
        min_parents=2,
        weights="shares",
    ),
    "fisher": Method(
        fisher,
        "Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832",
        "mean weighted by how sure each parent is of each entry",
        {"floor": _number(1e-6, "least information, as a share of the largest", 1e-12, 1)},
        statistics="fisher",
        weights="shares",
    ),
    "regmean": Method(
        regmean,
        "Dataless Knowledge Fusion by Merging Weights of Language Models (RegMean), arXiv 2212.09849",
        "linear layers by least squares on each parent's own inputs",
        {
            "off_diagonal": _number(0.9, "what off-diagonal entries of the Gram matrices are scaled by", 0, 1),
            "ridge": _number(1e-6, "pull towards the mean, as a share of the mean diagonal", 1e-12),
        },
        statistics="gram",
        weights="shares",
    ),
    "tall": Method(
        tall,
        "Localizing Task Information for Improved Model Merging and Compression, arXiv 2405.07813",
        "one task's share of the summed task vectors, by its mask",
        {"task": _count(0, "whose mask, counted from 0 in the parents' order", 0), **_THRESHOLD},
    ),
    "consensus": Method(
        consensus,
        "Localizing Task Information for Improved Model Merging and Compression, arXiv 2405.07813",
        "the summed task vectors without entries that serve too few tasks",
        {"k": _count(2, "least tasks that an entry must serve", 0), **_THRESHOLD},
    ),
    "pam": Method(
        pam,
        "Continual Learning in Vision-Language Models via Aligned Model Merging, arXiv 2506.03189",
        "one after the other: align signs with what is merged so far, average",
        {
            "share": _number(0.5, "share of entries, the largest so far, whose sign is kept", 0, 1),
            "reset": _choice("global", "what replaces an entry of the other sign", "zero"),
            "average": _choice("half", "weight of each next: 1/2, or 1/t", "running_mean"),
        },
        ordered=True,
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
    if complete.get("k", 0) > parents or complete.get("task", 0) >= parents:
        key, most = ("k", parents) if "k" in complete else ("task", parents - 1)
        raise ValueError(f"{name}: {key} is {complete[key]}, but of {parents} parents it is at most {most}")
    return complete
