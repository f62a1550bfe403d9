"""Notebooks: the .py is the source, it runs as it stands, and the .ipynb beside it says the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from l2m_rag import errors

ROOT = Path(errors.__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.usefixtures("default_weights")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(source: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(source)], capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ)
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_pair_says_the_same(source: Path) -> None:
    ours, theirs = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in ours.cells] == [
        (cell.cell_type, cell.source) for cell in theirs.cells
    ], "run: make notebooks"
