"""The packaging: one import root whatever the folders are called, links that point home, and light imports."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import l2m_rag
from l2m_rag import errors

ROOT = Path(errors.__file__).parents[1]
FOLDERS = ("memory_tiers", "indexers", "cli")


@pytest.mark.parametrize("name", l2m_rag.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(l2m_rag, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        l2m_rag.nothing_like_this  # noqa: B018


def test_every_folder_with_modules_is_a_listed_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"l2m_rag"}
    for folder in (ROOT / "l2m_rag", *(ROOT / name for name in FOLDERS)):
        base = "l2m_rag" if folder.name == "l2m_rag" else f"l2m_rag.{folder.name}"
        found |= {base} | {
            f"{base}.{path.parent.relative_to(folder)}".replace(os.sep, ".")
            for path in folder.rglob("__init__.py")
            if path.parent != folder and not any(part.is_symlink() for part in path.parents if part != ROOT)
        }
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_links_show_the_folders_under_the_import_root(name: str) -> None:
    link = ROOT / "l2m_rag" / name
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert os.readlink(link) == f"../{name}"
    module = importlib.import_module(f"l2m_rag.{name}")
    assert Path(str(module.__file__)).resolve().parent == ROOT / name


@pytest.mark.parametrize("module", ["l2m_rag", "l2m_rag.cli.main"])
def test_importing_it_is_light(module: str) -> None:
    heavy = "torch transformers sentence_transformers lancedb faiss numpy pyarrow fastapi mcp"
    code = f"import sys, {module}; print(*sorted(set('{heavy}'.split()) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == []


def test_a_folder_of_the_user_called_cli_or_indexers_does_no_harm(tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the folder of the user was imported')")
    code = "import l2m_rag.cli.main, l2m_rag.indexers.chunking, l2m_rag.memory_tiers.records; print('fine')"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ)
    )
    assert ran.stdout == "fine\n", ran.stderr


def test_nothing_is_loaded_that_could_run_code() -> None:
    """No pickle, no joblib, no eval, no torch.load without weights_only, anywhere in the library."""
    bad = re.compile(
        r"\b(?:pickle|joblib|dill|cloudpickle)\b|(?<![\w.])eval\(|yaml\.load\(|torch\.load\((?!.*weights_only)"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in (ROOT / "l2m_rag", *(ROOT / name for name in FOLDERS))
        for path in folder.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bad.search(line)
    ]
    assert found == []
