"""Bad input and bad surroundings, against the program as a process: one clear line, the right exit code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import l2m_rag.config
from l2m_rag.cli.main import app
from l2m_rag.memory_tiers.disk import digest
from l2m_rag.memory_tiers.places import writing

ROOT = Path(l2m_rag.config.__file__).parents[1]
MAIN = "import sys; sys.argv[0] = 'l2m'; from l2m_rag.cli.main import main; main()"
MEGABYTE = 1 << 20

# A library whose ingest makes a file `ready` and then does {body}.
SLOW = """
import pathlib, sys, time, types
def ingest(*paths, **options):
    pathlib.Path("ready").touch()
    {body}
library = types.ModuleType("l2m_rag.collection")
library.open = lambda name, settings: types.SimpleNamespace(ingest=ingest)
import l2m_rag
sys.modules["l2m_rag.collection"] = l2m_rag.collection = library
sys.argv[0] = "l2m"
from l2m_rag.cli.main import main
main()
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("L2M_")}
    return {
        **clean,
        "PYTHONPATH": str(ROOT),
        "L2M_HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path),
    }


@pytest.fixture
def l2m(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Runs the program in a folder of the test."""

    def run(*args: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", MAIN, *args],
            env={**environment, **variables},
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
        )

    return run


def one_line(ran: subprocess.CompletedProcess[str], code: int) -> str:
    """Give the error of a run that must have exited with `code`, printed no result, and said one line."""
    assert (ran.returncode, ran.stdout) == (code, ""), ran.stderr
    assert ran.stderr.startswith("l2m: ")
    assert ran.stderr.count("\n") == 1
    return ran.stderr[5:-1]


@pytest.mark.parametrize("path", ["nowhere", "file.txt/below", "x" * 5000, "", "loop", "dangling", "a\x1b[2Jb"])
def test_a_path_with_nothing_at_it_is_named_and_nothing_is_made(l2m: Run, tmp_path: Path, path: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("gone")
    error = one_line(l2m("ingest", "file.txt", path), 1)
    assert error.startswith(("no such file or folder: ", "cannot read "))
    assert path.replace("\x1b", "␛") in error
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("option", ["--queries", "--questions", "--file"])
def test_an_input_file_that_is_not_there_is_named(l2m: Run, option: str) -> None:
    args = {"--queries": ["search"], "--questions": ["ask"], "--file": ["ask", "Who?"]}[option]
    assert one_line(l2m(*args, option, "gone.jsonl"), 1) == "no such file or folder: gone.jsonl"


def test_a_folder_as_a_file_of_questions_is_a_clear_error(l2m: Run, tmp_path: Path) -> None:
    assert one_line(l2m("ask", "--questions", str(tmp_path)), 1) == f"Is a directory: {tmp_path}"


@pytest.mark.parametrize("command", ["ask", "search"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " is empty"),
        (" \n\t ", " is empty"),
        ("?!... --", " has no letter and no digit: '?!... --'"),
        ("\U0001f389", " has no letter and no digit: '\U0001f389'"),
    ],
)
def test_a_question_without_words_is_refused(l2m: Run, command: str, text: str, message: str) -> None:
    what = "question" if command == "ask" else "query"
    assert one_line(l2m(command, "--", text), 2) == f"the {what}{message}"
    assert one_line(l2m(command, "-", stdin=text), 2) == f"the {what}{message}"


def test_a_question_of_a_megabyte_is_refused_with_the_limit(l2m: Run, tmp_path: Path) -> None:
    long = "why " * (MEGABYTE // 4)
    limit = "the question has more than 100,000 characters, which is the limit"
    assert one_line(l2m("ask", "-", stdin=long), 2) == limit
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": 1, "text": long}))
    assert one_line(l2m("ask", "--questions", "q.jsonl"), 2) == f"q.jsonl, line 1: {limit}"


def test_endless_input_is_not_read_to_its_end(environment: dict[str, str]) -> None:
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        ran = subprocess.run(
            [sys.executable, "-c", MAIN, "ask", "-"],
            env=environment,
            stdin=endless.stdout,
            capture_output=True,
            text=True,
            timeout=60,
        )
        endless.kill()
    assert "100,000" in one_line(ran, 2)


@pytest.mark.parametrize(
    "text", ['C++ ("x', "SELECT * FROM x; --", "a AND (b", "'", '"', "*x", "näive 漢字 \u202e", "\udcff x"]
)
def test_words_with_signs_reach_the_library(l2m: Run, text: str) -> None:
    ran = l2m("search", "--", text)
    assert ran.returncode == (10 if any(map(str.isalnum, text)) else 2)
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["text"]', 'must be an object with a string "text"'),
        ('{"id": 1}', 'must be an object with a string "text"'),
        ('{"text": 1}', 'must be an object with a string "text"'),
        ('{"text": "x", "id": NaN}', "not valid JSON (NaN is not JSON)"),
        ('{"text": " "}', "the question is empty"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_its_number(l2m: Run, tmp_path: Path, line: str, message: str) -> None:
    lines = '\ufeff{"text": "good"}\n\n' + line + "\n"
    (tmp_path / "q.jsonl").write_bytes(lines.encode("utf-8", "surrogateescape"))
    assert one_line(l2m("ask", "--questions", "q.jsonl"), 2).startswith(f"q.jsonl, line 3: {message}")
    without_mark = lines.removeprefix("\ufeff")
    assert one_line(l2m("ask", "--questions", "-", stdin=without_mark), 2).startswith("standard input, line 3: ")


def test_broken_settings_are_one_line(l2m: Run, tmp_path: Path) -> None:
    assert "L2M_WORKERS: workers ('x')" in one_line(l2m("search", "x", L2M_WORKERS="x"), 2)
    (tmp_path / "l2m.toml").write_text("wrokers = 1\n")
    assert "l2m.toml: unknown setting 'wrokers'; did you mean 'workers'?" in one_line(l2m("search", "x"), 2)


def test_an_error_with_json_is_one_json_line_more(l2m: Run) -> None:
    ran = l2m("ingest", "nowhere", "--json")
    text, as_json = ran.stderr.splitlines()
    assert json.loads(as_json) == {
        "message_type": "exit_error",
        "code": 1,
        "message": text.removeprefix("l2m: "),
    }


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_leaves_ends_the_program_quietly(environment: dict[str, str], buffered: str) -> None:
    for args in (["config", "show"], ["--help"], ["ask", "--help"]):
        read, write = os.pipe()
        os.close(read)
        env = {**environment, "PYTHONUNBUFFERED": buffered}
        ran = subprocess.run([sys.executable, "-c", MAIN, *args], env=env, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_that_cannot_be_written_is_an_error(environment: dict[str, str], buffered: str) -> None:
    env = {**environment, "PYTHONUNBUFFERED": buffered}
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-c", MAIN, "config", "show"], env=env, stdout=full, stderr=subprocess.PIPE
        )
    assert (ran.returncode, ran.stderr.count(b"\n")) == (1, 1)
    assert ran.stderr.startswith(b"l2m: disk is full")


def test_closed_output_is_no_reason_to_fail(environment: dict[str, str]) -> None:
    for closed in (">&-", "2>&-", "<&-"):
        command = f'exec "{sys.executable}" -c "{MAIN}" config show {closed}'
        ran = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, check=False)
        assert (ran.returncode, ran.stderr) == (0, b""), closed


def test_a_terminal_that_lacks_characters_gets_others(l2m: Run, tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    assert one_line(l2m("ingest", "näive-漢字", **plain), 1).startswith("no such file or folder: n")


def start(environment: dict[str, str], tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Start an ingest that is busy with `body`, and wait until it is."""
    (tmp_path / "a.txt").write_text("x")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(body=body), "ingest", "a.txt"],
        env={**environment, "L2M_EMBEDDER": "none"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "ready")
    return process


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "l2m: interrupted; nothing is lost, run the same command again to go on\n"),
        (
            signal.SIGTERM,
            143,
            "l2m: ended by SIGTERM; nothing is lost, run the same command again to go on\n",
        ),
    ],
)
def test_a_signal_ends_the_program_cleanly(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals, code: int, line: str
) -> None:
    process = start(environment, tmp_path, "time.sleep(60)")
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", line)
    assert process.returncode == code


