"""Continual learning on the embedded vision-language model, as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from remix.cli import main
from remix.evaluation.continual import read_record
from remix.tasks.images import open_image
from tests.tiny import EMBEDDED, ROOT

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]


@pytest.mark.slow
def test_two_tasks_by_reinforcement_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["continual.order=[where,colour]", f"run_dir={tmp_path}", "steps=6", "phases.0.until.0.after=3"]
    words += ["batch.prompts=24", "eval.prompts=64"]
    recipe = "recipes/embedded/continual_shapes.yaml"
    done = subprocess.run(
        [*LAUNCH, "-m", "remix.train", recipe, *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_record(tmp_path)
    assert record.order == ["where", "colour"]
    for row in record.learnt:
        assert row.own[row.task] > record.base[row.task] + 0.1  # it has learnt, whatever merging left of it
    assert main(["continual", "report", str(tmp_path)]) == 0
    assert "where" in capsys.readouterr().out
    assert (tmp_path / "continual.png").stat().st_size > 10_000

    # What is left behind is a standard adapter beside its processor.
    base = AutoModelForImageTextToText.from_pretrained(EMBEDDED / "shapes_base")
    model = PeftModel.from_pretrained(base, tmp_path / "final").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "final")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(text=[text], images=[open_image("shapes:colour/test/0/1")], return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(answer, skip_special_tokens=True).split()
