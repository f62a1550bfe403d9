"""What the documents say holds: commands exist, their options are spelt right, and the Python of the README runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from l2m_rag import errors
from l2m_rag.cli.main import app
from l2m_rag.config import load_settings

ROOT = Path(errors.__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """Give every `l2m ...` line of a page's blocks and tables, prompts and comments taken off."""
    text = page.read_text()
    for _, block in _BLOCK.findall(text):
        for line in block.splitlines():
            line = line.strip().removeprefix("$ ").split("  #")[0]
            if line.startswith("l2m ") and "[OPTIONS]" not in line:
                yield line
    if page.name != "cli-reference.md":
        yield from (found for found in re.findall(r"`(l2m [^`\n]+)`", _BLOCK.sub("", text)) if "..." not in found)


LINES = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_of_the_documents_is_spelt_right(page: str, line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = shlex.split(re.split(r" [|<>] ", line.replace("\\|", "|"))[0])[1:]
    known = {"--help", "-h"} | {name for option in command.params for name in option.opts}
    for word in words:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
            known |= {name for option in command.params for name in option.opts}
        elif word.startswith("-"):
            assert word.split("=")[0] in known, f"{page}: {line}: no option {word}"
        elif hasattr(command, "commands") and not words[words.index(word) - 1].startswith("-") and word.islower():
            pytest.fail(f"{page}: {line}: no command {word!r}")


def test_the_list_of_commands_is_up_to_date() -> None:
    ran = subprocess.run(
        [Path(sys.executable).parent / "typer", "l2m_rag.cli.main", "utils", "docs", "--name", "l2m"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert ran.stdout.strip() == (ROOT / "docs" / "cli-reference.md").read_text().strip(), "run: make docs"


def test_the_readme_names_the_two_commands_and_the_first_answer_early() -> None:
    head = "\n".join(README.read_text().splitlines()[:40])
    assert "make demo" in head
    assert "make test" in README.read_text()
    assert "l2m ask" in head


def test_links_of_the_documents_lead_somewhere() -> None:
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if not target.startswith(("http", "mailto")) and not (page.parent / target).exists()
    ]
    assert missing == []


@pytest.mark.usefixtures("default_weights")
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    settings = load_settings()[0]
    (code,) = [block for kind, block in _BLOCK.findall(README.read_text()) if kind == "python"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "lease.txt").write_text("The lease of the lighthouse flat ends on 30 April 2029.")
    environment = {**os.environ, "L2M_HOME": str(tmp_path / "home"), "L2M_MODELS": str(settings.data / "models")}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert "2029" in ran.stdout


def test_nothing_names_a_machine_or_a_host() -> None:
    bad = re.compile(r"/work/|/farm/|files\.pythonhosted|pypi\.org/simple")
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT).stdout.split()
    named = [
        name
        for name in tracked
        if name.endswith((".py", ".md", ".toml", "Makefile", "run"))
        and name != "tests/test_docs.py"
        and bad.search((ROOT / name).read_text(errors="replace"))
    ]
    assert named == []
