"""Credentials of the environment and of careless recipes reach no file and no screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from remix import cli, train
from remix.config import RecipeError, dump_recipe, load_recipe, parse_recipe
from remix.secrets import REMOVED, find_secret, redact
from tests.tiny import ROOT, tiny_recipe

TOKEN = "hf_" + "aB3dE5gH" * 4
SECRETS = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_SECRET": "open-sesame-42",
}
FORMS = [
    TOKEN,
    "sk-proj-" + "a1B2c3D4" * 4,
    "ghp_" + "a1B2c3D4" * 5,
    "github_pat_" + "a1B2c3D4" * 5,
    "AKIA" + "ABCD1234" * 2,
    "AIza" + "a1B2c3D" * 5,
    "xoxb-1234567890-abcdef",
]


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return list(SECRETS.values())


# --- finding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", FORMS)
def test_forms(secret: str) -> None:
    assert find_secret(f"a {secret}.", {}) is not None
    assert redact(f"a '{secret}' b", {}) == f"a '{REMOVED}' b"


def test_addresses_and_private_keys() -> None:
    assert redact("git clone https://me:pa55@host.org/x", {}) == f"git clone https://{REMOVED}@host.org/x"
    key = "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----"
    assert redact(f"{key}\nafter", {}) == f"{REMOVED}\nafter"


@pytest.mark.parametrize(
    "text",
    [
        "https://host.org:8080/a@b",
        "task-sk-learn-with-a-long-name-1",
        "shf_" + "a" * 40,
        "916b56a44061fd5cd7d6a8fb632557ed4f724f60",
        "max_tokens: 766",
        "me@host.org",
    ],
)
def test_what_is_none(text: str) -> None:
    assert find_secret(text, {}) is None
    assert redact(text, {}) == text


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "wandb_api_key",
        "MY_SECRET",
        "DB_PASSWORD",
        "KEY",
        "AWS_SECRET_ACCESS_KEY",
        "X_CREDENTIALS",
        "OPENAI_APIKEY",
    ],
)
def test_names_that_say_so(name: str) -> None:
    assert find_secret("x=open-sesame", {name: "open-sesame"}) == f"the value of ${name}"
    assert redact("x=open-sesame;", {name: "open-sesame"}) == f"x={REMOVED};"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "open-sesame"),
        ("HF_TOKEN_PATH", "open-sesame"),
        ("SSH_AUTH_SOCK", "open-sesame"),
        ("MAX_TOKENS", "open-sesame"),
        ("MONKEY", "open-sesame"),
        ("HOME", "open-sesame"),
        ("HF_TOKEN", "short"),
        ("HF_TOKEN", ""),
        ("APPLICATION_CREDENTIALS", str(ROOT)),
    ],
)
def test_names_and_values_that_do_not(name: str, value: str) -> None:
    assert redact(f"open-sesame short {ROOT}", {name: value}) == f"open-sesame short {ROOT}"


def test_of_two_the_longer_goes_first() -> None:
    assert redact("open-sesame-42", {"A_KEY": "open-sesame", "B_KEY": "open-sesame-42"}) == REMOVED


# --- recipes ------------------------------------------------------------------------------------------------------


def said_by(capsys: pytest.CaptureFixture[str], secrets: list[str]) -> str:
    said = capsys.readouterr()
    assert not any(secret in said.out + said.err for secret in secrets)
    return said.err


@pytest.mark.parametrize(
    ("override", "place", "found"),
    [
        ("prompt.system=use open-sesame-42 please", "prompt.system", "the value of $MY_SECRET"),
        (f"model.revision={TOKEN}", "model.revision", "the value of $HF_TOKEN"),
        ("model.path=https://me:pa55word@host/x", "model.path", "a password in an address"),
        (f"tasks.0={{type: jsonl, path: {FORMS[1]}}}", "tasks.0", "an API key"),
        ("open-sesame-42=1", "[secret]", "the value of $MY_SECRET"),
        ("open-sesame-42", "[secret]", "the value of $MY_SECRET"),
    ],
)
def test_an_override_that_holds_one(
    override: str, place: str, found: str, secrets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "recipes/embedded/grpo.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    message = f"override of {place}: holds {found}, and a recipe is copied into logs and checkpoints: take it out"
    assert str(caught.value).startswith(message)
    assert not any(secret in str(caught.value) for secret in [*secrets, "pa55word", FORMS[1]])
    if "=" in override:
        assert cli.main(["plan", recipe, override]) == 2
        assert place in said_by(capsys, [*secrets, "pa55word", FORMS[1]])


def test_a_recipe_that_holds_one(
    tiny_model: Path, tmp_path: Path, secrets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_recipe(tiny_model, tmp_path / "run").model_dump(mode="json")
    plain["prompt"]["system"] = f"token {TOKEN}"
    plain["steps"] = "not a number, which is an error too"
    with pytest.raises(RecipeError, match=r"^recipe: prompt\.system: holds the value of \$HF_TOKEN, .*HF_TOKEN, WANDB"):
        parse_recipe(plain)
    file = tmp_path / "recipe.yaml"
    for text in (f"token: {TOKEN}\nsteps: [1", f"a: b: {TOKEN}", f"{TOKEN}: 1", f"[{TOKEN}"):  # some of them broken
        file.write_text(text)
        assert train.main([str(file)]) == 2
        said_by(capsys, secrets)


def test_words_that_are_refused_are_not_repeated(secrets: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for main, words in ((cli.main, ["plan", f"--token={TOKEN}"]), (train.main, [f"--token={TOKEN}"])):
        with pytest.raises(SystemExit):
            main(words)
        assert "--token=[secret]" in said_by(capsys, secrets)


# --- runs ---------------------------------------------------------------------------------------------------------

REWARDS = """
import os
def calm(prompt, response):
    return float(len(response) % 3)
