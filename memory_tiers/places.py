"""Where a collection lies: in a folder of this machine, or below a prefix on object storage.

Both kinds can do the same, so nothing else in the library asks which of them it has. What differs: a folder is locked
by a lock on a file, which its process's end gives back, and a prefix by an object that expires unless its holder renews
it; a folder is watched by a list of checksums and waits for the disk, and an object is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from threading import Event, Thread
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from l2m_rag.config import Url
from l2m_rag.errors import L2MError, LockedError, MissingExtraError, StorageError, UsageError
from l2m_rag.memory_tiers.disk import Ledger, Unlisted, check_room, telling, write_json

Where = Path | Url

LEASE = 90.0
"""Seconds that a lock on object storage holds after its holder was last heard of; clocks may differ by far less."""
_RENEWED = 6  # times in a lease
_LOCK = "writer.json"
_ABANDONED = 86_400.0  # seconds after which a half-made import is taken for left behind

# Our own requests are of small objects and come first, so an endpoint that is down or silent is told of soon. One that
# falls silent later is left to Lance, which asks some six times whatever it is told.
_ANSWER, _CONNECT, _RETRIES, _RETRY = 10, 5, 5, 8  # seconds, but for the number of retries
_LANCE = {
    "timeout": "15s",
    "connect_timeout": f"{_CONNECT}s",
    "client_max_retries": f"{_RETRIES}",
    "client_retry_timeout": f"{_RETRY}",
}


class Folder:
    """A place on this machine.

    Args:
        where: the folder, which need not be there.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        self.name = where.name
        self.uri = str(where)
        self.options: dict[str, str] = {}

    @property
    def hot(self) -> Path:
        """Folder of the hot index."""
        return self.where / "hot"

    def there(self) -> bool:
        """Say whether there is anything at this place."""
        return self.where.is_dir()

    def read(self, name: str) -> bytes:
        """Give what a file holds.

        Raises:
            FileNotFoundError: there is none.
        """
        return (self.where / name).read_bytes()

    def write_json(self, name: str, value: object) -> None:
        """Write a file so that it is there whole or not at all."""
        write_json(self.where / name, value)

    def stamp(self, name: str) -> str | None:
        """Give what tells a file from one that is put in its place, or None when there is none."""
        try:
            status = os.stat(self.where / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return f"{status.st_ino}-{status.st_mtime_ns}"

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Give path and bytes of each file, some of which may vanish meanwhile."""
        for root, _, names in os.walk(self.where / below):
            for name in names:
                path = os.path.join(root, name)
                with suppress(FileNotFoundError):
                    yield os.path.relpath(path, self.where), os.stat(path).st_size

    def holding(self, name: str) -> list[str]:
        """Give the names of the places right below that hold a file of that name."""
        return sorted(path.parent.name for path in self.where.glob(f"*/{name}"))

    def manifests(self, table: str) -> list[str]:
        """Give the names of the files that make the versions of a table of Lance."""
        return os.listdir(self.where / f"{table}.lance" / "_versions")

    def ledger(self) -> Ledger:
        """Give the list of what has reached the disk."""
        return Ledger(self.where)

    def check_room(self, live: int) -> None:
        """Refuse a compaction of so many bytes for which the disk has no room.

        Raises:
            DiskFullError: less than twice as many are free.
        """
        check_room(self.where, live)

    def clear(self, below: str) -> None:
        """Delete a folder in it."""
        shutil.rmtree(self.where / below)

    def remove(self) -> None:
        """Delete the whole place, at once for all who look."""
        with self.lock():
            grave = Path(tempfile.mkdtemp(prefix=".deleted-", dir=self.where.parent))
            self.where.rename(grave / "collection")
        for left in self.where.parent.glob(".deleted-*"):  # those too that a killed run has left
            shutil.rmtree(left, ignore_errors=True)

    def rename(self, target: Where) -> None:
        """Move the whole place, at once for all who look."""
        with self.lock():
            self.where.rename(str(target))
            (Path(str(target)) / _LOCK).unlink(missing_ok=True)

    @contextmanager
    def anew(self) -> Iterator[Where]:
        """Give a place in which to make what is to be here; it is moved in when the block ends well.

        Raises:
            UsageError: there is something here already.
        """
        above = self.where.parent
        above.mkdir(parents=True, exist_ok=True)
        for left in above.glob(".import-*"):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=".import-", dir=above))
        try:
            yield scratch / "collection"
            (scratch / "collection").rename(self.where)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UsageError(f"there is a folder {self.where} already; delete it or choose another name") from error
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def reaching(self) -> AbstractContextManager[None]:
        """Do nothing: a folder need not be reached."""
        return nullcontext()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the writer's lock.

        Raises:
            LockedError: another process holds it; the text names that process.
            DiskFullError: there is no room for it.
            ReadOnlyError: the folder cannot be written.
        """
        owner = self.where / _LOCK
        lock = FileLock(self.where / "writer.lock", timeout=0)
        with telling(self.where):
            self.where.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise LockedError(
                    f"collection {self.name!r} is being written by {self._owner()}; try again when it has finished"
                ) from None
            try:
                write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
            except BaseException:
                lock.release()
                raise
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _owner(self) -> str:
        try:
            return _owner(json.loads(self.read(_LOCK)))
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


class Prefix:
    """A place on object storage; every request ends within a minute and a half, most within ten seconds.

    The bucket's endpoint, region and credentials come from the variables AWS_*.

    Args:
        where: the prefix.

    Raises:
        MissingExtraError: obstore is not installed.
    """

    def __init__(self, where: Url) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError:
            raise MissingExtraError("obstore", "s3") from None
        self.where = where
        self.name = where.name
        self.uri = str(where)
        self.options = _LANCE
        self.endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"
        self._api: Any = obstore
        allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
        with self.reaching():
            self._store = S3Store(
                where.bucket,
                prefix=where.key or None,
                client_options={
                    "timeout": timedelta(seconds=_ANSWER),
                    "connect_timeout": timedelta(seconds=_CONNECT),
                    "allow_http": allow_http,
                },
                retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY)},
            )

    @property
    def hot(self) -> Path:
        """Folder of the hot index, which lies on this machine."""
        whole = hashlib.sha256(f"{self.endpoint} {self.uri}".encode()).hexdigest()
        return platformdirs.user_cache_path("l2m") / "hot" / whole[:32]

    def there(self) -> bool:
        """Say whether there is anything at this place."""
        return any(self.files())

    def read(self, name: str) -> bytes:
        """Give what an object holds.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be reached.
        """
        return self._get(name)[0]

    def write_json(self, name: str, value: object) -> None:
        """Write an object, which is there whole or not at all."""
        with self.reaching():
            self._api.put(self._store, name, json.dumps(value, indent=1).encode())

    def stamp(self, name: str) -> str | None:
        """Give what tells an object from one that is put in its place, or None when there is none."""
        try:
            with self.reaching():
                return str(self._api.head(self._store, name)["e_tag"])
        except FileNotFoundError:
            return None

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Give path and bytes of each object but the lock."""
        with self.reaching():
            found = chain.from_iterable(self._api.list(self._store, prefix=below or None))
            yield from ((entry["path"], entry["size"]) for entry in found if entry["path"] != _LOCK)

    def holding(self, name: str) -> list[str]:
        """Give the names of the places right below that hold an object of that name."""
        with self.reaching():
            below = self._api.list_with_delimiter(self._store)["common_prefixes"]
        return sorted(one for one in (path.strip("/") for path in below) if self.stamp(f"{one}/{name}"))

    def manifests(self, table: str) -> list[str]:
        """Give the name of the object that makes the newest version of a table of Lance; names count down."""
        found = (path for path, _ in self.files(f"{table}.lance/_versions") if path.endswith(".manifest"))
        return list(islice(found, 1))  # one page of many is asked for

    def ledger(self) -> Unlisted:
        """Give no list: object storage reports a write when it is safe, and rows have checksums of their own."""
        return Unlisted(self.reaching)

    def check_room(self, live: int) -> None:
        """Do nothing: there is room."""

    def clear(self, below: str = "") -> None:
        """Delete all objects below but the lock."""
        paths = [path for path, _ in self.files(below)]
        with self.reaching():
            self._api.delete(self._store, paths)

    def remove(self) -> None:
        """Delete the whole place; what says that the collection exists goes first."""
        with self.lock():
            with self.reaching():
                self._api.delete(self._store, ["manifest.json"])
            self.clear()
        shutil.rmtree(self.hot, ignore_errors=True)

    def rename(self, target: Where) -> None:
        """Refuse to move the place, as each object would have to be copied.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.uri} lies on object storage, where nothing can be renamed. Run: l2m collections export {self.name} "
            f"{self.name}.l2m; l2m collections import {self.name}.l2m {target.name}; "
            f"l2m collections delete {self.name} --yes"
        )

    @contextmanager
    def anew(self) -> Iterator[Where]:
        """Give this place to make there what is to be here; when the block ends by an error it is cleared.

        Raises:
            UsageError: there is something here already.
        """
        with self.lock():
            if self.there():
                raise UsageError(
                    f"there is something at {self.uri} already; run: l2m collections delete {self.name} --yes, or "
                    f"choose another name"
                )
            try:
                yield self.where
            except BaseException:
                with suppress(L2MError):
                    self.clear()
                raise

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turn what obstore and Lance say of object storage into an error that names the endpoint.

        Raises:
            StorageError: it could not be reached, or refused.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, L2MError | MemoryError) or not (told := self._told(error)):
                raise
            raise StorageError(told) from error

    def _told(self, error: Exception) -> str:
        """Say what an error means for the user; of one that is not about reaching object storage, nothing."""
        text = f"{type(error).__name__} {error}"
        for signs, what in _SIGNS:
            if any(sign in text for sign in signs):
                return what.format(endpoint=self.endpoint, bucket=self.where.bucket, uri=self.uri)
        if isinstance(error, FileNotFoundError) or not any(
            sign in text for sign in ("Generic S3 error", 'store: "S3"')
        ):
            return ""
        return f"object storage at {self.endpoint} did not do what was asked of it: {str(error).splitlines()[0][:300]}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the writer's lock: an object that only one can make, and that expires unless it is renewed.

        Raises:
            LockedError: another process holds it, or took it over because this one was not heard of.
        """
        facts = {"id": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        lease = _Lease(self, facts)
        lease.take()
        ended = Event()
        renewal = Thread(target=lease.renew, args=(ended,), name="l2m-lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            ended.set()
            renewal.join()
            lease.give_back()
        if lease.lost:
            raise LockedError(
                f"collection {self.name!r} was taken over by another process, as this one was not heard of for "
                f"{LEASE:.0f} s; nothing that was committed is lost. Run the same command again"
            )

    def swap(self, name: str, value: dict[str, Any], made_of: str | None) -> str | None:
        """Write an object if its ETag is the given one, or if there is none; give the new ETag, or None."""
        exceptions = self._api.exceptions
        mode = "create" if made_of is None else {"e_tag": made_of}
        try:
            with self.reaching():
                return str(self._api.put(self._store, name, json.dumps(value).encode(), mode=mode)["e_tag"])
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            # a request that was sent twice finds what it wrote the first time
            with suppress(FileNotFoundError, ValueError):
                content, tag = self._get(name)
                return tag if json.loads(content) == value else None
            return None

    def found(self, name: str) -> tuple[dict[str, Any], str] | None:
        """Give a JSON object and its ETag, if there is one."""
        try:
            content, tag = self._get(name)
            value = json.loads(content)
            return (value if isinstance(value, dict) else {}), tag
        except FileNotFoundError:
            return None
        except ValueError:
            return {}, tag

    def drop(self, name: str) -> None:
        """Delete an object."""
        with self.reaching():
            self._api.delete(self._store, [name])

    def _get(self, name: str) -> tuple[bytes, str]:
        with self.reaching():
            got = self._api.get(self._store, name)
            return bytes(got.bytes()), str(got.meta["e_tag"])


class _Lease:
    """The lock of a prefix, from taking it to giving it back.

    Args:
        place: what is locked.
        facts: of the holder.
    """

    def __init__(self, place: Prefix, facts: dict[str, Any]) -> None:
        self.lost = False
        self._place = place
        self._facts = facts
        self._until = 0.0
        self._tag: str | None = None

    def take(self) -> None:
        """Become the holder.

        Raises:
            LockedError: there is one.
        """
        if self._write(None):
            return
        found = self._place.found(_LOCK)
        holder, tag = found or ({}, None)
        if _until(holder) <= time.time() and self._write(tag):  # nobody's, or of one who is not heard of any more
            return
        if _until(holder) <= time.time():  # another has just been quicker
            holder = (self._place.found(_LOCK) or ({}, None))[0]
        until = time.strftime("%H:%M:%S", time.localtime(_until(holder)))
        try:
            owner = _owner(holder)
        except (KeyError, TypeError):
            owner = "another process"
        raise LockedError(
            f"collection {self._place.name!r} is being written by {owner}; try again when it has finished. Should it "
            f"have been killed, its lock ends at {until}"
        )

    def renew(self, ended: Event) -> None:
        """Go on being the holder until the event is set."""
        while not ended.wait(LEASE / _RENEWED):
            try:
                self.lost = not self._write(self._tag)
            except Exception:  # not reached, whatever the reason: there is some time left to try again
                self.lost = time.time() > self._until
            if self.lost:
                return

    def give_back(self) -> None:
        """Leave the lock to others; where nothing else is left, leave nothing."""
        if self.lost or time.time() > self._until:
            return
        with suppress(Exception):  # it ends by itself
            if self._place.there():
                self._place.swap(_LOCK, {**self._facts, "until": 0.0}, self._tag)
            else:
                self._place.drop(_LOCK)

    def _write(self, made_of: str | None) -> bool:
        until = time.time() + LEASE
        tag = self._place.swap(_LOCK, {**self._facts, "until": until}, made_of)
        if tag is not None:
            self._tag, self._until = tag, until
        return tag is not None


Place = Folder | Prefix


def place_of(where: Where) -> Place:
    """Give what can be done at a place.

    Raises:
        MissingExtraError: it is on object storage, and obstore is not installed.
    """
    return Folder(where) if isinstance(where, Path) else Prefix(where)


def writing(where: Where) -> AbstractContextManager[None]:
    """Hold the writer's lock of a collection.

    Raises:
        LockedError: another process holds it; the text names that process.
    """
    return place_of(where).lock()


def _owner(holder: dict[str, Any]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['pid']} on {holder['host']} (since {since})"


def _until(holder: dict[str, Any]) -> float:
    """Give until when a lock holds; one that cannot be read holds no longer."""
    until = holder.get("until", 0.0)
    return float(until) if isinstance(until, int | float) else 0.0


_SIGNS = (
    (
        ("NoSuchBucket",),
        "there is no bucket {bucket!r} at {endpoint}; make it, or name another in --home (now {uri})",
    ),
    (
        ("BadScheme", "builder error", "URL scheme is not allowed"),
        "{endpoint} is not an https address; to use it all the same, set AWS_ALLOW_HTTP=true",
    ),
    (
        ("169.254.", "security-credentials", "AWS credentials", "api/token", "InvalidAccessKeyId"),
        "there are no credentials that {endpoint} takes; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
        "AWS_SESSION_TOKEN where one belongs to them)",
    ),
    (
        ("PermissionDenied", "Unauthenticated", "AccessDenied", "SignatureDoesNotMatch", "403 Forbid",
         "status: 403"),
        "{endpoint} refuses access to {uri}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and that they "
        "may list, read, write and delete there",
    ),
    (
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "Received redirect without LOCATION", "bucket region"),
        "the bucket {bucket!r} lies in another region; set AWS_REGION to it",
    ),
    (
        ("error sending request", "HttpError", "timed out", "TimedOut", "dns error", "status: 5", "500 Internal",
         "502 Bad", "503 Service", "503 Slow", "504 Gateway", "Connection re"),
        "object storage at {endpoint} cannot be reached, or does not answer; check AWS_ENDPOINT_URL and the network, "
        "and run the same command again",
    ),
)  # fmt: skip
