"""The errors of the library.

Every error that a user can cause is an `L2MError`; its text says what was wrong, the value, and what to do.
`code` is the exit code of the command line (docs/cli.md)::

    L2MError                   1   anything else that went wrong
    ├── UsageError             2   the call itself is off
    ├── ConfigError            2   a setting has a value it cannot have
    ├── LoadError              3   one document could not be read (`reason` is one of `REASONS`)
    ├── MissingExtraError      1   a package of an optional extra is not installed
    ├── WeightsError           1   model weights are missing, cut short or altered
    ├── ModelError             1   a language model could not be used
    ├── StorageError           1   object storage could not be reached, or refused
    ├── DiskFullError          1   there is no room on the disk for what was asked
    ├── ReadOnlyError          1   what would have to be written cannot be written
    ├── CollectionNotFound    10
    ├── LockedError           11   another process is writing
    ├── IncompatibleError     12   made with another embedder or format
    └── CorruptError          13   stored data is damaged
"""

from __future__ import annotations

from typing import Literal, get_args

Reason = Literal["empty", "encrypted", "corrupt", "unsupported", "too_large", "timeout", "no_text", "unreadable"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class L2MError(Exception):
    """An error whose text is meant for the user."""

    code = 1


class UsageError(L2MError, ValueError):
    """A call with arguments that cannot be used."""

    code = 2


class ConfigError(L2MError, ValueError):
    """A setting with a value that it cannot have."""

    code = 2


class LoadError(L2MError):
    """A document that could not be read.

    Args:
        reason: why, one of `REASONS`.
        detail: one sentence for the person who owns the file; what names and bytes of the file bring into it is made
            printable.
    """

    code = 3

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason: Reason = reason
        self.detail = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in detail)
        super().__init__(f"{reason}: {self.detail}")


class MissingExtraError(L2MError, ImportError):
    """A package of an optional extra is missing.

    Args:
        package: the package that was needed.
        extra: the extra of l2m-rag that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'l2m-rag[{extra}]'")


class WeightsError(L2MError):
    """Model weights that are missing, cut short or not what was pinned."""


class DiskFullError(L2MError):
    """No room on the disk; what was stored before is as it was."""


class ReadOnlyError(L2MError):
    """A place that cannot be written; what is stored there can be read."""


class ModelError(L2MError):
    """A language model that could not be loaded or asked."""


class StorageError(L2MError):
    """Object storage that could not be reached, or that refused."""


class CollectionNotFound(L2MError):  # noqa: N818  # the name says it
    """No collection of that name."""

    code = 10


class LockedError(L2MError):
    """Another process is writing to the collection."""

    code = 11


class IncompatibleError(L2MError):
    """The collection was made with another embedder, dimension or format."""

    code = 12


class CorruptError(L2MError):
    """Stored data is damaged."""

    code = 13