def test_the_library_can_finish_its_batch_and_a_second_interrupt_ends_at_once(
    environment: dict[str, str], tmp_path: Path
) -> None:
    body = """
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pathlib.Path("finishing").touch()
        time.sleep(60)
        raise
    """
    process = start(environment, tmp_path, body)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "finishing")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT  # a shell says 130
    assert time.monotonic() - began < 5
    process.communicate()


def test_a_full_disk_under_the_library_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    process = start(environment, tmp_path, "raise RuntimeError('lance error: LanceError(IO): No space (os error 28)')")
    _, error = process.communicate(timeout=20)
    assert process.returncode == 1
    assert error == "l2m: disk is full: free some space; nothing is lost, run the same command again\n"


def test_what_the_library_logs_and_warns_of_stays_out_of_the_way(environment: dict[str, str], tmp_path: Path) -> None:
    body = """
    import logging, warnings
    warnings.warn("of no use to anyone")
    logging.getLogger("pypdf").warning("incorrect startxref pointer")
    logging.getLogger("l2m_rag.collection").warning("the index of %s was damaged", "a\x1b[2J.pdf")
    raise KeyboardInterrupt
    """
    _, error = start(environment, tmp_path, body).communicate(timeout=20)
    assert error.splitlines()[0] == "l2m: the index of a␛[2J.pdf was damaged"
    assert error.count("\n") == 2


