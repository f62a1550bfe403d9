"""What `langchain_core.indexing.index` keeps in mind of the documents that it has written, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from langchain_core.indexing import RecordManager
from langchain_core.runnables import run_in_executor

from l2m_rag.collection import Collection
from l2m_rag.config import Settings
from l2m_rag.errors import UsageError
from l2m_rag.langchain.documents import where_of
from l2m_rag.langchain.keyed import NO_WORDS, key_of, named, open_keyed
from l2m_rag.memory_tiers.texts import Text

_KIND = "record"
_MOST_GROUPS = 100  # that a filter names; of more, all records are read instead, as long filters are slow


class L2MRecordManager(RecordManager):
    """Records of what was indexed and when, in a collection, so that the next run skips what is unchanged.

    Nothing is embedded. The collection is one of keys: one made with an embedder is refused. What one namespace holds
    is never seen from another.

    Setup:
        pip install 'l2m-rag[langchain]'

    Key init args:
        namespace: any text that is not empty, mostly the name of what is indexed into.
        collection: name of the collection of records, or a `Collection`; it is made when something is first recorded.
        settings: of the library; None reads them as the command line does.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MRecordManager

            manager = L2MRecordManager("notes")

    Index documents:
        .. code-block:: python

            from langchain_core.indexing import index

            index(documents, manager, store, cleanup="incremental", source_id_key="source", key_encoder="sha256")

    Look at records:
        .. code-block:: python

            manager.list_keys(group_ids=["lease.txt"])

    Async:
        .. code-block:: python

            await manager.alist_keys(before=await manager.aget_time())
    """

    def __init__(
        self, namespace: str, collection: str | Collection = "records", *, settings: Settings | None = None
    ) -> None:
        if not isinstance(namespace, str) or not namespace:
            raise UsageError(f"namespace ({namespace!r}) must be a string that is not empty")
        super().__init__(namespace)
        self.collection = open_keyed(collection, settings)

    def create_schema(self) -> None:
        """Check that the collection can hold records; it is made when something is first recorded.

        Raises:
            IncompatibleError: there is a collection of that name that was made with an embedder.
        """
        if self.collection.exists():
            self.collection.tier()

    def get_time(self) -> float:
        """Give the time of this machine, in seconds since 1970."""
        return time.time()

    def update(
        self,
        keys: Sequence[str],
        *,
        group_ids: Sequence[str | None] | None = None,
        time_at_least: float | None = None,
    ) -> None:
        """Record keys as written now, all or none.

        Args:
            keys: any; of one that comes twice the later group counts.
            group_ids: of each.
            time_at_least: that the clock must have reached.

        Raises:
            UsageError: a key is no string, or empty; there are not as many group ids as keys; or the clock stands
                before `time_at_least`. Nothing was written.
            LockedError: another process is writing to the collection, and went on for half a minute.
        """
        if group_ids and len(keys) != len(group_ids):
            raise UsageError(
                f"Length of keys must match length of group_ids; there are {len(keys)} keys and {len(group_ids)} "
                f"group ids"
            )
        now = self.get_time()
        if keys and time_at_least and time_at_least > now:
            raise UsageError(
                f"time_at_least must be in the past; it is {time_at_least}, and the clock of this machine says {now}"
            )
        # namespace and group as JSON, in which None is something too, and 1 is not "1"
        facts = {"namespace": json.dumps(self.namespace), "updated_at": now}
        groups = dict(zip(keys, group_ids or [None] * len(keys), strict=True))
        self.collection.put(
            [
                Text(one, NO_WORDS, {**facts, "group": json.dumps(group)})
                for one, group in zip(self._ids(list(groups)), groups.values(), strict=True)
            ]
        )

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Say of each key whether it is recorded."""
        ids = self._ids(keys)
        there = {text.id for text in self.collection.get(ids)}
        return [one in there for one in ids]

    def list_keys(
        self,
        *,
        before: float | None = None,
        after: float | None = None,
        group_ids: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> list[str]:
        """Give the keys of records, in the order in which they were first recorded.

        Args:
            before: only of those updated earlier than this.
            after: only of those updated later than this.
            group_ids: only of those of one of these groups.
            limit: at most this many.
        """
        groups = {json.dumps(group) for group in group_ids or ()}
        filtered = {"group": groups} if 0 < len(groups) <= _MOST_GROUPS else {}
        conditions = [where_of({"namespace": json.dumps(self.namespace), **filtered}) or ""]
        conditions += [f"metadata.updated_at < {float(before)!r}"] if before else []
        conditions += [f"metadata.updated_at > {float(after)!r}"] if after else []
        found = self.collection.texts(" AND ".join(conditions))
        kept = [text.id for text in found if not groups or text.metadata["group"] in groups]
        keys = [key for one in kept if (key := key_of(_KIND, one)) is not None]
        return keys[:limit] if limit else keys

    def delete_keys(self, keys: Sequence[str]) -> None:
        """Delete the records of keys; those that are not there are passed over."""
        self.collection.drop(self._ids(keys))

    async def acreate_schema(self) -> None:
        """Do as `create_schema`, in a thread."""
        await run_in_executor(None, self.create_schema)

    async def aget_time(self) -> float:
        """Give the time of this machine, in seconds since 1970."""
        return self.get_time()

    async def aupdate(
        self,
        keys: Sequence[str],
        *,
        group_ids: Sequence[str | None] | None = None,
        time_at_least: float | None = None,
    ) -> None:
        """Do as `update`, in a thread."""
        await run_in_executor(None, self.update, keys, group_ids=group_ids, time_at_least=time_at_least)

    async def aexists(self, keys: Sequence[str]) -> list[bool]:
        """Do as `exists`, in a thread."""
        return await run_in_executor(None, self.exists, keys)

    async def alist_keys(
        self,
        *,
        before: float | None = None,
        after: float | None = None,
        group_ids: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> list[str]:
        """Do as `list_keys`, in a thread."""
        return await run_in_executor(None, self.list_keys, before=before, after=after, group_ids=group_ids, limit=limit)

    async def adelete_keys(self, keys: Sequence[str]) -> None:
        """Do as `delete_keys`, in a thread."""
        await run_in_executor(None, self.delete_keys, keys)

    def _ids(self, keys: Sequence[str]) -> list[str]:
        return [named(_KIND, key, self.namespace) for key in keys]
