"""The benchmarks of an evaluation, by name.

A definition and its problems belong to the tasks, since training sets leave out the problems of benchmarks.
"""

from remix.tasks.benchmark import (
    Benchmark,
    ExactMatchGrader,
    MathGrader,
    benchmark_names,
    definitions_dir,
    load_benchmarks,
    load_definition,
    suites,
)
from remix.tasks.problems import Problems, load_problems

__all__ = [
    "Benchmark",
    "ExactMatchGrader",
    "MathGrader",
    "Problems",
    "benchmark_names",
    "definitions_dir",
    "load_benchmarks",
    "load_definition",
    "load_problems",
    "suites",
]
