"""The settings of the library, and where each of their values comes from.

An option of the command line wins over an `L2M_*` variable, that over the nearest `l2m.toml` (from the
working folder upward), that over the user's own file, and that over the default. Nothing heavy is imported
here: the command line needs this module for `--help` and for shell completion.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from l2m_rag.errors import ConfigError, UsageError

COLLECTION_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""What a collection or a session may be called, to be matched in full: a name is also a folder's name."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY_PART = re.compile(r"[A-Za-z0-9._=+@-]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # of one letter: a drive of Windows

PROJECT_FILE = "l2m.toml"
LONGEST_QUESTION = 100_000  # characters: far above any question, far below what takes minutes to read
SECRET = "***"

_NAME_RULE = "1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or a digit"


@dataclass(frozen=True, slots=True)
class Url:
    """A prefix on object storage; what is below it is named with `/`, as with a `Path`.

    Args:
        bucket: name of the bucket.
        key: the prefix, without a slash at its ends; may be empty.
    """

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, below: str) -> Url:
        return Url(self.bucket, f"{self.key}/{below}".lstrip("/"))

    @property
    def name(self) -> str:
        """The last part of the prefix."""
        return self.key.rpartition("/")[2]

    def with_name(self, name: str) -> Url:
        """Give the prefix beside this one."""
        return Url(self.bucket, f"{self.key.rpartition('/')[0]}/{name}".lstrip("/"))


def parse_url(text: str) -> Url:
    """Read s3://BUCKET/PREFIX.

    Raises:
        ValueError: it is none; the text says what is wrong, and holds no secret that was typed into it.
    """
    scheme, _, rest = text.partition("://")
    if scheme.lower() != "s3" or "://" not in text:
        raise ValueError("must be a folder, or s3://BUCKET/PREFIX on object storage; no other kind is known")
    bucket, _, key = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("must be s3://BUCKET/PREFIX, the bucket's name being 3 to 63 of a-z, 0-9, '.' and '-'")
    parts = [part for part in key.split("/") if part]
    if not all(_KEY_PART.fullmatch(part) and part.strip(".") for part in parts):
        raise ValueError("must be s3://BUCKET/PREFIX, the prefix being of letters, digits and . _ = + @ - between '/'")
    return Url(bucket, "/".join(parts))


def check_name(name: str, what: str = "collection") -> str:
    """Give the name back when a collection (or whatever `what` says) may be called so.

    Raises:
        UsageError: the name could not be used as one.
    """
    if not COLLECTION_NAME.fullmatch(name):
        raise UsageError(f"{what} name ({name!r}) must be {_NAME_RULE}")
    return name


def default_home() -> Path:
    """Give the platform's folder for the data of programs, ours in it."""
    return platformdirs.user_data_path("l2m")


def user_file() -> Path:
    """Give the path of the user's own settings file, which need not exist."""
    return platformdirs.user_config_path("l2m") / "config.toml"


