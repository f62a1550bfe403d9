"""`l2m train`, `l2m eval memory` and `l2m bench memory` as a user meets them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from l2m_rag.cli.main import app

RECIPE = """
[backbone]
dim = 32
n_layers = 2
[model]
depth = 1
segment_length = 8
record_length = 4
window = 2
slots = 4
slot_heads = 2
slot_layers = [1]
slots_written = 2
key_dim = 16
records = 9
recall = 2
hops = 1
budget = 16
ratios = [1, 4]
[task]
pairs = 4
keys = 8
values = 8
[train]
steps = 4
batch = 4
what = "all"
segments = [3]
log_every = 2
"""


def run(*arguments: str, home: Path) -> Result:
    return CliRunner().invoke(app, ["--home", str(home), *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(RECIPE)
    result = run("train", str(folder / "tiny.toml"), "--json", home=folder / "home")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["done"]
    assert found["step"] == 4
    assert found["run"] == str(folder / "home" / "runs" / "tiny")
    assert "step 4" in result.stderr
    return Path(found["run"])


def test_a_run_leaves_what_is_needed(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {"metrics.jsonl", "metrics.png", "model", "recipe.toml", "resume.pt"}


def test_a_finished_run_says_so_at_once(trained: Path) -> None:
    result = run("train", str(trained / "recipe.toml"), "--run", str(trained), home=trained / "home")
    assert result.exit_code == 0
    assert "4 steps" in result.stdout


def test_the_memory_is_measured(trained: Path, tmp_path: Path) -> None:
    options = ["--run", str(trained), "--suite", "recall", "--trials", "8", "--out", str(tmp_path / "report"), "--json"]
    result = run("eval", "memory", *options, home=tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["memory"] for row in found["recall"]] == [True, False]
    assert {row["trials"] for row in found["recall"]} == {8}
    assert json.loads((tmp_path / "report" / "memory.json").read_text()) == found
    table = run("eval", "memory", "--run", str(trained), "--suite", "recall", "--trials", "4", home=tmp_path)
    assert "MEMORY" in table.stdout


def test_the_cost_is_measured(trained: Path, tmp_path: Path) -> None:
    options = ["--run", str(trained), "--lengths", "50,100", "--attention", "16", "--json"]
    result = run("bench", "memory", *options, home=tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["tokens"] for row in found["reading"]] == [50, 100]
    assert found["step"][0]["step_to_backbone"] > 0
    assert found["step"][0]["recalled_positions"] > 0
    assert found["attention"][0]["memory_mb"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["eval", "memory", "--run", "nowhere"], "nowhere"),
        (["eval", "memory", "--suite", "chess"], "--suite has 'chess', which is none of"),
        (["eval", "memory", "--lengths", "many"], "--lengths 'many' must be numbers"),
        (["eval", "memory", "--depths", "-1"], "must not be negative"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*arguments, home=tmp_path)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.strip().count("\n") == 0


def test_a_recipe_with_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(RECIPE + "\nstepz = 3\n")
    result = run("train", str(tmp_path / "bad.toml"), home=tmp_path)
    assert result.exit_code == 2
    assert "train.stepz" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_suite_that_does_not_fit_a_run_is_refused(trained: Path, tmp_path: Path) -> None:
    result = run("eval", "memory", "--run", str(trained), "--suite", "needle", home=tmp_path)
    assert result.exit_code == 2
    assert "need a backbone with a tokenizer" in result.stderr


def test_another_recipe_in_a_runs_folder_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text(RECIPE.replace("steps = 4", "steps = 5"))
    result = run("train", str(tmp_path / "other.toml"), "--run", str(trained), home=tmp_path)
    assert result.exit_code == 1
    assert "another recipe" in result.stderr
