"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from remix import cli

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/r1_distill_qwen_1.5b/remix_ppo.yaml"


def remix(*args: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "remix.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})})


@pytest.fixture
def beside_fake_trainer(tmp_path: Path) -> Path:
    """A folder to run in, where `remix.train` reports how it was called and exits with $EXIT."""
    package = tmp_path / "fake" / "remix"
    package.mkdir(parents=True)
    # The real package but for this one module.
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'remix')!r})\n")
    report = """
        import json, os, sys
        names = ["ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"]
        print(json.dumps({"args": sys.argv[1:], **{name: os.environ.get(name) for name in names}}))
        sys.exit(int(os.environ.get("EXIT", "0")))
    """
    (package / "train.py").write_text(textwrap.dedent(report))
    return package.parent


# --- help, version, mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["plan", "--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["merge", "--help"],
        ["watch", "--help"],
        ["schema", "--help"],
        ["plan", str(RECIPE)],
    ],
)
def test_quick_commands_import_nothing_heavy(args: list[str]) -> None:
    script = f"""
        import sys
        from remix import cli
        try:
            cli.main({args!r})
        except SystemExit:
            pass
        heavy = {{"torch", "transformers", "accelerate", "datasets", "vllm", "peft"}} & set(sys.modules)
        sys.exit(f"imported: {{heavy}}" if heavy else 0)
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    print(f"remix {' '.join(args)}: {time.perf_counter() - start:.2f} s")
    assert done.returncode == 0, done.stderr
    assert "usage: remix" in done.stdout or "fresh rollouts" in done.stdout


def test_version_and_no_command() -> None:
    assert remix("--version").stdout.startswith("remix 0.")
    done = remix()
    assert done.returncode == 0
    assert "train" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan"], "name a recipe"),
        (["plan", "nope.yaml"], "nope.yaml: no such recipe"),
        (["plan", str(RECIPE), "btch.prompts=3"], "unknown key 'btch'; did you mean 'batch'"),
        (["plan", str(RECIPE), "--processes", "0"], "--processes must be a whole number from 1, not 0"),
        (["plan", str(RECIPE), "batch.tokens_per_microbatch=100"], "cannot hold one longest sequence of 8958"),
        (["train"], "or a run to go on with: --resume RUN_DIR"),
        (["train", str(RECIPE), "rollout.max_tokens=x"], "rollout.max_tokens: "),
        (["train", "--resume", "/no/such/run"], "--resume /no/such/run: no run there"),
        (["train", "--resume", "auto"], "--resume auto needs the recipe"),
        (["train", str(RECIPE), "--config_file", "nope.yaml"], "--config_file nope.yaml: no such file"),
    ],
)
def test_mistakes_are_one_clear_error(args: list[str], message: str) -> None:
    done = remix(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_is_refused() -> None:
    done = remix("plan", str(RECIPE), "--jsn")
    assert done.returncode == 2
    assert "unrecognized arguments: --jsn" in done.stderr


# --- plan ---------------------------------------------------------------------------------------------------------


def test_plan_prints_the_numbers() -> None:
    done = remix("plan", str(RECIPE), "steps=200", env={"COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for text in ("mix_policy", "154", "41,102", "1.78 B"):  # 256 + 99 x 154 + 100 x 256
        assert text in done.stdout


def test_plan_as_json_with_options_and_overrides_in_any_order() -> None:
    plan = json.loads(
        remix("plan", str(RECIPE), "steps=200", "--json", "batch.minibatches=2", "--processes", "4").stdout
    )
    assert plan["rollouts"] == {"low": 41102, "high": 41102}
    assert plan["world_size"] == 4
    assert plan["phases"][0]["rollouts_per_process"] == 32  # 256 / 2 minibatches / 4


# --- train --------------------------------------------------------------------------------------------------------


ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_train_launches_the_trainer(beside_fake_trainer: Path) -> None:
    run_dir = beside_fake_trainer / "runs" / "x"
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(RECIPE.read_text())
    args = ["train", str(RECIPE), "steps=200", "--resume", "runs/x", "seed=3", "--allow-changed"]
    done = remix(*args, cwd=beside_fake_trainer, env=ONE_THREAD)
    assert (done.returncode, done.stderr) == (0, "")
    called = json.loads(done.stdout)
    assert called.pop("args") == [str(RECIPE), "steps=200", "seed=3", "--resume", "runs/x", "--allow-changed"]
    assert called == {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("name", "cpu"), [("cpu", "True"), ("single_gpu", "False")])
def test_resume_takes_the_runs_own_recipe_and_a_configuration(
    beside_fake_trainer: Path, tmp_path: Path, name: str, cpu: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.read_text())
    hardware = str(ROOT / f"recipes/accelerate/{name}.yaml")
    args = ["train", "--config_file", hardware, "--resume", str(tmp_path), "max_steps=7"]
    done = remix(*args, cwd=beside_fake_trainer, env=ONE_THREAD)
    assert (done.returncode, done.stderr) == (0, "")
    called = json.loads(done.stdout)
    assert called["args"] == [str(tmp_path / "recipe.yaml"), "max_steps=7", "--resume", str(tmp_path)]
    assert called["ACCELERATE_USE_CPU"] == cpu


def test_a_failed_run_fails_the_command_without_the_launchers_trace(beside_fake_trainer: Path) -> None:
    done = remix("train", str(RECIPE), cwd=beside_fake_trainer, env={**ONE_THREAD, "EXIT": "3"})
    assert done.returncode == 1  # accelerate makes every failure a 1
    assert done.stderr == ""


# --- parts --------------------------------------------------------------------------------------------------------


def test_threads() -> None:
    assert cli.threads({"OMP_NUM_THREADS": "5"}, 1) == {}
    assert cli.threads({}, 10**6) == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    assert cli.threads({"OMP_WAIT_POLICY": "ACTIVE"}, 1)["OMP_WAIT_POLICY"] == "ACTIVE"
    assert 1 <= int(cli.threads({}, 1)["OMP_NUM_THREADS"]) <= cli.MOST_THREADS


def test_has_gpu(tmp_path: Path) -> None:
    assert not cli.has_gpu({}, tmp_path)
    (tmp_path / "nvidia0").touch()
    assert cli.has_gpu({}, tmp_path)
    assert not cli.has_gpu({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)


def test_the_launcher_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu in (True, False):
        monkeypatch.setattr(cli, "has_gpu", lambda _, gpu=gpu: gpu)
        command = cli._launcher(None)
        assert command[:2] == [sys.executable, "-c"]
        assert ("--cpu" in command) is not gpu


def test_exit_codes_pass_through() -> None:
    for code in (0, 3):
        assert cli.run_in_front([sys.executable, "-c", f"raise SystemExit({code})"], os.environ) == code
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert cli.run_in_front([sys.executable, "-c", killed], os.environ) == 128 + 9


def test_an_interrupt_reaches_the_trainer_once_and_is_waited_for(tmp_path: Path) -> None:
    """A launcher that dies of Ctrl-C at once, and its trainer, which first saves for half a second."""
    log = tmp_path / "log"
    trainer = tmp_path / "trainer.py"
    trainer.write_text(
        textwrap.dedent(
            f"""
            import signal, time

            def save(*_):
                write("interrupt")

            def write(word):
                with open({str(log)!r}, "a") as file:
                    file.write(word + "\\n")

            signal.signal(signal.SIGINT, save)
            write("ready")
            time.sleep(0.2)
            while open({str(log)!r}).read().count("interrupt") < 1:
                time.sleep(0.02)
            time.sleep(0.5)
            write("saved")
            """
        )
    )
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, {str(trainer)!r}]).wait()"
    front = f"""
        import os, sys
        from remix.cli import run_in_front
        sys.exit(run_in_front([sys.executable, "-c", {launcher!r}], os.environ))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(front)], stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 128 + signal.SIGINT
    assert log.read_text().split() == ["ready", "interrupt", "saved"]
