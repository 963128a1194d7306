"""The worker process of a reward function: [prompt, response] in, [value, ""] or [null, what went wrong] out.

Started as `python -m remix.rewards.python_worker FUNCTION SYS_PATH` by `remix.rewards.python`; SYS_PATH is the
trainer's, as JSON, so that a module is found here where it would be found there.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from io import TextIOWrapper
from numbers import Real
from typing import Any

from remix.rewards.base import shortened
from remix.rewards.serving import CannotServeError, Handler, serve
from remix.types import Prompt

Function = Callable[[Prompt, str], object]


def main() -> None:
    path, sys_path = sys.argv[1], json.loads(sys.argv[2])

    def prepare() -> Handler:
        if isinstance(sys.stdout, TextIOWrapper):  # whatever the function prints of a response may be printed, and now
            sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        sys.path[:] = sys_path
        function = load_function(path)
        return lambda request: _call(path, function, _prompt(request[0]), request[1])

    serve(prepare)


def load_function(path: str) -> Function:
    """The function that `module:function` names. Raises CannotServeError."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise CannotServeError(
            f"the reward function '{path}' is not of the form module:function, such as my_rewards:score"
        )
    if module_name == "__main__":
        raise CannotServeError(
            f"the reward function '{path}': it runs in a process of its own, which cannot import the script that was "
            f"started; name the script's file, such as my_script:{name}, or move the function to a module"
        )
    module = _module(path, module_name)
    function = getattr(module, name, None)
    if function is None:
        from remix.config.block import nearest

        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(name, functions) if functions else "it defines no function"
        raise CannotServeError(f"the reward function '{path}': module '{module_name}' has no '{name}'; {hint}")
    if not callable(function):
        raise CannotServeError(
            f"the reward function '{path}' is a {type(function).__name__}, which cannot be called; "
            "name a function of (prompt, response)"
        )
    return function  # type: ignore[no-any-return]


def _module(path: str, name: str) -> Any:
    try:
        return import_module(name)
    except BaseException as error:  # whatever foreign code raises, sys.exit() included
        # A module that is there but imports one that is not would be a misleading "no such module".
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise CannotServeError(
                f"the reward function '{path}': there is no module '{error.name}'; "
                "put its folder on PYTHONPATH, or write the module as Python imports it (my_package.rewards)"
            ) from error
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise CannotServeError(
            f"the reward function '{path}': importing '{name}' raised {_named(error)} "
            f"in {place.filename}, line {place.lineno}; `{sys.executable} -c 'import {name}'` shows the whole of it"
        ) from error


def _prompt(fields: dict[str, Any]) -> Prompt:
    """JSON's lists are a prompt's tuples."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return Prompt(**values)


def _call(path: str, function: Function, prompt: Prompt, response: str) -> list[Any]:
    try:
        value = function(prompt, response)
    except BaseException as error:  # foreign code on model text, sys.exit() included; memory may be there again
        return [
            None,
            f"the reward function {path} raised {_named(error)} on prompt '{shortened(prompt.id)}'; "
            "let it return a value for any text, such as 0.0 for one that it cannot read",
        ]
    number = _finite(value)
    if number is None:
        return [
            None,
            f"the reward function {path} returned {_said(repr, value)} on prompt '{shortened(prompt.id)}'; "
            "it has to return a finite number, such as 0.0 or 1.0",
        ]
    return [number, ""]


def _finite(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except Exception:  # an integer beyond floats, or whatever a foreign number does
        return None
    return number if math.isfinite(number) else None


def _named(error: BaseException) -> str:
    return f"{type(error).__name__} ({_said(str, error)})"


def _said(how: Callable[[object], str], value: object) -> str:
    try:
        return shortened(how(value))
    except Exception:  # foreign code once more
        return f"a {type(value).__name__} that cannot be written out"


if __name__ == "__main__":
    main()
