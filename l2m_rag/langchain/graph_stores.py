"""LangGraph's long-term memory: JSON by namespace and key, found again by meaning and words (extra `langgraph`)."""

from __future__ import annotations

import json
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from langchain_core.runnables import run_in_executor

from l2m_rag.collection import Collection
from l2m_rag.collection import open as open_collection
from l2m_rag.config import Settings
from l2m_rag.conversation import STORE
from l2m_rag.errors import MissingExtraError, UsageError
from l2m_rag.langchain.documents import where_of
from l2m_rag.langchain.keyed import NO_WORDS, named
from l2m_rag.memory_tiers.long_term import Mode
from l2m_rag.memory_tiers.texts import PREFIX, Text, text_of

try:
    from langgraph.store.base import (
        BaseStore,
        GetOp,
        Item,
        ListNamespacesOp,
        MatchCondition,
        Op,
        PutOp,
        Result,
        SearchItem,
        SearchOp,
        TTLConfig,
        get_text_at_path,
    )
except ImportError:
    raise MissingExtraError("langgraph", "langgraph") from None

Namespace = tuple[str, ...]

_KIND = "item"
_ASKED_AT_FIRST = 4  # times as many as are wanted, where a filter may keep few of what a search gives
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


class L2MStore(BaseStore):
    """JSON values by namespace and key in a collection, for what a graph remembers from one thread to the next.

    A query finds items by meaning and words; what is looked at of an item is the strings in its value, or the fields
    that `fields` or `index` name. A namespace holds what lies below it, and never what only begins with its letters.

    Setup:
        pip install 'l2m-rag[langchain,langgraph]'

    Key init args:
        collection: name of the collection, or a `Collection`; it is made when something is first put.
        fields: paths of what is looked at of a value, as in `index` of `put`; None for all strings.
        mode: how a query searches, "hybrid", "dense" or "text"; with "dense" scores are cosines.
        ttl: `default_ttl` in minutes, and `refresh_on_read`, which is True unless it is given.
        settings: of the library; None reads them as the command line does.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MStore

            store = L2MStore("memories", ttl={"default_ttl": 60 * 24 * 30})

    Put and get:
        .. code-block:: python

            store.put(("users", "ada"), "sister", {"fact": "My sister Rosa has moved to Porto."})
            store.get(("users", "ada"), "sister").value

    Search:
        .. code-block:: python

            store.search(("users", "ada"), query="Where does Rosa live?", limit=3)
            store.search(("users",), filter={"age": {"$gte": 40}})

    Forget:
        .. code-block:: python

            store.delete(("users", "ada"), "sister")
            store.sweep_ttl()  # deletes what has expired, which no call has given since

    Async:
        .. code-block:: python

            await store.asearch(("users", "ada"), query="Where does Rosa live?")

    Use within a graph:
        .. code-block:: python

            graph = StateGraph(State).add_node("answer", answer).add_edge(START, "answer").compile(store=store)
    """

    supports_ttl = True

    def __init__(
        self,
        collection: str | Collection = STORE,
        *,
        fields: Sequence[str] | None = None,
        mode: Mode = "hybrid",
        ttl: TTLConfig | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.collection = open_collection(collection, settings=settings) if isinstance(collection, str) else collection
        self.fields = fields
        self.mode = mode
        self.ttl_config = ttl

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Do several operations: first all that read, then all that write, of one key the last only.

        Raises:
            UsageError: an operation cannot be done, or a value holds what JSON cannot; nothing was written.
            LockedError: another process is writing to the collection, and went on for half a minute.
        """
        ops, now = list(ops), time.time()
        puts = {(op.namespace, op.key): op for op in ops if isinstance(op, PutOp)}
        old = self._texts([_name(*which) for which in puts], now)
        texts = [self._text(op, old.get(_name(*which)), now) for which, op in puts.items() if op.value is not None]
        gone = [_name(*which) for which, op in puts.items() if op.value is None]
        got = self._texts([_name(op.namespace, op.key) for op in ops if isinstance(op, GetOp)], now)
        read: list[str] = []  # ids of what was read and shall live on for as long again
        results = [self._read(op, got, now, read) for op in ops]
        self._refresh(read)
        self.collection.put(texts)
        if gone:
            self.collection.drop(gone)
        return results

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Do as `batch`, in a thread."""
        return await run_in_executor(None, self.batch, list(ops))

    def sweep_ttl(self) -> int:
        """Delete the items that have expired; give how many there were."""
        now = time.time()
        late = [text.id for text in self.collection.texts(_within(()) + f" AND metadata.expires_at <= {now!r}")]
        # one that was put or read since lives on
        return self.collection.amend(late, lambda text: text.metadata if _lives(text, now) else None)

    def _read(self, op: Op, got: dict[str, Text], now: float, read: list[str]) -> Result:
        if isinstance(op, PutOp):
            return None
        if isinstance(op, ListNamespacesOp):
            return self._namespaces(op, now)
        if isinstance(op, GetOp):
            one = got.get(_name(op.namespace, op.key))
            found: list[tuple[Text, float | None]] = [] if one is None else [(one, None)]
        elif isinstance(op, SearchOp):
            found = self._found(op, now)
        else:
            raise UsageError(f"an operation must be a GetOp, SearchOp, PutOp or ListNamespacesOp; it is {op!r}")
        read += [text.id for text, _ in found if op.refresh_ttl and text.metadata["ttl"] is not None]
        if isinstance(op, SearchOp):
            return [SearchItem(**_facts(text), score=score) for text, score in found]
        return Item(**_facts(found[0][0])) if found else None

    def _texts(self, ids: Sequence[str], now: float) -> dict[str, Text]:
        return {text.id: text for text in (self.collection.get(ids) if ids else []) if _lives(text, now)}

    def _text(self, op: PutOp, old: Text | None, now: float) -> Text:
        if not isinstance(op.value, Mapping):
            raise UsageError(f"the value of {op.key!r} in {op.namespace} must be a dict; it is {op.value!r}")
        if op.ttl is not None and not (op.ttl >= 0 and math.isfinite(op.ttl)):
            raise UsageError(f"the ttl of {op.key!r} in {op.namespace} must be minutes, 0 or more; it is {op.ttl!r}")
        value = dict(op.value)
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the value of {op.key!r} in {op.namespace} cannot be stored as JSON: {error}") from error
        if not same:
            raise UsageError(
                f"the value of {op.key!r} in {op.namespace} would not come back from JSON as it is: {value!r}; give "
                f"lists in place of tuples, and strings as names"
            )
        paths = self.fields if op.index is None else op.index
        if isinstance(paths, str) or (isinstance(paths, bool) and paths):
            raise UsageError(
                f"the index of {op.key!r} in {op.namespace} must be False or a list of paths; it is {paths!r}"
            )
        if paths is False:
            words = ""
        elif paths is None:
            words = "\n".join(_strings(value)) or json.dumps(value, ensure_ascii=False)
        else:
            words = "\n".join(text for path in paths for text in get_text_at_path(value, path) if text)
        facts: dict[str, Any] = {
            "value": value,
            "findable": bool(words),
            "created_at": old.metadata["created_at"] if old else now,
            "updated_at": now,
            "ttl": op.ttl,
        }
        if op.ttl is not None:
            facts["expires_at"] = now + op.ttl * 60
        levels = (op.namespace[:depth] for depth in range(len(op.namespace) + 1))
        return Text(_name(op.namespace, op.key), words or NO_WORDS, {**facts, **dict(map(_level, levels))})

    def _found(self, op: SearchOp, now: float) -> list[tuple[Text, float | None]]:
        """Give the items of a search and their scores; without a query in the order in which they were first put."""
        where = _within(op.namespace_prefix) + f" AND (metadata.expires_at IS NULL OR metadata.expires_at > {now!r})"
        if not op.query:
            kept = [text for text in self.collection.texts(where) if _fits(text.metadata["value"], op.filter)]
            return [(text, None) for text in kept[op.offset : op.offset + op.limit]]
        wanted = op.offset + op.limit
        if wanted < 1 or not self.collection.exists():
            return []
        k = wanted * _ASKED_AT_FIRST if op.filter else wanted
        while True:
            passages = self.collection.search(op.query, k, mode=self.mode, where=where + " AND metadata.findable")
            scored = [(text_of(passage.chunk), passage.score) for passage in passages]
            fitting = [(text, score) for text, score in scored if _fits(text.metadata["value"], op.filter)]
            if len(fitting) >= wanted or len(passages) < k:
                return [*fitting[op.offset : wanted]]
            k *= 4  # the filter kept few of them

    def _namespaces(self, op: ListNamespacesOp, now: float) -> list[Namespace]:
        if not self.collection.exists():
            return []
        late = {text.id for text in self.collection.texts(_within(()) + f" AND metadata.expires_at <= {now!r}")}
        ids = {row.id.removeprefix(PREFIX) for row in self.collection.documents()} - late
        every = {_place(one)[0] for one in ids if one.startswith(f"{_KIND}:[")}
        kept = {one for one in every if all(_matches(one, condition) for condition in op.match_conditions or ())}
        cut = sorted({one[: op.max_depth] for one in kept})
        return cut[op.offset : op.offset + op.limit]

    def _refresh(self, ids: Sequence[str]) -> None:
        def longer(text: Text) -> dict[str, Any]:
            now, ttl = time.time(), text.metadata["ttl"]
            if ttl is None or not _lives(text, now):  # it was put anew since, or is late
                return text.metadata
            return {**text.metadata, "expires_at": now + ttl * 60}

        self.collection.amend(ids, longer)


def _name(namespace: Namespace, key: str) -> str:
    return named(_KIND, key, *namespace)


def _place(one: str) -> tuple[Namespace, str]:
    """Give the namespace and the key of an id."""
    *namespace, key = json.loads(one.removeprefix(f"{_KIND}:"))
    return tuple(namespace), key


def _level(namespace: Namespace) -> tuple[str, str]:
    """Give the mark that all items at or below a namespace have, and no others."""
    return f"under_{len(namespace)}", json.dumps(namespace)


def _within(namespace: Namespace) -> str:
    return where_of(dict([_level(namespace)])) or ""


def _lives(text: Text, now: float) -> bool:
    return bool(text.metadata.get("expires_at", math.inf) > now)


def _facts(text: Text) -> dict[str, Any]:
    namespace, key = _place(text.id)
    times = {name: datetime.fromtimestamp(text.metadata[name], UTC) for name in ("created_at", "updated_at")}
    return {"namespace": namespace, "key": key, "value": text.metadata["value"], **times}


def _strings(value: object) -> Iterator[str]:
    """Give the strings of a value, however deep, without the names they have there."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _matches(namespace: Namespace, condition: MatchCondition) -> bool:
    path = condition.path
    if condition.match_type not in ("prefix", "suffix"):
        raise UsageError(f"match_type ({condition.match_type!r}) must be prefix or suffix")
    if len(namespace) < len(path):
        return False
    part = namespace[: len(path)] if condition.match_type == "prefix" else namespace[len(namespace) - len(path) :]
    return all(wanted in ("*", label) for label, wanted in zip(part, path, strict=True))


def _fits(value: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> bool:
    """Say whether a value is what a filter wants, as LangGraph's store in memory compares them."""
    return all(_agrees(value.get(name), one) for name, one in (wanted or {}).items())


def _agrees(value: object, wanted: object) -> bool:
    if isinstance(wanted, Mapping):
        if any(name.startswith("$") for name in wanted):
            return all(_compares(value, name, than) for name, than in wanted.items())
        return isinstance(value, dict) and _fits(value, wanted)
    if isinstance(wanted, list | tuple):
        return isinstance(value, list) and len(value) == len(wanted) and all(map(_agrees, value, wanted))
    return value == wanted


def _compares(value: Any, name: str, than: Any) -> bool:
    """Compare as numbers; what is none, a missing value among them, fits no comparison.

    Raises:
        UsageError: there is no such operator, or it was given what is no number.
    """
    if name == "$eq":
        return bool(value == than)
    if name == "$ne":
        return bool(value != than)
    if name not in _COMPARISONS:
        raise UsageError(f"Unsupported operator: {name!r}; there are $eq, $ne, {', '.join(_COMPARISONS)}")
    try:
        limit = float(than)
    except (TypeError, ValueError):
        raise UsageError(f"{name} compares numbers; {than!r} is none") from None
    try:
        return _COMPARISONS[name](float(value), limit)
    except (TypeError, ValueError):
        return False
