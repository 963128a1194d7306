"""What is imported for good is passed over by the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from remix.imports import lasting

IN_A_PROCESS = """
import gc
from remix.imports import lasting
with lasting():
    assert not gc.isenabled()
    import torch
assert gc.isenabled() and gc.get_freeze_count() > 100_000
count = gc.get_freeze_count()
garbage = []; garbage.append(garbage); del garbage
assert gc.collect() > 0
with lasting():
    import torch
assert gc.get_freeze_count() <= count
"""


def test_what_was_imported_is_not_looked_through_and_garbage_still_is() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_import_that_fails_leaves_the_collector_as_it_was() -> None:
    was = gc.isenabled()
    with pytest.raises(ModuleNotFoundError), lasting():
        import no_such_module  # noqa: F401
    assert gc.isenabled() == was
