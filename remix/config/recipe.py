"""A recipe: what a run is, as data. Here its blocks are joined, read and checked together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from remix.config.algorithm import (
    AdvantageConfig,
    GAEAdvantage,
    GRPOAdvantage,
    KLConfig,
    ObjectiveConfig,
    OnPolicyPhase,
    PhaseConfig,
    ReincarnationConfig,
)
from remix.config.block import Block, nearest, quotable
from remix.config.continual import AlignmentConfig, ContinualConfig
from remix.config.contradictions import contradictions
from remix.config.data import PromptConfig, RewardConfig, TaskConfig
from remix.config.model import (
    AdapterConfig,
    ModelConfig,
    NoAdapter,
    SeparateCritic,
    SharedCritic,
)
from remix.config.reading import LARGEST, read_yaml
from remix.config.rollout import BatchConfig, RolloutConfig
from remix.config.run import CheckpointConfig, EvalConfig, FaultConfig, LogConfig, OptimizerConfig
from remix.secrets import find_secret, redact

Schema = TypeVar("Schema", bound=Block)


class Recipe(Block):
    """What a run is. In `path`, `eval_path`, `data_dir` and `initial` a ./ or ../ begins at the recipe's folder; all
    other paths are relative to where the command runs."""

    run_dir: str
    """Folder that the run writes, relative to where the command runs."""
    seed: NonNegativeInt = 0
    """Of sampling, prompt order, minibatches, replay and whatever begins at random."""
    steps: PositiveInt
    """Training steps of the whole plan; schedules refer to it."""
    max_steps: NonNegativeInt | None = None
    """Stop after this many, the plan unchanged; --resume goes on from there."""
    model: ModelConfig
    """The model that is trained."""
    adapter: AdapterConfig = NoAdapter()
    """What of the model is trained."""
    tasks: Annotated[tuple[TaskConfig, ...], Field(min_length=1)]
    """Where prompts come from. Several are mixed by weight."""
    prompt: PromptConfig = PromptConfig()
    """How a problem is put to the model."""
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    """What a response is worth: the sum over these, each by its weight."""
    rollout: RolloutConfig = RolloutConfig()
    """How responses are sampled."""
    batch: BatchConfig
    """What a training step trains on, and in what pieces."""
    advantage: AdvantageConfig = GRPOAdvantage()
    """How much better a response, or a token, is than was to be expected."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The policy's loss."""
    kl: KLConfig = KLConfig()
    """The penalty on distance from the anchors: KL-Convex where it has a λ schedule."""
    phases: Annotated[tuple[PhaseConfig, ...], Field(min_length=1, max_length=12)] = (OnPolicyPhase(),)
    """One after the other; each change is a reincarnation. At most 12: the plan counts through every way in which
    they may end, which doubles with each."""
    reincarnation: ReincarnationConfig = ReincarnationConfig()
    """What a change of phase does besides."""
    alignment: AlignmentConfig | None = None
    """Sign alignment with the adapter that the run begins from; null: none."""
    continual: ContinualConfig | None = None
    """Tasks one after the other in place of mixed; null: mixed."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its learning rate."""
    eval: EvalConfig = EvalConfig()
    """Evaluation before, during and after training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Training states that a run goes on from."""
    faults: FaultConfig = FaultConfig()
    """What a run puts up with before it stops."""
    log: LogConfig = LogConfig()
    """What is written down for people."""

    @property
    def last_step(self) -> int:
        """Where this run stops."""
        return self.steps if self.max_steps is None else min(self.steps, self.max_steps)

    @property
    def critic(self) -> SharedCritic | SeparateCritic | None:
        return self.advantage.critic if isinstance(self.advantage, GAEAdvantage) else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = list(contradictions(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def imitates(self) -> bool:
        """Whether responses are demonstrations rather than samples."""
        return self.objective.type == "sft"

    @property
    def drops_uniform_groups(self) -> bool:
        if self.imitates:
            return False
        chosen = self.rollout.drop_uniform_groups
        # With a KL in them, equal scores are not equal rewards.
        return not (isinstance(self.advantage, GAEAdvantage) or self.kl_in_reward) if chosen is None else chosen

    @property
    def kl_in_reward(self) -> bool:
        return self.kl.place == "reward" and self.kl.weight > 0

    @property
    def defers_proximal(self) -> bool:
        """Whether the first update, being over all samples, can say the proximal log-probs: nothing asks before it, and
        no dropout makes its forward another policy's."""
        asked = isinstance(self.advantage, GAEAdvantage) or self.kl_in_reward or self.imitates
        return self.batch.minibatches == 1 and not asked and not getattr(self.adapter, "dropout", 0.0)

    @property
    def keeps_precedent(self) -> bool:
        """Whether π_{k-1} is kept: as an anchor of the KL, or as the policy that sampled while step k-1 updated."""
        return self.kl.uses_precedent or self.rollout.overlap

    def fresh_prompts(self, phase: PhaseConfig) -> int:
        """(1 - p) of the batch, in prompts."""
        return self.batch.prompts - round(phase.off_policy_fraction * self.batch.prompts)


PATHS = ("path", "eval_path", "data_dir", "initial")
"""Keys whose values may be relative to the recipe's own folder."""
MOST_LINES = 20
"""Of a message."""


class RecipeError(ValueError):
    """A recipe that cannot be run. The message names file, key, cause and remedy.

    Whatever the file holds, the message is short, and any terminal shows it.
    """

    def __init__(self, message: str) -> None:
        lines = message.split("\n")
        shown = [quotable(line) for line in lines[:MOST_LINES]]
        more = len(lines) - len(shown)
        super().__init__("\n".join([*shown, f"and {more} more lines"] if more else shown))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `dotted.key=value` overrides, whose values are YAML.

    Raises RecipeError.
    """
    path = Path(path)
    data = _anchor_paths(read_recipe(path), path.parent)
    for override in overrides:
        _apply(data, override)
    return parse_recipe(data, source=str(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's file as plain data, unchecked. Raises RecipeError."""
    try:
        with path.open(encoding="utf-8") as file:
            data = read_yaml(file.read(LARGEST + 1))  # one more than is read shows what is too long
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; recipes are YAML files, see recipes/") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a directory; name one of its recipes") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {_yaml_problem(error)}") from None
    except (OSError, ValueError) as error:  # no permission; a name too long or no name at all
        raise RecipeError(f"{path}: cannot be opened: {getattr(error, 'strerror', error)}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this holds {type(data).__name__}")
    return data


def parse_recipe(data: dict[str, Any], source: str = "recipe") -> Recipe:
    """Checks plain data against the schema. Raises RecipeError with one line a problem."""
    return check_block(Recipe, data, source)


def check_block(schema: type[Schema], data: dict[str, Any], source: str) -> Schema:
    """Plain data as a block of any kind. Raises RecipeError with one line a problem."""
    # First of all: messages about what else is wrong quote values.
    secrets = list(_secrets(data))
    if secrets:
        raise RecipeError("\n".join(f"{source}: {problem}" for problem in secrets))
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{source}: {_explain(problem)}" for problem in error.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong and where, without the lines around it, which may hold anything."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return redact(str(error).splitlines()[0])
    mark = error.problem_mark
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return redact(f"{error.problem}{where}")


def _secrets(data: Any, place: str = "") -> Iterator[str]:
    """One problem for each key or value that holds a credential, which is named but not repeated."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            inner = f"{place}.{key}" if place else str(key)
            if isinstance(key, str) and (found := find_secret(key)):
                yield _SECRET.format(place=redact(inner), found=found)
            else:
                yield from _secrets(value, inner)
    elif data is not None and (found := find_secret(str(data))):
        yield _SECRET.format(place=place, found=found)


_SECRET = (
    "{place}: holds {found}, and a recipe is copied into logs and checkpoints: take it out, and leave it in the "
    "environment, where the library that needs it looks (HF_TOKEN, WANDB_API_KEY)"
)


def _anchor_paths(data: Any, folder: Path) -> Any:
    """Makes paths that begin with ./ or ../ absolute, relative to the recipe's folder."""
    if isinstance(data, list):
        return [_anchor_paths(item, folder) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        key: str((folder / value).resolve())
        if key in ("path", "eval_path", "data_dir", "initial")
        and isinstance(value, str)
        and value.startswith(("./", "../"))
        else _anchor_paths(value, folder)
        for key, value in data.items()
    }


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if found := find_secret(override):
        raise RecipeError(f"override of {_SECRET.format(place=redact(key), found=found)}")
    if not equals or not key:
        raise RecipeError(f"override '{override}': expected dotted.key=value, for example optimizer.lr=1e-5")
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        value = text
    *parents, leaf = key.split(".")
    node: Any = data
    for name in parents:
        if isinstance(node, list):
            node = node[_index(node, name, override)]
        elif isinstance(node, dict):
            # A block that the file leaves out, or sets to null, takes its defaults beside the override.
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        else:
            raise RecipeError(f"override '{override}': '{name}' lies inside a plain value")
    if isinstance(node, list):
        node[_index(node, leaf, override)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise RecipeError(f"override '{override}': '{leaf}' lies inside a plain value")


def _index(items: list[Any], name: str, override: str) -> int:
    indices = [str(index) for index in range(len(items))]
    if name not in indices:
        allowed = f"must be an index from 0 to {indices[-1]}" if items else "is an index of an empty list"
        raise RecipeError(f"override '{override}': '{name}' {allowed}")
    return int(name)


def _explain(problem: Any) -> str:
    # A discriminated union puts the chosen tag into the location; it is no key of the file.
    where = ".".join(str(part) for i, part in enumerate(problem["loc"]) if i == 0 or part not in _TAGS)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in problem["ctx"]["expected_tags"].split(",")]
        where, tag = f"{where}.type", problem["ctx"]["tag"]
        message = f"unknown type '{tag}'; {nearest(tag, tags)}"
    elif problem["type"] == "union_tag_not_found":
        message = "`type` is missing"
    elif problem["type"] == "missing":
        message = "is required"
    elif not isinstance(problem["input"], dict):
        message = f"{message}, got {problem['input']!r}"
    return f"{where}: {message}" if where else message


def _blocks(base: type[Block] = Block) -> Iterator[type[Block]]:
    for block in base.__subclasses__():
        yield block
        yield from _blocks(block)


_TAGS = {block.model_fields["type"].default for block in _blocks() if "type" in block.model_fields}
