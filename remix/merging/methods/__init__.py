"""Merge methods: pure functions of one tensor, `(base, task_vectors, weights, **parameters) -> merged`.

`arithmetic` sums and votes, `means` takes means on spheres and by statistics, `masks` tells whose an entry is.
"""

from remix.merging.methods.arithmetic import dare_linear, dare_ties, della, linear, magmax, task_arithmetic, ties
from remix.merging.methods.masks import (
    align,
    consensus,
    important_entries,
    misaligned_fraction,
    pam,
    put_back,
    tall,
    tall_mask,
    turned_entries,
)
from remix.merging.methods.means import fisher, karcher, model_stock, regmean, slerp
from remix.merging.methods.table import METHODS, Method, Parameter, check_request, find_method
from remix.merging.methods.tensors import task_seed

__all__ = [
    "METHODS",
    "Method",
    "Parameter",
    "align",
    "check_request",
    "consensus",
    "dare_linear",
    "dare_ties",
    "della",
    "find_method",
    "fisher",
    "important_entries",
    "karcher",
    "linear",
    "magmax",
    "misaligned_fraction",
    "model_stock",
    "pam",
    "put_back",
    "regmean",
    "slerp",
    "tall",
    "tall_mask",
    "task_arithmetic",
    "task_seed",
    "ties",
    "turned_entries",
]
