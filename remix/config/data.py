"""What the model is asked and how answers are rewarded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from remix.config.block import Block, Fraction


class TaskBlock(Block):
    label: str | None = None
    """What the task is called in metrics and prompt ids; null: as its type, kind or file."""
    weight: PositiveFloat = 1.0
    """Share of this task among the prompts of a step, relative to the others'."""
    holdout: Fraction = 0.02
    """Share of a data set kept for evaluation where it has no evaluation split of its own."""


class ArithmeticTask(TaskBlock):
    """Generated arithmetic chains; held-out problems are disjoint by construction."""

    type: Literal["arithmetic"] = "arithmetic"
    kinds: tuple[str, ...] = ("sum",)
    """Of problem, in turn: sum (3+8+4=), sum_subtract (3+8-4=), product_sum (6*7+3*4=)."""
    min_terms: PositiveInt = 3
    """Fewest terms of a problem, at least 2."""
    max_terms: PositiveInt = 5
    """Most terms of a problem."""
    size: PositiveInt = 4096
    """Distinct problems to train on."""
    seed: NonNegativeInt = 0
    """Of the choice of problems."""


ShapesKind = Literal["colour", "shape", "where", "point", "bigger", "smaller", "left", "odd", "count", "digit"]


class ShapesTask(TaskBlock):
    """Questions about drawn pictures of 32 x 32 pixels; held-out pictures are disjoint by construction."""

    type: Literal["shapes"] = "shapes"
    kind: ShapesKind
    """Also the task's name."""
    size: PositiveInt = 4096
    """Pictures to train on."""
    seed: NonNegativeInt = 0
    """Of the pictures."""


class DataTask(TaskBlock):
    """What data sets have in common, wherever they lie."""

    unanswered: Literal["error", "drop"] = "error"
    """What becomes of a row whose answer is empty."""
    exclude: tuple[str, ...] = ()
    """Benchmarks whose problems are left out, so that their scores stay clean.

    Each entry is a benchmark or suite (math500, math), a file of problems (.jsonl, .jsonl.gz), or a list of ids of this
    data set (.json). Held-out problems from a split or file of their own stay as they are.
    """
    exclude_overlap: Annotated[Fraction, Field(gt=0.0)] | None = 0.5
    """Also left out: what shares at least so much of the 13-word runs of a benchmark's problem.

    null: only what is the same letter by letter and digit by digit, case ignored.
    """
    exclude_dir: str | None = None
    """The folder of local copies of the excluded benchmarks, by their file names; null: they come from the hub."""


class JsonlTask(DataTask):
    """A local JSON-lines file, plain or .gz."""

    type: Literal["jsonl"] = "jsonl"
    path: str
    """The file."""
    eval_path: str | None = None
    """Held-out problems; without it `holdout` is cut off `path`."""
    problem: str = "problem"
    """The column of problems."""
    answer: str = "answer"
    """The column of gold answers."""
    solution: str | None = None
    """The column of responses to imitate under objective.type sft; null: the answers."""
    id: str | None = "id"
    """The column of ids, each once; null: rows are numbered."""
    images: str | None = None
    """The column of each problem's images: a path, or a list of them, relative to the file's folder."""
    limit: PositiveInt | None = None
    """Only the first so many rows of `path`."""


class HubTask(DataTask):
    """Any data set that `datasets.load_dataset` reads."""

    type: Literal["hub"] = "hub"
    path: str
    """Hub id, or a folder or file."""
    name: str | None = None
    """Of the data set's configuration, where it has several."""
    revision: str | None = None
    """Of a hub id. Only a full commit names the same rows for ever; null = whatever is newest."""
    split: str = "train"
    """The split to train on."""
    eval_split: str | None = None
    """The split of held-out problems; without it `holdout` is cut off `split`."""
    problem: str = "problem"
    """The column of problems."""
    answer: str = "answer"
    """The column of gold answers."""
    solution: str | None = None
    """The column of responses to imitate under objective.type sft; null: the answers."""
    id: str | None = None
    """The column of ids, each once; null: rows are numbered."""
    limit: PositiveInt | None = None
    """Only the first so many rows of `split`."""