# -- with the library itself


@pytest.fixture
def inside(tmp_path: Path, embedder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command in this process, over the library and a small embedder."""
    monkeypatch.setenv("L2M_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("L2M_EMBEDDER", str(embedder))
    monkeypatch.setenv("L2M_CHUNK_SIZE", "64")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Result:
        return CliRunner().invoke(app, list(args), prog_name="l2m")

    return run


def report(result: Result, code: int) -> dict[str, Any]:
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_folder_is_ingested_searched_and_forgotten(inside: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("The lease ends on 30 April 2029.")
    (tmp_path / "docs" / "b.pdf").write_bytes(b"")
    first = report(inside("ingest", "docs", "-c", "x", "--json"), 3)
    assert (first["added"], [failure["reason"] for failure in first["failed"]]) == (1, ["empty"])
    again = report(inside("ingest", "docs", "-c", "x", "--json"), 3)
    assert (again["added"], again["unchanged"]) == (0, 1)
    hit = report(inside("search", "lease", "-c", "x", "--json"), 0)["hits"][0]
    assert (hit["document"], hit["text"]) == ("a.txt", "The lease ends on 30 April 2029.")
    assert report(inside("collections", "list", "--json"), 0)["collections"][0]["name"] == "x"
    assert report(inside("collections", "verify", "x", "--json"), 0)["ok"]
    inside("collections", "rename", "x", "y")
    assert inside("search", "lease", "-c", "x").exit_code == 10
    assert inside("collections", "export", "y", "y.l2m").exit_code == 0
    assert report(inside("collections", "import", "y.l2m", "z", "--json"), 0)["chunks"] == 1
    assert inside("collections", "delete", "y", "--yes").exit_code == 0
    assert inside("collections", "delete", "y", "--yes").exit_code == 10


def test_an_empty_folder_is_no_error(inside: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = inside("ingest", "empty")
    assert (result.exit_code, result.stdout) == (0, "nothing to read in empty (0 documents)\n")


def test_what_is_no_file_is_listed_and_the_rest_is_in(inside: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "good.txt").write_text("A good text.")
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to("nowhere")
    found = report(inside("ingest", "docs", "--json"), 3)
    assert found["added"] == 1
    assert {failure["path"].rpartition("/")[2] for failure in found["failed"]} >= {"pipe.txt"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_listed(inside: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    found = report(inside("ingest", "closed", "--json"), 3)
    assert [failure["reason"] for failure in found["failed"]] == ["unreadable"]


def test_two_writers_at_once_are_exit_code_11(inside: Callable[..., Result], tmp_path: Path) -> None:

    (tmp_path / "a.txt").write_text("A text.")
    with writing(tmp_path / "home" / "collections" / "x"):
        result = inside("ingest", "a.txt", "-c", "x")
    assert (result.exit_code, result.stdout) == (11, "")
    assert result.stderr.count("\n") == 1
    assert inside("ingest", "a.txt", "-c", "x").exit_code == 0


@pytest.mark.parametrize(
    "text", ['C++ ("x', "SELECT * FROM x; --", "a AND (b", "x*", "näive 漢字 \u202e", "x " * 50_000]
)
def test_words_with_signs_are_searched_for(inside: Callable[..., Result], tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text("A text about C++ and x.")
    inside("ingest", "a.txt")
    assert report(inside("search", "--json", "--", text), 0)["query"] == text.strip()


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux namespaces")
@pytest.mark.parametrize(
    ("mount", "message"),
    [("-o size=2m", "is full; nothing is lost"), ("-o ro", r"cannot be written \(Read-only file system\)")],
)
def test_a_disk_that_takes_no_more_is_one_line(
    environment: dict[str, str], embedder: Path, tmp_path: Path, mount: str, message: str
) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Sentence number {i} of a long text.\n" for i in range(60_000)))
    (tmp_path / "home").mkdir()
    mounted = f'mount -t tmpfs {mount} tmpfs "$L2M_HOME" || exit 77'
    inner = f'{mounted}; exec "{sys.executable}" -c "{MAIN}" ingest a.txt'
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inner],
        env={**environment, "L2M_EMBEDDER": str(embedder), "L2M_CHUNK_SIZE": "64"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip("no namespaces here")
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1), ran.stderr
    assert re.search(message, ran.stderr)


@pytest.mark.parametrize(
    ("what", "code", "told"),
    [
        ("path parts", 2, "must be 1 to 64 of"),
        ("no manifest", 10, "there is no collection"),
        ("locked", 11, "process"),
        ("newer format", 12, "format 99"),
        ("altered manifest", 13, "manifest"),
        ("tables gone", 13, "cannot be opened"),
    ],
)
def test_what_a_collection_cannot_be_used_for_has_an_exit_code_and_loses_nothing(
    inside: Callable[..., Result], tmp_path: Path, what: str, code: int, told: str
) -> None:
    (tmp_path / "a.txt").write_text("The lease of the red house ends on 30 April 2029.")
    assert inside("ingest", "a.txt", "-c", "x").exit_code == 0
    folder = tmp_path / "home" / "collections" / "x"
    manifest, tables = folder / "manifest.json", folder / "tables"
    facts = manifest.read_bytes()
    command = ["search", "lease", "-c", "x"]
    with ExitStack() as stack:
        if what == "path parts":
            command[-1] = "../x"
        elif what == "no manifest":
            manifest.rename(tmp_path / "aside")
        elif what == "locked":
            command = ["ingest", "a.txt", "-c", "x"]
            stack.enter_context(writing(folder))
        elif what == "newer format":
            newer = {**json.loads(facts), "format": 99}
            newer.pop("digest")
            manifest.write_text(json.dumps({**newer, "digest": digest(newer)}))
        elif what == "altered manifest":
            manifest.write_bytes(facts.replace(b'"dimension"', b'"dimensiom"'))
        else:
            tables.rename(tmp_path / "aside")
        ran = inside(*command)
    assert ran.exit_code == code, ran.output
    assert told in ran.output
    assert "Traceback" not in ran.output
    if (tmp_path / "aside").exists():
        (tmp_path / "aside").rename(manifest if what == "no manifest" else tables)
    manifest.write_bytes(facts)
    assert "30 April 2029" in inside("search", "lease", "-c", "x").output
