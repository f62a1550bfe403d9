"""Question sets: every usual shape of a line is read, and a bad one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l2m_rag import tasks
from l2m_rag.errors import UsageError

DATA = Path(tasks.__file__).resolve().parents[2] / "shared" / "data"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_come_as_strings_or_as_objects_and_repeat_once(tmp_path: Path) -> None:
    file = write(
        tmp_path / "q.jsonl",
        {"question": "Who?", "answers": ["Ada", "Ada", "Lovelace"], "document": "a.txt"},
        {"text": "Where?", "answers": [{"text": "London", "start": 3}], "context": "In London."},
        {"id": "x", "question": "Why?", "answers": ["never"], "is_impossible": True, "context": "In London."},
    )
    found = tasks.load_file(file)
    assert [task.answers for task in found.tasks] == [("Ada", "Lovelace"), ("London",), ()]
    assert [task.id for task in found.tasks] == ["1", "2", "x"]
    assert [task.answerable for task in found.tasks] == [True, True, False]
    assert found.tasks[0].document == "a.txt"
    assert found.documents == {found.tasks[1].document: "In London."}
    assert found.tasks[1].document == found.tasks[2].document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: must be a JSON object"),
        ('{"answers": []}', 'line 1: must be an object with a string "question"'),
        ("", "holds no question"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        tasks.load_file(tmp_path / "q.jsonl")


def test_a_set_that_is_not_known_or_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="known: xquad"):
        tasks.load_set("nothing", tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        tasks.load_set("xquad", tmp_path)
    with pytest.raises(UsageError, match="--data"):
        tasks.data_folder(tmp_path / "nowhere")


def test_what_is_made_here_needs_no_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(tasks.DATA, raising=False)
    found = tasks.load_set("notices")
    assert {task.document for task in found.tasks} == set(found.documents)
    assert {task.answerable for task in found.tasks} == {True, False}
    with pytest.raises(UsageError, match="--data"):
        tasks.load_set("xquad")


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside this checkout")
@pytest.mark.parametrize("name", tasks.SETS)
def test_every_set_that_is_there_names_documents_that_hold_its_answers(name: str) -> None:
    files = tasks.SETS[name]
    if not all((DATA / file).is_file() for file in (*files.questions, *files.documents, *files.distractors)):
        pytest.skip(f"{name} is not there")
    found = tasks.load_set(name, DATA)
    assert {task.document for task in found.tasks} <= set(found.documents)
    asked = [task for task in found.tasks if task.answerable and task.answers]
    holds = sum(any(answer in found.documents[task.document] for answer in task.answers) for task in asked)
    # the answers of some sets are written by people, not cut out of the passage
    written = {"clapnq": 0.0, "boolq": 0.0, "fairytaleqa": 0.4, "tweetqa": 0.5, "ropes": 0.8, "hotpotqa": 0.95}
    assert holds >= written.get(name, 0.99) * len(asked)
    assert len({task.id for task in found.tasks}) >= len(found.tasks) - (name == "tweetqa")  # has one id twice


def test_the_parts_of_long_documents_are_of_the_sizes_that_are_told() -> None:
    parts = [tasks.part_of(f"document {number}") for number in range(2000)]
    assert 0.76 < parts.count("train") / 2000 < 0.84
    assert 0.07 < parts.count("evaluation") / 2000 < 0.13
    assert set(parts) == {"train", "validation", "evaluation"}


@pytest.mark.skipif(not (DATA / "squad_subset").is_dir(), reason="the data sets are not beside this checkout")
def test_xquad_stands_among_7430_passages() -> None:
    found = tasks.load_set("xquad", DATA)
    assert (len(found.documents), len(found.tasks)) == (7430, 1190)
