"""The bench of a GPU, tried on a CPU: that it runs from end to end, and its arithmetic by hand."""

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from tests.tiny import ROOT


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "scripts" / "bench_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_it_runs(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--size tiny --responses 12 --prompt 8 --group 2 --prompts 2 --updates 1 --peak-tflops 1"
    bench.main(words.split())
    head, _, *table = capsys.readouterr().out.strip().splitlines()
    assert "no measurement of a GPU" in head
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["all weights", "12"], ["LoRA, rank 16", "12"]]
    for row in rows[2:]:
        seconds, rate = float(row[2]), float(row[3].replace(",", ""))
        assert 48 / rate == pytest.approx(seconds, abs=0.001)  # as far as both are rounded


def test_operations_by_hand(bench: ModuleType) -> None:
    """A prompt of 3 with two responses of 3, of which 2 tokens are read: L = 3 + 2·2 = 7, N = 6; places see 1 + 2 + 3
    in the prompt, 4 + 5 in each response: 24 pairs. One block of widths 4 (2 heads, 1 of keys) and 8: B = 2·16 + 2·8
    + 3·32 = 144; head 4 x 10. Forward 2·(7·144 + 6·40) + 4·4·24 = 2,496 + 384; three times that with the backward."""
    size: dict[str, Any] = {
        "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 10,
    }  # fmt: skip
    done = bench.work(1, 3, 2, 3)
    assert (done.places, done.trained, done.pairs) == (7, 6, 24)
    assert bench.operations(done, size, 0) == 3 * (2496 + 384)
    # A LoRA of 20 parameters: 2·7·20 = 280 forward, twice that backward; frozen matrices once forward, once backward.
    assert bench.operations(done, size, 20) == 2 * 2496 + 3 * (384 + 280)


def test_peaks(bench: ModuleType) -> None:
    assert bench.peak_tflops("NVIDIA H100 80GB HBM3", None) == 989.0
    assert bench.peak_tflops("NVIDIA A100-SXM4-80GB", None) == 312.0
    assert bench.peak_tflops("NVIDIA L40S", None) == 362.0
    assert bench.peak_tflops("NVIDIA H100 80GB HBM3", 800.0) == 800.0
    assert bench.peak_tflops(None, None) is None
    with pytest.raises(ValueError, match="--peak-tflops"):
        bench.peak_tflops("Some GPU", None)
