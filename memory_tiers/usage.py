"""When rows of the table of states were last used: what a disk budget goes by. It can be lost without harm."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa

from l2m_rag.memory_tiers.disk import write_bytes

DiskPolicy = Literal["lru", "learned"]
DISK_POLICIES: tuple[DiskPolicy, ...] = get_args(DiskPolicy)

_SCHEMA = pa.schema(
    [
        ("namespace", pa.string()),
        ("row", pa.int64()),
        ("reads", pa.int64()),
        ("used", pa.float64()),
        ("keep", pa.float64()),
    ]
)


class _Use(NamedTuple):
    """Of one row: how often it was read, when it was last read or added, and the router's score."""

    reads: int
    used: float
    keep: float


_NEVER = _Use(0, 0.0, float("-inf"))


class Usage:
    """The use of the rows of one namespace.

    Args:
        folder: where `usage.arrow` lies, of all namespaces; None keeps it in memory. One that cannot be read counts as
            none.
        namespace: whose rows.
    """

    def __init__(self, folder: Path | None, namespace: str) -> None:
        self._path = None if folder is None else folder / "usage.arrow"
        self._namespace = namespace
        self._uses: dict[int, _Use] = {}
        for use in self._stored():
            if use["namespace"] == namespace:
                self._uses[use["row"]] = _Use(use["reads"], use["used"], use["keep"])
        self._clock = max((use.used for use in self._uses.values()), default=0.0)

    def added(self, row: int, keep: float | None) -> None:
        """Note that a row was added, and the router's score of it."""
        self._uses[row] = _Use(0, self._now(), float("-inf") if keep is None else keep)

    def read(self, rows: Iterable[int]) -> None:
        """Note that rows were read."""
        now = self._now()
        for row in rows:
            before = self._uses.get(row, _NEVER)
            self._uses[row] = before._replace(reads=before.reads + 1, used=now)

    def drop(self, rows: Iterable[int]) -> None:
        """Forget rows that are gone."""
        for row in rows:
            self._uses.pop(row, None)

    def first_to_go(self, rows: Iterable[int], policy: DiskPolicy) -> list[int]:
        """Give rows in the order in which they should go.

        Args:
            rows: of the namespace.
            policy: "lru": what was used longest ago; "learned": what has the lowest score of the router, of equals and
                of those without one what was used longest ago.
        """

        def worth(row: int) -> tuple[float, float, int]:
            use = self._uses.get(row, _NEVER)
            return (use.keep if policy == "learned" else 0.0, use.used, row)

        return sorted(rows, key=worth)

    def save(self) -> None:
        """Write the file anew."""
        if self._path is None:
            return
        others = [use for use in self._stored() if use["namespace"] != self._namespace]
        ours = [{"namespace": self._namespace, "row": row, **use._asdict()} for row, use in self._uses.items()]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist([*others, *ours], schema=_SCHEMA))
        write_bytes(self._path, sink.getvalue().to_pybytes())

    def _stored(self) -> list[dict[str, Any]]:
        try:
            table = pa.ipc.open_file(pa.BufferReader(self._path.read_bytes())).read_all() if self._path else None
            return table.to_pylist() if table is not None and table.schema == _SCHEMA else []
        except (OSError, pa.ArrowException, UnicodeDecodeError):
            return []

    def _now(self) -> float:
        """Give the time in seconds since 1970, later than any that was given before."""
        self._clock = max(time.time(), self._clock + 1e-6)
        return self._clock