def project_file(cwd: Path | None = None) -> Path | None:
    """Give the nearest `l2m.toml`, from `cwd` (default: the working folder) upward, or None."""
    try:
        here = (cwd or Path.cwd()).absolute()
    except FileNotFoundError:  # the working folder was deleted under us
        return None
    for folder in (here, *here.parents):
        if (folder / PROJECT_FILE).is_file():
            return folder / PROJECT_FILE
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What can be set. The names are those of `l2m.toml` and, in capitals behind `L2M_`, of the environment.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    home: Path | Url = field(default_factory=default_home)
    """Folder of collections (sessions are one) and weights; or s3://BUCKET/PREFIX, where only collections lie."""

    models: Path | None = None
    """Folder of the weights; `models` in the home when not set, or in the platform's folder if that is not here."""

    collection: str = "default"
    """Collection that is meant when none is named."""

    embedder: str = "default"
    """`default` (the pinned all-MiniLM-L6-v2), or the folder or hub id of a sentence-transformers model."""

    model: str = "default"
    """`default` (the pinned SmolLM2-135M-Instruct), or the folder or hub id of a causal language model."""

    llm_url: str = ""
    """Base URL of an OpenAI-compatible endpoint that answers instead, such as http://127.0.0.1:8080/v1."""

    llm_model: str = ""
    """Name of the model that `llm_url` is asked for."""

    llm_key: str = field(default="", repr=False)
    """Bearer token for `llm_url`; never shown."""

    chunk_size: int = 256
    """Length of a chunk, in tokens of the embedder."""

    chunk_overlap: int = 32
    """Tokens that two neighbouring chunks share."""

    workers: int = 1
    """Processes that parse files."""

    file_timeout: float = 30.0
    """Seconds that parsing one file may take."""

    file_memory: int = 1 << 30
    """Bytes that a parsing process may use."""

    file_max_bytes: int = 256 << 20
    """Size above which a file is not read."""

    passages: int = 8
    """Passages looked at for an answer."""

    budget: int = 768
    """Positions (tokens of the language model) of evidence read for an answer."""

    focus: int = 3
    """Sentences of that evidence that a model which was not trained to read quotes from; the trained one reads all."""

    enough: float = 0.7
    """Probability of holding the answer from which on the trained reader reads no more passages; 1 reads all."""

    resolution: int = 1
    """Tokens of a passage that one position stands for when it is read: 1, 4 or 16; a reader must have learnt it."""

    disk_budget: int = 0
    """Bytes that the states of one namespace may take on the disk; what was used longest ago goes. 0 for no limit."""

    threads: int = 0
    """CPU threads; 0 for all."""

    abstain_below: float = 0.5
    """Probability of being answerable below which no answer is given."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            # The class is frozen: the only way to keep the checked value (a home without `~`, 30 as 30.0).
            object.__setattr__(self, setting.name, _checked(setting.name, value))
        if self.chunk_overlap >= self.chunk_size:
            raise ConfigError(f"chunk_overlap ({self.chunk_overlap}) must be less than chunk_size ({self.chunk_size})")

    @property
    def data(self) -> Path:
        """Folder of what lies on this machine in any case, such as weights: the home, if it does."""
        return self.home if isinstance(self.home, Path) else default_home()


def load_settings(
    overrides: Mapping[str, object] | None = None,
    *,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Give the settings in force, and for each of them where its value comes from.

    Args:
        overrides: what the caller has set; a value of None stands for "not set".
        cwd: folder from which `l2m.toml` is looked for; default the working folder.
        environ: variables to use in place of `os.environ`.

    Returns:
        The settings, and per setting "option", "env L2M_HOME", "file /path/l2m.toml" or "default".

    Raises:
        ConfigError: a value cannot be used, or a file cannot be read or holds an unknown setting.
    """
    values: dict[str, object] = {}
    origin = dict.fromkeys(_TYPES, "default")
    # From the weakest to the strongest, each overwriting the one before.
    for file in (user_file(), project_file(cwd)):
        if file is not None and file.is_file():
            for name, value in _read_file(file).items():
                values[name], origin[name] = value, f"file {file}"
    for name, text in _read_environment(os.environ if environ is None else environ).items():
        values[name], origin[name] = text, f"env {_variable(name)}"
    for name, value in (overrides or {}).items():
        _check_known(name, "option")
        if value is not None:
            values[name], origin[name] = _checked(name, value), "option"
    try:
        return Settings(**values), origin  # type: ignore[arg-type]  # each value was checked by its name
    except ConfigError as error:  # only a rule between two settings can still fail here
        raise ConfigError(
            f"{error} (chunk_size: {origin['chunk_size']}, chunk_overlap: {origin['chunk_overlap']})"
        ) from None


