"""What has reached the disk, and whether it still is what was written.

Lance never calls fsync and keeps no checksums of its files: a power cut can take a commit that was reported, and a bit
that flips is read as if it were right. Its files are written once and never changed, so a list of checksums tells.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from l2m_rag.errors import DiskFullError, L2MError, ReadOnlyError

# the one file that Lance writes again; it only says where to look first
_CHANGING = {"latest_version_hint.json"}
_ENDINGS = {".lance": b"LANC", ".manifest": b"LANC", ".arrow": b"ARROW1"}
_SPARE = 1000  # lines on files that are gone, up to which the list is left as it is
_NUMBER = re.compile(r"\(os error (\d+)\)")
_PART = 1 << 20
_ROOM = 2  # times what is stored: a compaction was seen to take 1.7 times
_LOOKS, _PAUSE = 10, 0.1  # at a file without its end, and seconds between them


class CutShortError(OSError):
    """A file was not written to its end, though nothing said so at the time.

    Args:
        path: the file.
        new: all files that were written since the last time that all was well.
    """

    def __init__(self, path: Path, new: list[Path]) -> None:
        super().__init__(errno.EIO, "the disk did not take all that was written", str(path))
        self.new = new


class Ledger:
    """Which files below a folder of tables have reached the disk, and their checksums.

    They stand in `checksums.log`, a line each: CRC-32 (hexadecimal), bytes, path. A line that cannot be read is passed
    over, and a file of which no line speaks is taken for new, so a list that was cut short costs no more than what it
    would have told.

    Args:
        folder: that holds the tables.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "checksums.log"
        self._known: dict[str, tuple[int, int]] = {}  # CRC-32 and bytes of each path
        self._read = 0  # bytes of the list that were read
        self._left: set[str] | None = None  # files that were cut short before; None: nobody has looked

    def telling(self) -> AbstractContextManager[None]:
        """Turn what the disk answers into an error that says what to do."""
        return telling(self.folder)

    def begin(self) -> None:
        """Look at what killed and failed commits have left, so that it is not laid to the one that now begins."""
        if self._left is None:
            self._left = set()
            with suppress(CutShortError):
                self.settle()

    def failed(self) -> None:
        """Note that a commit ended by an error, and may have left files without their end."""
        self._left = None

    def settle(self) -> None:
        """Wait until all files, and the folders that name them, have reached the disk; note the new ones.

        Raises:
            CutShortError: a file lacks its end. Lance does not look at what its last write to a file came to.
            OSError: the disk takes nothing.
        """
        self._look()
        left = self._left or set()
        new: dict[str, tuple[int, int]] = {}
        folders: set[Path] = set()
        there = 0
        for path in self._files():
            there += 1
            if path in self._known or path in left:
                continue
            with suppress(FileNotFoundError):  # a scratch file, or cleaned up by another process
                fsync(self.folder / path)
                new[path] = _checksum(self.folder / path)
                above = (self.folder / path).parent
                folders |= {above, above.parent}
        short = self._without_end(new)
        for _ in range(_LOOKS):
            if not short:
                break
            time.sleep(_PAUSE)  # a writer that holds no lock may be at it
            new |= {path: _checksum(self.folder / path) for path in short if (self.folder / path).exists()}
            short = self._without_end(short)
        if short:
            self._left = left | short
            raise CutShortError(self.folder / min(short), [self.folder / one for one in new])
        for parent in folders:
            with suppress(OSError):  # some file systems know no fsync of a folder
                fsync(parent)
        if len(self._known) > 2 * there + _SPARE:
            self._write_anew(new)
        elif new:
            self._append(_lines(new))
            self._known |= new

    def _without_end(self, paths: Iterable[str]) -> set[str]:
        """Give the files that do not end as files of their kind do."""
        found = set()
        for path in paths:
            with suppress(FileNotFoundError):
                if not _has_end(self.folder / path):
                    found.add(path)
        return found

    def forget(self, paths: Iterable[Path]) -> None:
        """Strike files off the list that were moved away, as others will take their names."""
        self._look()
        struck = [path for path in (str(path.relative_to(self.folder)) for path in paths) if path in self._known]
        if struck:
            self._append("".join(f"\n- - {path}" for path in struck))
        for path in struck:
            del self._known[path]

    def altered(self, below: str = "") -> list[str]:
        """Give the files on the list that are there and are not what was written, by path.

        Args:
            below: only those whose path begins with it.
        """
        self._look()
        wrong = []
        for path in sorted(self._files()):
            if path.startswith(below) and path in self._known:
                with suppress(FileNotFoundError):  # compaction deletes files
                    if _checksum(self.folder / path) != self._known[path]:
                        wrong.append(path)
        return wrong

    def _files(self) -> Iterator[str]:
        """Give the files of the tables, which lie in folders of their own."""
        for root, _, names in os.walk(self.folder):
            for name in names:
                if name not in _CHANGING and root != str(self.folder):
                    yield os.path.relpath(os.path.join(root, name), self.folder)

    def _look(self) -> None:
        """Read what was added to the list, perhaps by another process."""
        try:
            with self._path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                if size < self._read:  # it was written anew
                    self._known, self._read = {}, 0
                stream.seek(self._read)
                added = stream.read()
        except FileNotFoundError:
            self._known, self._read = {}, 0
            return
        self._read += len(added)
        for line in added.decode("utf-8", "replace").split("\n"):
            crc, _, rest = line.partition(" ")
            size_, _, path = rest.partition(" ")
            if crc == "-":
                self._known.pop(path, None)
            with suppress(ValueError):
                self._known[path] = int(crc, 16), int(size_)

    def _append(self, lines: str) -> None:
        """Add lines; each begins with a line break, so that one that was cut short spoils no other."""
        with self._path.open("ab") as stream:
            stream.write(lines.encode())
            stream.flush()
            self._read = stream.tell()

    def _write_anew(self, new: dict[str, tuple[int, int]]) -> None:
        """Write the list with new files, and without those that are gone."""
        here = set(self._files())
        known = {path: written for path, written in (self._known | new).items() if path in here}
        content = _lines(known).encode()
        write_bytes(self._path, content)
        self._known, self._read = known, len(content)


