import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import l2m_rag.config
from l2m_rag.config import Settings, check_name, load_settings, project_file
from l2m_rag.errors import ConfigError, UsageError


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own file, in a place of the test."""
    file = tmp_path / "user" / "config.toml"
    file.parent.mkdir()
    monkeypatch.setattr(l2m_rag.config, "user_file", lambda: file)
    return file


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project" / "deep" / "down"
    folder.mkdir(parents=True)
    return folder


def test_without_anything_every_setting_is_the_default(project: Path) -> None:
    settings, origin = load_settings(cwd=project, environ={})
    assert settings == Settings()
    assert origin == {setting.name: "default" for setting in fields(Settings)}


def test_option_wins_over_environment_over_project_over_user_over_default(user: Path, project: Path) -> None:
    user.write_text("chunk_size = 101\nworkers = 2\nbudget = 3\npassages = 4\n")
    file = project.parent.parent / "l2m.toml"
    file.write_text("chunk_size = 102\nworkers = 5\nbudget = 6\n")
    environ = {"L2M_CHUNK_SIZE": "103", "L2M_WORKERS": "7", "L2M_PASSAGES": ""}
    settings, origin = load_settings({"chunk_size": 104, "workers": None}, cwd=project, environ=environ)
    found = (settings.chunk_size, settings.workers, settings.budget, settings.passages, settings.threads)
    assert found == (104, 7, 6, 4, 0)
    assert origin["chunk_size"] == "option"
    assert origin["workers"] == "env L2M_WORKERS"
    assert origin["budget"] == f"file {file}"
    assert origin["passages"] == f"file {user}"
    assert origin["threads"] == "default"


def test_the_nearest_project_file_is_the_one_that_counts(project: Path) -> None:
    (project.parent.parent / "l2m.toml").write_text("budget = 1\n")
    (project.parent / "l2m.toml").write_text("budget = 2\n")
    (project / "l2m.toml").mkdir()  # not a file
    assert project_file(project) == project.parent / "l2m.toml"
    assert load_settings(cwd=project, environ={})[0].budget == 2


def test_a_relative_home_in_a_file_lies_beside_the_file(project: Path) -> None:
    (project.parent / "l2m.toml").write_text('home = "store"\n')
    assert load_settings(cwd=project, environ={})[0].home == project.parent / "store"


def test_a_home_with_a_tilde_is_expanded() -> None:
    assert load_settings(environ={"L2M_HOME": "~/x"})[0].home == Path.home() / "x"


def test_numbers_of_the_environment_get_their_type() -> None:
    environ = {"L2M_FILE_TIMEOUT": "2", "L2M_ABSTAIN_BELOW": "0.25", "L2M_THREADS": "3"}
    settings, _ = load_settings(environ=environ)
    assert (settings.file_timeout, settings.abstain_below, settings.threads) == (2.0, 0.25, 3)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (
            "L2M_CHUNK_SIZE",
            "many",
            "environment variable L2M_CHUNK_SIZE: chunk_size ('many') must be a whole number",
        ),
        ("L2M_WORKERS", "0", "environment variable L2M_WORKERS: workers (0) must be 1 or more"),
        ("L2M_ABSTAIN_BELOW", "nan", "abstain_below (nan) must be between 0 and 1"),
        ("L2M_FILE_TIMEOUT", "inf", "file_timeout (inf) must be a number of seconds above 0"),
        (
            "L2M_LLM_URL",
            "file:///etc",
            "llm_url ('file:///etc') must be a URL that begins with http:// or https://",
        ),
        ("L2M_COLLECTION", "../x", "collection ('../x') must be 1 to 64 of a-z"),
        ("L2M_HOME", "~nobody-of-this-name/x", "home ('~nobody-of-this-name/x') cannot be used"),
    ],
)
def test_a_bad_variable_is_named_with_its_value_and_what_it_must_be(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(environ={variable: text})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunksize = 3\n", "unknown setting 'chunksize'; did you mean 'chunk_size'?"),
        ("zzz = 3\n", "unknown setting 'zzz'; known are: home, "),
        ("workers = true\n", "workers (True) must be a whole number"),
        ("workers = 1.5\n", "workers (1.5) must be a whole number"),
        ("home = 3\n", "home (3) must be the path of a folder"),
        ("[chunk_size]\na = 1\n", "chunk_size ({'a': 1}) must be a whole number"),
        ("workers = \n", "is not valid TOML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong_in_it(project: Path, text: str, message: str) -> None:
    file = project / "l2m.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_settings(cwd=project, environ={})
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_a_file_that_is_not_utf8_is_a_clear_error(user: Path) -> None:
    user.write_bytes(b'model = "\xff"\n')
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_settings(environ={})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="option: unknown setting 'modle'; did you mean 'model'"):
        load_settings({"modle": "x"}, environ={})


def test_chunks_must_be_longer_than_their_overlap() -> None:
    with pytest.raises(
        ConfigError, match=r"chunk_overlap \(32\) must be less than chunk_size \(16\).*env L2M_CHUNK_SIZE"
    ):
        load_settings(environ={"L2M_CHUNK_SIZE": "16"})


def test_settings_check_themselves() -> None:
    with pytest.raises(ConfigError, match=r"budget \(0\) must be 1 or more"):
        Settings(budget=0)


def test_the_key_is_never_shown() -> None:
    settings, _ = load_settings(environ={"L2M_LLM_KEY": "secret-key"})
    assert settings.llm_key == "secret-key"
    assert "secret-key" not in repr(settings)
    with pytest.raises(ConfigError) as error:
        load_settings(environ={"L2M_LLM_KEY": "secret\nkey"})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "contracts", "2026.q1_a-b", "x" * 64])
def test_good_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "A", "-x", "x" * 65, "a\n", "ä", "a b", "a\0"])
def test_names_that_are_no_plain_folder_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="collection name"):
        check_name(name)


def test_every_setting_says_what_it_is() -> None:
    source = Path(l2m_rag.config.__file__).read_text()
    for setting in fields(Settings):
        assert re.search(rf'^    {setting.name}: .*\n    """\S', source, flags=re.MULTILINE), setting.name


def test_the_settings_import_nothing_heavy() -> None:
    code = "import sys, l2m_rag.config; print([m for m in ('torch', 'numpy', 'typer') if m in sys.modules])"
    root = Path(l2m_rag.config.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
