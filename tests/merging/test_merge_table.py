"""The table of merge methods, and what is refused before anything is merged."""

import inspect
import math

import pytest

from remix.merging.methods import METHODS, check_request, find_method

SPEC = (
    "linear task_arithmetic ties dare_linear dare_ties della magmax slerp karcher model_stock fisher regmean tall "
    "consensus pam"
)


def test_every_method_is_there_under_its_name():
    assert " ".join(METHODS) == SPEC
    for name, method in METHODS.items():
        assert method.function.__name__ == name
        assert find_method(name) is method


@pytest.mark.parametrize("name", METHODS)
def test_the_table_says_what_the_function_takes(name):
    method = METHODS[name]
    keywords = {
        key: parameter.default
        for key, parameter in inspect.signature(method.function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    supplied = {"seeds"} if method.random else set()
    supplied |= {f"{method.statistics}s"} if method.statistics else set()
    supplied |= {"keeps"} if method.trims else set()
    assert keywords.keys() == method.parameters.keys() | supplied
    for key, parameter in method.parameters.items():
        assert parameter.default == keywords[key]
        assert parameter.accepts(parameter.default)
        assert parameter.meaning
        assert parameter.valid
    assert method.summary
    identifier = method.paper.rpartition(", ")[2]
    assert identifier.removeprefix("arXiv ").split()[0] in inspect.getdoc(method.function) or "arXiv" not in identifier


def test_only_pam_is_ordered_and_only_drops_are_random():
    assert [name for name, method in METHODS.items() if method.ordered] == ["pam"]
    assert [name for name, method in METHODS.items() if method.random] == ["dare_linear", "dare_ties", "della"]
    assert {name: method.statistics for name, method in METHODS.items() if method.statistics} == {
        "fisher": "fisher",
        "regmean": "gram",
    }


def test_an_unknown_name_meets_the_nearest():
    with pytest.raises(ValueError, match=r"no merge method 'tise'; did you mean 'ties'\? All: linear, .*, pam"):
        find_method("tise")
    with pytest.raises(ValueError, match=r"no merge method 'zzz'; choose from linear, "):
        find_method("zzz")


def test_a_good_request_has_its_defaults_filled_in():
    assert check_request("ties", parents=2, weights=[1, 0], parameters={"density": 1}) == {
        "density": 1,
        "elect": "total",
        "elect_weighted": False,
        "mean": "count",
        "scale": 1.0,
    }
    assert check_request("magmax", parents=3, weights=[0, 0, -1], parameters={}) == {}
    assert check_request("slerp", parents=2, weights=[1, 0], parameters={"origin": "zero"})["threshold"] == 0.9995
    assert check_request("linear", parents=2, weights=[1, -1], parameters={"normalize": False}) == {"normalize": False}
    assert check_request("consensus", parents=2, weights=[1, 1], parameters={"k": 2})["k"] == 2


@pytest.mark.parametrize(
    ("name", "weights", "parameters", "said"),
    [
        ("tiez", [1, 1], {}, "did you mean 'ties'"),
        ("slerp", [1, 1, 1], {}, "slerp merges exactly 2 models or adapters, not 3"),
        ("slerp", [1], {}, "exactly 2 models or adapters, not 1"),
        ("model_stock", [1], {}, "at least 2 models or adapters, not 1"),
        ("ties", [], {}, "at least 1 models or adapters, not 0"),
        (
            "ties",
            [1, 1],
            {"densty": 0.5},
            "no parameter 'densty'; did you mean density.* its parameters: density, elect",
        ),
        ("ties", [1, 1], {"xyz": 0.5}, "no parameter 'xyz'; its parameters: density"),
        ("magmax", [1, 1], {"density": 0.5}, "no parameter 'density'; its parameters: none"),
        ("ties", [1, 1], {"density": 1.5}, "density is 1.5, but must be a number from 0 to 1"),
        ("ties", [1, 1], {"density": math.nan}, "density is nan, but must be"),
        ("ties", [1, 1], {"density": "0.5"}, "density is '0.5', but must be"),
        ("ties", [1, 1], {"density": True}, "density is True, but must be"),
        ("ties", [1, 1], {"elect": "most"}, "elect is 'most', but must be one of total, frequency"),
        ("ties", [1, 1], {"elect_weighted": 1}, "elect_weighted is 1, but must be true or false"),
        ("ties", [1, 1], {"scale": math.inf}, "scale is inf, but must be a number"),
        ("regmean", [1, 1], {"ridge": 0}, "ridge is 0, but must be a number from 1e-12"),
        ("karcher", [1, 1], {"iterations": 0}, "iterations is 0, but must be a whole number from 1"),
        ("karcher", [1, 1], {"iterations": 2.0}, "iterations is 2.0, but must be a whole number"),
        ("tall", [1, 1], {"task": True}, "task is True, but must be a whole number"),
        ("tall", [1, 1], {"task": 2}, "task is 2, but of 2 parents it is at most 1"),
        ("consensus", [1, 1], {"k": 3}, "k is 3, but of 2 parents it is at most 2"),
        ("ties", [1, math.inf], {}, "are not finite"),
        ("linear", [1, -1], {}, "shares of a mean here; give none below 0 and one above"),
        ("karcher", [0, 0], {}, "shares of a mean"),
    ],
)
def test_what_cannot_be_merged_is_said_at_once(name, weights, parameters, said):
    with pytest.raises(ValueError, match=said) as raised:
        check_request(name, parents=len(weights), weights=weights, parameters=parameters)
    assert "\n" not in str(raised.value)


def test_each_parent_has_a_weight():
    with pytest.raises(ValueError, match="2 weights for 3 models or adapters; give one to each"):
        check_request("ties", parents=3, weights=[1, 1], parameters={})