class Unlisted:
    """In place of a `Ledger` where a write is over when it is safe, and files are not ours to look at.

    Args:
        telling: turns what the place answers into an error that says what to do.
    """

    def __init__(self, telling: Callable[[], AbstractContextManager[None]]) -> None:
        self.telling = telling

    def begin(self) -> None:
        """Do nothing."""

    def failed(self) -> None:
        """Do nothing."""

    def settle(self) -> None:
        """Do nothing."""

    def altered(self, below: str = "") -> list[str]:
        """Give nothing."""
        return []


def _lines(files: dict[str, tuple[int, int]]) -> str:
    return "".join(f"\n{crc:08x} {size} {path}" for path, (crc, size) in files.items())


def _has_end(path: Path) -> bool:
    """Say whether a file ends as files of its kind do."""
    ending = _ENDINGS.get(path.suffix, b"")
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - len(ending)))
        return stream.read() == ending


def _checksum(path: Path) -> tuple[int, int]:
    """Give the CRC-32 and the bytes of a file."""
    crc = size = 0
    with path.open("rb", buffering=0) as stream:
        while part := stream.read(_PART):
            crc = zlib.crc32(part, crc)
            size += len(part)
    return crc, size


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Turn what a disk that is full or read-only answers into an error that says what to do.

    Raises:
        DiskFullError: there was no room.
        ReadOnlyError: the disk takes nothing.
    """
    try:
        yield
    except L2MError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := _NUMBER.search(str(error))):  # what comes from Lance has it in its text only
            number = int(found[1])
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"the disk of {folder} is full; nothing is lost. Make room and run the same again"
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ReadOnlyError(
                f"{folder} cannot be written ({os.strerror(number)}); what is in it can be read. Make it writable, or "
                f"keep the data elsewhere: l2m --home DIR"
            ) from error
        raise


def check_room(folder: Path, live: int) -> None:
    """Refuse a compaction for which the disk has no room: files are written anew before the old ones go.

    Args:
        folder: on the disk.
        live: bytes of what is written anew.

    Raises:
        DiskFullError: less than twice as many are free.
    """
    free = shutil.disk_usage(folder).free
    if free < _ROOM * live:
        raise DiskFullError(
            f"compacting {folder} needs {_ROOM * live:,} bytes of free disk, twice what is stored; {free:,} are free. "
            f"Nothing was changed: make room and run it again"
        )


def fsync(path: str | Path) -> None:
    """Wait until a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(facts: dict[str, Any]) -> str:
    """Give the SHA-256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that it is there whole or not at all, also after a power cut."""
    write_bytes(path, json.dumps(value, indent=1).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    One process writes at a time, which holds the lock, so what a killed one has left is written over by the next.
    """
    scratch = path.with_name(f".{path.name}.new")
    with telling(path.parent):
        try:
            with scratch.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    with suppress(OSError):
        fsync(path.parent)