def angry(prompt, response):
    raise RuntimeError("401 for " + os.environ["HF_TOKEN"] + " " + os.environ["MY_SECRET"])
"""


def everything_in(folder: Path) -> str:
    """All files whole; Parquet, which is compressed, by its columns too."""
    texts = []
    for file in folder.rglob("*"):
        if file.is_file():
            texts += [str(file), file.read_bytes().decode("latin-1")]
            if file.suffix == ".parquet":
                table = pq.read_table(file)
                texts += [str(table.to_pylist()), str(table.schema.metadata)]
    return "\n".join(texts)


def test_runs_and_evaluations_keep_them_to_themselves(tiny_model: Path, tmp_path: Path, secrets: list[str]) -> None:
    (tmp_path / "secret_rewards.py").write_text(REWARDS)
    commands: list[list[str]] = []
    for function in ("calm", "angry"):
        changes = {
            "rewards": [{"type": "python", "function": f"secret_rewards:{function}"}],
            "log": {"completions_every": 1, "trackers": ["tensorboard"]},
        }
        recipe = tiny_recipe(tiny_model, tmp_path / "out" / function, changes)
        (tmp_path / f"{function}.yaml").write_text(dump_recipe(recipe))
        commands.append(["remix.train", str(tmp_path / f"{function}.yaml")])
    evaluation = ["remix.cli", "eval", "--model", str(tiny_model), "--benchmarks", "arithmetic", "--limit", "8"]
    evaluated = tmp_path / "out" / "evaluated"
    commands += [
        [
            *evaluation,
            "--engine",
            "hf",
            "--out",
            str(evaluated),
            "--data-dir",
            f"https://me:{SECRETS['MY_SECRET']}@host",
        ],
        [*evaluation, "--adapter", f"./{TOKEN}"],
    ]
    code = (
        f"from importlib import import_module; commands = {commands!r}; "
        "print([import_module(module).main(words) for module, *words in commands])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "[0, 1, 0, 2]", done.stderr
    assert "raised RuntimeError (401 for [secret] [secret]) on prompt" in done.stderr
    assert f"--adapter ./{REMOVED}: no such directory" in done.stderr
    assert f"--data-dir https://{REMOVED}@host" in (evaluated / "summary.md").read_text()
    written = everything_in(tmp_path / "out")
    for name in (
        "metrics.jsonl",
        "completions.jsonl",
        "state.json",
        "README.md",
        "summary.json",
        "tfevents",
        ".parquet",
    ):
        assert name in written
    for secret in secrets:
        assert secret not in done.stdout + done.stderr
        assert secret not in written


def test_a_trace_keeps_them_to_itself(secrets: list[str]) -> None:
    code = "import os; from remix import cli; cli.main([]); raise KeyError(os.environ['WANDB_API_KEY'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"KeyError: '{REMOVED}'"
    assert not any(secret in done.stdout + done.stderr for secret in secrets)
