"""Your own function as a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from numbers import Real

from remix.config import PythonReward
from remix.config.block import nearest
from remix.rewards.base import Part
from remix.types import Prompt

Function = Callable[[Prompt, str], object]


class Python:
    """Calls function(prompt, response), with `prompt` a remix.types.Prompt."""

    def __init__(self, config: PythonReward) -> None:
        self._name = config.function
        self._function = load_function(config.function)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        values = [self._call(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        return [Part(value) for value in values]

    def close(self) -> None:
        pass

    def _call(self, prompt: Prompt, response: str) -> float:
        try:
            value = self._function(prompt, response)
        except Exception as error:  # foreign code on model text: the error must say which function and which prompt
            raise ValueError(
                f"the reward function {self._name} raised {type(error).__name__} ({error}) on prompt '{prompt.id}'; "
                "let it return a value for any text, such as 0.0 for one that it cannot read"
            ) from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"the reward function {self._name} returned {value!r} on prompt '{prompt.id}'; "
                "it has to return a finite number, such as 0.0 or 1.0"
            )
        return float(value)


def load_function(path: str) -> Function:
    """The function that `module:function` names."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"the reward function '{path}' is not of the form module:function, such as my_rewards:score")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is there but imports one that is not would be a misleading "no such module".
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"the reward function '{path}': there is no module '{error.name}'; "
            "put its folder on PYTHONPATH, or write the module as Python imports it (my_package.rewards)"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(name, functions) if functions else "it defines no function"
        raise ValueError(f"the reward function '{path}': module '{module_name}' has no '{name}'; {hint}")
    if not callable(function):
        raise ValueError(
            f"the reward function '{path}' is a {type(function).__name__}, which cannot be called; "
            "name a function of (prompt, response)"
        )
    return function  # type: ignore[no-any-return]
