"""What the study of rollouts to accuracy compares: tasks, arms with the settings that they choose from, ablations,
dynamics. Each is a recipe of recipes/embedded with other keys."""

from __future__ import annotations

import json
from dataclasses import dataclass

ALGORITHMS = ("grpo", "ppo")
TASKS = {"3 to 5 terms": (), "4 to 6 terms": ("tasks.0.min_terms=4", "tasks.0.max_terms=6")}
"""The base solves about 27% and 19% of them. The first is what arms are tuned on, and what ablation and dynamics are
of."""
FIRST = next(iter(TASKS))
LRS = ("3.5e-5", "7.0e-5", "1.4e-4", "2.8e-4")
SINGLE, PASSES, REMIX = "single pass", "best passes", "ReMix"


@dataclass(frozen=True)
class Arm:
    """A way to train; `rounds` of settings to choose from, each given what the rounds before chose."""

    name: str
    recipe: str
    keys: tuple[str, ...] = ()
    rounds: tuple[tuple[tuple[str, ...], ...], ...] = ()


def each(key: str, *values: object) -> tuple[tuple[str, ...], ...]:
    return tuple((f"{key}={value}",) for value in values)


def arms(algorithm: str) -> list[Arm]:
    """Twelve tuning runs each. Further arms go to the end: a name, a recipe, keys."""
    group = 8 if algorithm == "grpo" else 1
    prompts = [responses // group for responses in (256, 1024)]
    sizes = each("batch.prompts", *prompts)
    minibatches = each("batch.minibatches", 1, 4, 8)
    utd, mix = "phases.0.utd_ratio", "phases.0"
    replayed = ((f"{mix}.off_policy_fraction=0.2",), (f"{mix}.off_policy_fraction=0.6", f"{mix}.window=4"))
    of_single = (each("batch.prompts", 128 // group, *prompts), minibatches, each("kl.weight", 0, "1.0e-2"))
    of_passes = (each(utd, 2, 6, 8), sizes, minibatches)
    later = "phases.1.utd_ratio=4"  # in the paper the on-policy phase has one pass
    of_remix = (each(utd, 2, 6), sizes, replayed, ((later,), (f"{mix}.until.0.after=4", later)))
    lrs = each("optimizer.lr", *LRS)
    return [
        Arm(SINGLE, algorithm, rounds=(lrs, *of_single)),
        Arm(PASSES, algorithm, (f"{utd}=4",), rounds=(lrs, *of_passes)),
        Arm(REMIX, f"remix_{algorithm}", rounds=(lrs, *of_remix)),
    ]


HEAVY = "kl.weight=1.0e-2"
"""So that it matters what the KL is to."""
FIXED = "kl.lambda_schedule=null"
NEVER = 'phases=[{{"type":"mix_policy","off_policy_fraction":{p},"window":{n},"utd_ratio":{utd}}}]'
ABLATIONS = {
    "full": (HEAVY,),
    "without UTD": (HEAVY, "phases.0.utd_ratio=1"),
    "without KL-Convex": (HEAVY, FIXED),
    "without reincarnation": (HEAVY, NEVER.format(p=0.4, n=2, utd=4)),
    "without all three": (HEAVY, NEVER.format(p=0.4, n=2, utd=1), FIXED),
}
"""Of the recipe's own ReMix with the tuned learning rate, as are the dynamics."""
PAPER_ABLATION = ("full", "without UTD", "without KL-Convex", "without all three", "without reincarnation")
"""From the best to the worst, by the paper's average of five benchmarks."""


def over(label: str, key: str, own: object, *values: object) -> dict[str, tuple[str, ...]]:
    """A setting for each value; the recipe's `own` needs no key, so that it is one run in all of them."""
    return {f"{label}{value}": () if value == own else (f"{key}={value}",) for value in values}


P, UTD, WINDOW, UNTIL = (
    over("p = ", "phases.0.off_policy_fraction", 0.4, 0.1, 0.2, 0.3, 0.4, 0.5),
    over("UTD ", "phases.0.utd_ratio", 4, 1, 2, 4, 8),
    over("N = ", "phases.0.window", 2, 1, 2, 3, 4),
    over("T = ", "phases.0.until.0.after", 12, 6, 12, 24)
    | {"T never": (NEVER.format(p=0.4, n=2, utd=4),), "T never, UTD 8": (NEVER.format(p=0.4, n=2, utd=8),)}
    | {"T never, p = 0.75, N = 4": (NEVER.format(p=0.75, n=4, utd=4),)},
)
LAMBDA = {
    "λ decays": (HEAVY,),
    "λ = 1": (HEAVY, FIXED),
    "λ = 0.5": (HEAVY, "kl.lambda_schedule.start=0.5", "kl.lambda_schedule.floor=0.5"),
}
DYNAMICS = P | UTD | WINDOW | UNTIL | LAMBDA
DYNAMICS_PANELS = {"p": P, "UTD": UTD, "N": WINDOW, "T": UNTIL, "λ": LAMBDA}

APART = "tasks={}".format(
    json.dumps(
        [
            {"type": "arithmetic", "label": f"of{n}", "min_terms": n, "max_terms": n, "size": size, "weight": size}
            for n, size in ((3, 600), (4, 1748), (5, 1748))
        ]
    )
)
"""The first task's sums, as a task for each number of terms."""
SORTED = "ReMix itself, a task for each number of terms"
STEERED = "tasks drawn by how near one half right they are"
CONTROLS = {STEERED: SORTED}
"""What an option is compared with, where it is not ReMix itself."""
MOMENTS, KEPT = "the optimiser's moments kept at reincarnation", "reincarnation.reset_optimizer=false"
BEYOND = {
    "grpo": {
        "lags by 1/age": ("phases.0.lag_distribution=age",),
        MOMENTS: (KEPT,),
        "reincarnation at a plateau": ('phases.0.until=[{"type":"reward_plateau","window":3}]',),
        SORTED: (APART,),
    },
    "ppo": {MOMENTS: (KEPT,), "V-trace": ("advantage.vtrace_cap=1.0",)},
}
"""Options that are not the paper's, each added to the tuned ReMix."""
CHOOSY = "phases.0.window=4"
"""Replay is choosy only where there is more than it takes."""
EIGHT = ("phases.0.utd_ratio=8", "phases.1.utd_ratio=8")
TAKEN_OUT: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {
        "at most 8 passes, ended where ESS falls below 0.95": (
            *EIGHT,
            "phases.0.ess_floor=0.95",
            "phases.1.ess_floor=0.95",
        ),
        "4 steps' groups, by mean size of advantage": (CHOOSY, "phases.0.prefer=advantage"),
        "4 steps' groups, near one half right": (CHOOSY, "phases.0.prefer=half"),
        STEERED: (APART, "steering={}"),
    },
    "ppo": {},
}
"""Options that were tried and lowered nothing: recipes do not have them. Their results are shown, never run again."""