def _read_file(file: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are both of this kind
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    for name, value in table.items():
        _check_known(name, str(file))
        table[name] = _checked(name, value, str(file))
        if isinstance(table[name], Path):  # a relative folder means beside the file, wherever the command runs
            table[name] = file.parent / Path(str(value)).expanduser()
    return table


def _read_environment(environ: Mapping[str, str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, kind in _TYPES.items():
        text = environ.get(_variable(name), "")
        if not text:  # set but empty counts as not set, as in the XDG rules
            continue
        value: object = text
        if kind is int or kind is float:
            try:
                value = kind(text)
            except ValueError:
                value = text  # let the check below say what it must be
        values[name] = _checked(name, value, f"environment variable {_variable(name)}")
    return values


def _variable(name: str) -> str:
    return f"L2M_{name.upper()}"


def _check_known(name: str, where: str) -> None:
    if name in _TYPES:
        return
    near = difflib.get_close_matches(name, _TYPES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(_TYPES)}"
    raise ConfigError(f"{where}: unknown setting {name!r}; {hint}")


def _checked(name: str, value: Any, where: str = "") -> Any:
    """Give the value in the type of the setting; an error names the place, the setting and the value."""
    kind = _TYPES[name]
    if value is None and name == "models":
        return None
    prefix = f"{where}: " if where else ""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if name == "home" and isinstance(value, Url):
        return value
    if kind is Path and isinstance(value, str | Path):
        if _SCHEME.match(str(value)):
            return _checked_url(name, value, prefix)
        if not str(value) or "\0" in str(value):
            raise ConfigError(f"{prefix}{name} ({str(value)!r}) must be the path of a folder")
        try:
            return Path(value).expanduser().absolute()
        except (RuntimeError, OSError) as error:  # ~nobody, or a relative path from a folder that is gone
            raise ConfigError(f"{prefix}{name} ({str(value)!r}) cannot be used: {error}") from error
    shown = SECRET if name == "llm_key" else repr(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{prefix}{name} ({shown}) must be {_TYPE_WORDS[kind]}")
    if name in _RULES:
        holds, rule = _RULES[name]
        if not holds(value):
            raise ConfigError(f"{prefix}{name} ({shown}) must be {rule}")
    return value


def _checked_url(name: str, value: str | Path, prefix: str) -> Url:
    text = re.sub(r"//[^/]*@", f"//{SECRET}@", str(value))  # a password may have been typed before the host
    if name != "home":
        raise ConfigError(f"{prefix}{name} ({text!r}) must be a folder on this machine")
    try:
        if isinstance(value, Path):
            raise ValueError("is a Path, which cannot hold an address; give it as a string")
        return parse_url(value)
    except ValueError as error:
        raise ConfigError(f"{prefix}{name} ({text!r}) {error}") from None


_TYPES: dict[str, type] = {
    setting.name: {"Path | Url": Path, "Path | None": Path, "str": str, "int": int, "float": float}[str(setting.type)]
    for setting in fields(Settings)
}
_TYPE_WORDS = {Path: "the path of a folder", str: "a string", int: "a whole number", float: "a number"}


def _at_least(low: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: bool(value >= low), f"{low:,} or more"


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "collection": (lambda name: bool(COLLECTION_NAME.fullmatch(name)), _NAME_RULE),
    "embedder": (bool, "'default', a folder or a hub id"),
    "model": (bool, "'default', a folder or a hub id"),
    "llm_url": (
        lambda url: not url or bool(re.match(r"https?://[^\s/]", url)),
        "a URL that begins with http:// or https://",
    ),
    # A header with a line break in it would be two headers.
    "llm_key": (lambda key: key.isprintable() and key.isascii(), "printable ASCII characters"),
    "chunk_size": _at_least(8),
    "chunk_overlap": _at_least(0),
    "workers": _at_least(1),
    "file_timeout": (lambda seconds: math.isfinite(seconds) and seconds > 0, "a number of seconds above 0"),
    "file_memory": _at_least(64 << 20),
    "file_max_bytes": _at_least(1),
    "passages": _at_least(1),
    "budget": _at_least(1),
    "focus": _at_least(1),
    "enough": (lambda p: 0 <= p <= 1, "between 0 and 1"),
    "resolution": (lambda ratio: ratio in (1, 4, 16), "1, 4 or 16"),
    "disk_budget": _at_least(0),
    "threads": _at_least(0),
    "abstain_below": (lambda p: 0 <= p <= 1, "between 0 and 1"),
}
