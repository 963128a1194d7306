"""Merge methods: pure functions of one tensor, `(base, task_vectors, weights, **parameters) -> merged`, and their table."""

from remix.merging.methods.arithmetic import linear, task_arithmetic, ties
from remix.merging.methods.table import METHODS, Method, Parameter, check_request, find_method
from remix.merging.methods.tensors import task_seed

__all__ = [
    "METHODS",
    "Method",
    "Parameter",
    "check_request",
    "find_method",
    "linear",
    "task_arithmetic",
    "task_seed",
    "ties",
]
