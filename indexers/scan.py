"""Which files lie below the paths that were given, and under which ids."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from l2m_rag.errors import LoadError, UsageError
from l2m_rag.memory_tiers.records import DocumentRow

_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
_LOOKS_ESCAPED = re.compile(rb"\\(?=x[0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Found:
    """A file to look at.

    Args:
        id: the path relative to its root; the document's name.
        path: the file.
        root: the folder it was found under.
        bytes: its size.
        mtime_ns: when it was modified.
        error: why it cannot be read, or None.
    """

    id: str
    path: Path
    root: Path
    bytes: int = 0
    mtime_ns: int = 0
    error: LoadError | None = None

    @property
    def uri(self) -> str:
        """The absolute path, as stored."""
        return printable(str(self.path))


@dataclass(slots=True)
class Scan:
    """What a walk over some paths has found.

    Args:
        files: in order of their paths.
        roots: absolute paths of the folders that were walked.
        blind: absolute paths of folders that could not be listed; nothing is known of what lies below.
    """

    files: list[Found] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    blind: list[Path] = field(default_factory=list)


def scan(paths: Sequence[str | Path], documents: dict[str, DocumentRow], *, glob: str | None = None) -> Scan:
    """Find the files below some paths; hidden ones (a dot in front) are left out unless they are named themselves.

    Args:
        paths: files and folders.
        documents: the rows that the collection has, by id: a file keeps the id that it has.
        glob: only files whose name or relative path fits this pattern.

    Raises:
        UsageError: a path does not exist; nothing was done.
    """
    result = Scan()
    roots = [Path(os.path.abspath(path)) for path in paths]
    for given, root in zip(paths, roots, strict=True):
        if not os.path.lexists(root):
            raise UsageError(f"no such file or folder: {printable(str(given))}")
    names = _Names(documents)
    seen: set[Path] = set()
    for root in roots:
        if root.is_dir():
            result.roots.append(root)
            entries: Iterable[tuple[Path, os.stat_result | LoadError]] = _walk(root, result.blind)
        else:
            entries = [(root, _stat(root))]
        for path, status in entries:
            base = root if root.is_dir() else root.parent
            relative = printable(str(path.relative_to(base)))
            if path in seen or (glob and path not in result.blind and not fits(relative, glob)):
                continue
            seen.add(path)
            identity = names.give(relative, base, path)
            if identity is None:
                continue
            if isinstance(status, LoadError):
                result.files.append(Found(identity, path, base, error=status))
            else:
                result.files.append(Found(identity, path, base, status.st_size, status.st_mtime_ns))
    return result


def printable(path: str) -> str:
    r"""Give a path as valid Unicode: bytes that are not UTF-8 stand as `\xff`, and no two paths give the same text."""
    return _LOOKS_ESCAPED.sub(rb"\\x5c", os.fsencode(path)).decode("utf-8", "backslashreplace")


def path_of(uri: str) -> str:
    """Give the path of which `printable` made a uri."""
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), os.fsencode(uri)))


def is_gone(path: str) -> bool:
    """Say whether there is no file at a path any more; what may not be looked at is taken to be there."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


class _Names:
    """Gives ids to files: the relative path, with the root's name before it where another file has that id."""

    def __init__(self, documents: dict[str, DocumentRow]) -> None:
        self._by_uri = {row.uri: row.id for row in documents.values()}
        self._taken = {row.id: row.uri for row in documents.values()}
        self._given: set[str] = set()

    def give(self, relative: str, root: Path, path: Path) -> str | None:
        """Give the id of a file; None when it is one that has its id already, found by another way."""
        name = self._choose(relative, root, path)
        if name in self._given:
            return None
        self._given.add(name)
        self._taken[name] = printable(str(path))
        return name

    def _choose(self, relative: str, root: Path, path: Path) -> str:
        uri = printable(str(path))
        if uri in self._by_uri:
            return self._by_uri[uri]
        for name in (relative, f"{printable(root.name)}/{relative}"):
            owner = self._taken.get(name)
            if owner is None or owner == uri or _is_free(path_of(owner), path):
                return name
        return uri


def _is_free(owner: str, path: Path) -> bool:
    """Say whether an id may go over from one file to another: when it is the same one, reached through a link, or gone.

    When a folder has moved, its documents keep their names.
    """
    try:
        os.lstat(owner)
        return os.path.samefile(owner, path)
    except (FileNotFoundError, NotADirectoryError):
        return not os.path.lexists(owner)
    except OSError:
        return False


def fits(relative: str, glob: str) -> bool:
    """Say whether a relative path, or its last part, fits a pattern."""
    return fnmatch.fnmatch(relative, glob) or fnmatch.fnmatch(os.path.basename(relative), glob)


def _walk(root: Path, blind: list[Path]) -> Iterator[tuple[Path, os.stat_result | LoadError]]:
    """Give each file below a folder in order; links to folders are followed, but none of them twice."""
    visited: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            blind.append(folder)
            yield folder, LoadError("unreadable", f"the folder cannot be listed: {error.strerror}")
            continue
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = folder / entry.name
            status_or_error = _stat(path)
            if isinstance(status_or_error, os.stat_result) and stat.S_ISDIR(status_or_error.st_mode):
                folders.append(path)
            else:
                yield path, status_or_error
        waiting += reversed(folders)


def _stat(path: Path) -> os.stat_result | LoadError:
    try:
        status = os.stat(path)
    except OSError as error:
        return LoadError("unreadable", error.strerror or "it cannot be looked at")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        return LoadError("unreadable", "it is a pipe, a socket or a device, not a file")
    return status