class CoinTask(TaskBlock):
    """CoIN's annotations, and LLaVA's: a JSON file of questions about images in a folder."""

    type: Literal["coin"] = "coin"
    path: str
    """The JSON file."""
    images: str
    """The folder that the images' paths start from."""
    eval_path: str | None = None
    """Held-out questions, in the training or the test form; without it a `holdout` of the images of `path`."""
    unanswered: Literal["error", "drop"] = "error"
    """What becomes of a question whose answer is empty."""
    limit: PositiveInt | None = None
    """Only the first so many questions of `path`."""


class MfeEtpTask(TaskBlock):
    """MFE-ETP's annotations: a folder per kind of question, each with data.json and images/."""

    type: Literal["mfe_etp"] = "mfe_etp"
    path: str
    """The folder of those folders."""
    kinds: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "affordance",
        "operation",
        "sequence",
        "spatial_perception",
    )
    """The default: those whose answers a reward can check without a judge."""
    unanswered: Literal["error", "drop"] = "error"
    """What becomes of an annotation without a response."""
    holdout: Fraction = 0.2
    """Share kept for evaluation; a kind has some fifty to a few hundred questions."""
    limit: PositiveInt | None = None
    """Of all kinds together."""


TaskConfig = Annotated[
    ArithmeticTask | ShapesTask | JsonlTask | HubTask | CoinTask | MfeEtpTask, Field(discriminator="type")
]


class PromptConfig(Block):
    """How a problem is put to the model."""

    template: str = "{problem}"
    """What is put around a problem; {problem} is replaced, all else stays as it is."""
    system: str | None = None
    """A system message, before the problem."""
    chat: Literal["auto", "always", "never"] = "auto"
    """auto: the tokenizer's chat template where it has one."""
    max_tokens: PositiveInt = 766
    """Longest prompt, in tokens."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What becomes of a prompt above `max_tokens`; truncate keeps its end."""


Seconds = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


class RewardBlock(Block):
    weight: FiniteFloat = 1.0
    """Of this reward in the sum; 0: measured alone."""


class ExactMatchReward(RewardBlock):
    """1 if the answer is the gold string. The answer is what follows the last `after`, or the whole response."""

    type: Literal["exact_match"] = "exact_match"
    after: str | None = None
    """A mark, such as "#"; a response without it has no answer. null: all of the response is the answer."""
    normalize: bool = False
    """Words alone are compared: case, punctuation and spaces do not count ("3, 1" is "3,1", "'Grasp'." is "grasp")."""


class MathReward(RewardBlock):
    """1 if the answer is mathematically equal to the gold answer."""

    type: Literal["math"] = "math"
    timeout: Seconds = 5.0
    """Seconds of wall clock for one answer."""
    workers: PositiveInt = 2
    """Grading processes."""


class FormatReward(RewardBlock):
    """1 if the whole response matches the regular expression.

    Mind backtracking: a pattern with several `.*` can take seconds on a long response. The default's atomic groups
    cannot. The syntax is that of the `regex` package, which holds Python's own.
    """

    type: Literal["format"] = "format"
    pattern: str = r"(?s)<think>(?>.*?</think>)(?>.*?\\boxed\{).*\}.*"
    """The regular expression."""
    timeout: Seconds = 5.0
    """Seconds of processor time for one response; one that takes longer is a failure (`timeout`) and no mismatch."""


class LengthReward(RewardBlock):
    """0 up to `free_tokens`, then falling linearly to -1 at `max_tokens` (DAPO's soft overlong penalty)."""

    type: Literal["length"] = "length"
    free_tokens: NonNegativeInt
    """Longest response without a penalty."""
    max_tokens: PositiveInt
    """Response length from which the penalty is -1."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.free_tokens >= self.max_tokens:
            raise ValueError(f"free_tokens ({self.free_tokens}) must be below max_tokens ({self.max_tokens})")
        return self


class PythonReward(RewardBlock):
    """Your own function, `module:function`, called as function(prompt, response) and returning a float.

    It runs in processes of its own. A response on which it overruns (`timeout`), dies, raises or returns no finite
    number (`error`) is left out of training.
    """

    type: Literal["python"] = "python"
    function: str
    """What to call: the module has to be importable where the run is started."""
    timeout: Seconds = 60.0
    """Seconds of wall clock for one response. Where it is above 120, importing the module may take as long too."""
    workers: PositiveInt = 1
    """Processes, each with the module imported anew."""


RewardConfig = Annotated[
    ExactMatchReward | MathReward | FormatReward | LengthReward | PythonReward, Field(discriminator="type")
]
