"""A collection: a named set of documents that can be ingested, searched and asked.

This is where indexers, tier and decoder meet. It stands above `qa` because `kb.ask(...)` belongs to it
(docs/decisions/0001-collection-above-qa.md).
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from l2m_rag import qa
from l2m_rag.config import LONGEST_QUESTION, Settings, check_name, load_settings
from l2m_rag.errors import (
    CollectionNotFound,
    CorruptError,
    IncompatibleError,
    LoadError,
    LockedError,
    ReadOnlyError,
    UsageError,
)
from l2m_rag.memory_tiers.places import Where, place_of, writing
from l2m_rag.memory_tiers.records import HOUR, Passage, merged
from l2m_rag.models import cosines, load_embedder, load_language_model
from l2m_rag.weights import DEFAULT_EMBEDDER

if TYPE_CHECKING:
    from l2m_rag.indexers.embedding import Embedder, Encoder
    from l2m_rag.indexers.pipeline import IngestReport, Limits, Progress
    from l2m_rag.indexers.ray_ingest import RayWorkers
    from l2m_rag.memory_tiers.long_term import Fusion, LongTermTier, Mode
    from l2m_rag.memory_tiers.records import DocumentRow
    from l2m_rag.memory_tiers.state_table import StateFormat
    from l2m_rag.memory_tiers.states import StateTier
    from l2m_rag.memory_tiers.texts import Text
    from l2m_rag.memory_tiers.usage import DiskPolicy

PATIENCE = 30.0
"""Seconds for which `put` and `drop` wait for another writer."""
TIDY_AFTER = 500
"""Texts that are put in before files are merged and words indexed, which a search pays 29 us a text for until then."""

_BEGINNING = 2  # passages that are read before the beginning of the only document that was found

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What a collection holds.

    Args:
        name: its name.
        path: its folder, or its address on object storage.
        documents: documents that are in.
        failed: files that could not be read.
        chunks: chunks of the documents.
        bytes: space on disk or object storage.
        embedder: name of the embedder.
        dimension: of its vectors.
        format: version of what is stored.
        created_at: seconds since 1970.
        updated_at: when a document was last ingested, seconds since 1970; None when there is none.
    """

    name: str
    path: str
    documents: int
    failed: int
    chunks: int
    bytes: int
    embedder: str
    dimension: int
    format: int
    created_at: float
    updated_at: float | None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a check of every stored row found.

    Args:
        ok: nothing is wrong.
        problems: one sentence each.
        documents: documents looked at.
        chunks: chunks looked at.
    """

    ok: bool
    problems: list[str] = field(default_factory=list)
    documents: int = 0
    chunks: int = 0


class Collection:
    """A named set of documents; nothing is touched before it is used.

    Args:
        name: its name.
        folder: where it lies.
        settings: how it reads, cuts, embeds and answers.
        embedder: in place of the one that the settings name; texts can be put in with any, files only be ingested with
            one of ours.
    """

    def __init__(self, name: str, folder: Where, settings: Settings, embedder: Encoder | None = None) -> None:
        self.name = name
        self.path = folder
        self.settings = settings
        self._given = embedder
        self._loose = 0  # texts that were put in since files were last merged
        self._tidying: Thread | None = None
        self._tier: LongTermTier | None = None
        self._opened: str | None = None  # the manifest that the tier was opened with

    # -- in ----------------------------------------------------------------------------------------------------------
    def ingest(
        self,
        *paths: str | Path,
        glob: str | None = None,
        workers: int | None = None,
        prune: bool = False,
        dry_run: bool = False,
        ray: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> IngestReport:
        """Read files and folders into the collection; what is in and unchanged costs one stat.

        Args:
            paths: files and folders.
            glob: only files whose name or relative path fits.
            workers: parsing processes; default from the settings.
            prune: remove documents whose file is gone from the folders that are read.
            dry_run: say what would be done, and do nothing.
            ray: address of the Ray cluster whose workers read and embed: `local` starts one on this machine; `auto`,
                `HOST:PORT` or `ray://HOST:PORT`. Files and models must lie at the same paths on all its machines.
            progress: called after each file and while vectors are computed.

        Raises:
            UsageError: a path does not exist; nothing was done.
            LockedError: another process is writing.
            IncompatibleError: the collection was made with another embedder.
            MissingExtraError: `ray` is given, and not installed.
            L2MError: the Ray cluster cannot be reached or used; what was written by then is kept.
        """
        from l2m_rag.indexers import pipeline

        if self._given is not None:
            raise UsageError(
                f"collection {self.name!r} was opened with the embedder {self._given.name!r}, for texts; files are "
                f"read with one that the settings name"
            )
        limits = self._limits(workers)
        if dry_run:
            tier = self.tier() if self.exists() else None
            work = pipeline.plan(paths, tier.store if tier else None, limits, glob=glob, prune=prune)
            return pipeline.foretell(self.name, work, tier.store.documents() if tier else {})
        with ExitStack() as stack:
            workers_of_ray = stack.enter_context(closing(self._ray_workers(ray, limits))) if ray is not None else None
            if not self.exists():
                if not pipeline.plan(paths, None, limits, glob=glob).todo:
                    return pipeline.IngestReport(self.name)  # nothing to read: no collection is made for it
                embedder = self._load()  # one that cannot be loaded leaves no folder
                if workers_of_ray:  # nor does a cluster that cannot be used
                    workers_of_ray.start(embedder.fingerprint)
            stack.enter_context(writing(self.path))
            tier = self.tier() if self.exists() else self._create()
            tier.check_writable()
            tier.store.refresh()
            work = pipeline.plan(paths, tier.store, limits, glob=glob, prune=prune)
            if workers_of_ray and any(file.error is None for file in work.todo):
                workers_of_ray.start(tier.manifest.fingerprint)
            return pipeline.ingest(self.name, work, tier, self._cutter, limits, progress, workforce=workers_of_ray)

    def put(self, texts: Sequence[Text]) -> None:
        """Insert texts of a program beside the documents, or replace those whose id is there; they are found at once.

        Args:
            texts: with ids that differ.

        Raises:
            UsageError: an id, a text or its metadata cannot be stored; nothing was written.
            LockedError: another process is writing, and went on for `PATIENCE` seconds.
            IncompatibleError: the collection was made with another embedder.
        """
        from l2m_rag.memory_tiers import texts as stored

        if not texts:
            return
        chunks = stored.chunks_of(texts)
        vectors = self._load().encode([text.text for text in texts])
        with self._turn():
            tier = self._newest() if self.exists() else self._create()
            self._embedder()
            stored.put(tier, chunks, vectors)
        self._wrote(len(texts))

    def amend(self, ids: Sequence[str], change: Callable[[Text], dict[str, Any] | None]) -> int:
        """Give texts other metadata, or delete them, with no other writer in between; nothing is embedded anew.

        Args:
            ids: of the texts; those that are not there are passed over.
            change: gives the metadata that a text shall have, or None to delete it.

        Returns:
            How many were changed or deleted.

        Raises:
            UsageError: metadata cannot be stored; nothing was written.
            LockedError: another process is writing, and went on for `PATIENCE` seconds.
        """
        import numpy as np

        from l2m_rag.memory_tiers import texts as stored

        if not ids or not self.exists():
            return 0
        with self._turn():
            tier = self._newest()
            made = [(text, change(text)) for text in stored.get(tier, ids)]
            gone = [text.id for text, facts in made if facts is None]
            changed = [replace(text, metadata=facts) for text, facts in made if facts not in (None, text.metadata)]
            chunks = stored.chunks_of(changed)
            if chunks:
                vectors = tier.store.vectors_named([chunk.id for chunk in chunks])
                stored.put(tier, chunks, np.stack([vectors[chunk.id] for chunk in chunks]))
            if gone:
                stored.drop(tier, gone)
        self._wrote(len(changed))
        return len(changed) + len(gone)

    def _wrote(self, texts: int) -> None:
        """Count what was written, and have small files merged when it is much."""
        self._loose += texts
        if self._loose >= TIDY_AFTER and not (self._tidying and self._tidying.is_alive()):
            self._loose = 0
            other = Collection(self.name, self.path, self.settings, self._given)  # with tables of its own
            self._tidying = Thread(target=_tidy, args=(other,), name="l2m-tidying")
            self._tidying.start()

    def settle(self) -> None:
        """Wait until what `put` has begun in a thread of its own is done: small files merged, words indexed."""
        if self._tidying is not None:
            self._tidying.join()
            self._tidying = None

    def get(self, ids: Sequence[str]) -> list[Text]:
        """Give the texts of those ids that are there, in the order asked for, each once."""
        from l2m_rag.memory_tiers import texts as stored

        return stored.get(self._newest(), ids) if self.exists() else []

    def texts(self, where: str) -> list[Text]:
        """Give all texts of a program that a filter keeps, in the order in which they came in.

        Raises:
            UsageError: the filter cannot be used.
        """
        from l2m_rag.memory_tiers import texts as stored

        return stored.fitting(self._newest(), where) if self.exists() else []

    def drop(self, ids: Sequence[str]) -> list[str]:
        """Delete texts by id, for good; give the ids of those that were there.

        Raises:
            LockedError: another process is writing, and went on for `PATIENCE` seconds.
        """
        from l2m_rag.memory_tiers import texts as stored

        if not self.exists():
            return []
        with self._turn():
            return stored.drop(self._newest(), ids)

    @contextmanager
    def states(
        self, form: StateFormat, *, namespace: str = "default", policy: DiskPolicy = "lru"
    ) -> Iterator[StateTier]:
        """Give what the working memory of a model let go of, to read and to add to, within the setting `disk_budget`.

        Other writers are kept out until the block ends; then all of it is on the disk.

        Args:
            form: what its records share; another one than they were made with is refused.
            namespace: whose states; those of others are never seen.
            policy: what goes when the budget is full: what was used longest ago, or what the router scored lowest.

        Raises:
            CollectionNotFound: there is no such collection.
            IncompatibleError: the states were made with another format.
            LockedError: another process is writing, and went on for `PATIENCE` seconds.
            UsageError: the collection lies on object storage, or the budget is less than one record takes.
        """
        self._existing()
        with self._turn():
            budget = self.settings.disk_budget or None
            with self._newest().states(form, namespace=namespace, disk_bytes=budget, policy=policy) as tier:
                yield tier

    # -- out ---------------------------------------------------------------------------------------------------------
    def search(
        self,
        text: str,
        k: int = 10,
        *,
        mode: Mode = "hybrid",
        where: str | None = None,
        fusion: Fusion = "scores",
    ) -> list[Passage]:
        """Give the k passages that fit a text best, best first.

        Args:
            text: what to look for.
            k: at most this many.
            mode: "hybrid", "dense" (by meaning) or "text" (by words).
            where: SQL filter over document, page, heading, start, end and `metadata.KEY`.
            fusion: "scores" or "rrf", see `memory_tiers.long_term`.

        Raises:
            CollectionNotFound: there is no such collection.
            UsageError: the text is blank, or the filter cannot be used.
        """
        qa.check_question(text)
        text = text.encode("utf-8", "replace").decode()  # bytes of a command line may stand in it as lone surrogates
        tier = self.tier()
        vector = None if mode == "text" else self._embedder().encode([text])[0]
        return tier.search(text, vector, k, mode=mode, where=where, fusion=fusion)

    def evidence(self, text: str, k: int, where: str | None = None) -> list[Passage]:
        """Give the passages that a question is answered from: those that fit best, and the beginning of the document.

        It is among the first where all that is found is of one document, as what that is, whose and of which day stands
        there, in words that no question has.

        Args:
            text: what to look for.
            k: at most this many.
            where: filter, as in `search`.

        Raises:
            CollectionNotFound: there is no such collection.
            UsageError: the text is blank, or the filter cannot be used.
        """
        found = self.search(text, k, where=where)
        documents = {passage.chunk.document for passage in found}
        there = any(passage.chunk.ordinal == 0 for passage in found[: _BEGINNING + 1])
        if len(documents) != 1 or there or k <= _BEGINNING:
            return found
        first = [passage for passage in found if not passage.chunk.ordinal]
        if not first:
            start = f"{of_document(documents.pop())} AND ordinal = 0"
            first = self.search(text, 1, where=f"{start} AND ({where})" if where else start)
        rest = [passage for passage in found if passage.chunk.ordinal]
        return [*rest[:_BEGINNING], *first, *rest[_BEGINNING:]][:k]

    def ask(
        self,
        question: str,
        *,
        free: bool = False,
        where: str | None = None,
        abstain_below: float | None = None,
        history: Sequence[tuple[str, str]] = (),
        also: Callable[[str], list[Passage]] | None = None,
        on_text: Callable[[str], object] | None = None,
    ) -> qa.Answer:
        """Answer a question from the documents, with citations.

        Args:
            question: the question.
            free: let the model use its own words instead of quoting.
            where: filter on what may be read, as in `search`.
            abstain_below: probability below which no answer is given; default from the settings.
            history: (question, answer) of the turns before, oldest first.
            also: gives passages from elsewhere that fit the question; they are read in the order of their cosines.
            on_text: called with each piece of the answer as soon as it is certain.

        Raises:
            CollectionNotFound: there is no such collection.
            UsageError: the question cannot be asked.
        """
        qa.check_question(question)
        self.tier()
        return qa.answer(
            question,
            lambda text, k: merged(self.evidence(text[:LONGEST_QUESTION], k, where), also(question) if also else []),
            load_language_model(self.settings),
            passages=self.settings.passages,
            budget=self.settings.budget,
            focus=self.settings.focus,
            enough=self.settings.enough,
            closeness=self.closeness,
            abstain_below=self.settings.abstain_below if abstain_below is None else abstain_below,
            free=free,
            history=history,
            on_text=on_text,
        )

    def closeness(self, question: str, texts: Sequence[str]) -> list[float]:
        """Give the cosine of a question with each of some texts."""
        return cosines(self._embedder(), question, texts)

    def text(self, document: str) -> str:
        """Give the text of a document, each character at its offset; white space between chunks becomes line breaks.

        Raises:
            UsageError: the collection has no text of such a document.
        """
        chunks = self._newest().store.chunks_of(document)
        if not chunks:
            raise UsageError(f"collection {self.name!r} has no text of a document {document!r}")
        letters = ["\n"] * max(chunk.end for chunk in chunks)
        for chunk in chunks:
            letters[chunk.start : chunk.end] = chunk.text
        return "".join(letters)

    def documents(self) -> list[DocumentRow]:
        """Give a row for every document and for every file that could not be read, by id."""
        return sorted(self._newest().store.documents().values(), key=lambda row: row.id)

    def info(self) -> CollectionInfo:
        """Say what the collection holds."""
        tier = self._newest()
        rows = tier.store.documents().values()
        return CollectionInfo(
            name=self.name,
            path=str(self.path),
            documents=sum(1 for row in rows if not row.error),
            failed=sum(1 for row in rows if row.error),
            chunks=tier.store.count_chunks(),
            bytes=sum(size for _, size in place_of(self.path).files()),
            embedder=tier.manifest.embedder,
            dimension=tier.manifest.dimension,
            format=tier.manifest.format,
            created_at=tier.manifest.created_at,
            updated_at=max((row.ingested_at for row in rows), default=None),
        )

    # -- care --------------------------------------------------------------------------------------------------------
    def exists(self) -> bool:
        """Say whether the collection was ever made."""
        return place_of(self.path).stamp("manifest.json") is not None

    def delete(self) -> None:
        """Delete the collection and all that it holds."""
        self.settle()
        place_of(self._existing()).remove()
        self._tier = None

    def rename(self, name: str) -> Collection:
        """Give the collection another name.

        Raises:
            CollectionNotFound: there is no such collection.
            UsageError: the name cannot be used, or is taken; or the collection lies on object storage.
        """
        from l2m_rag.memory_tiers.long_term import read_manifest

        target = self.path.with_name(check_name(name))
        if place_of(target).there():
            raise UsageError(f"there is a collection {name!r} already; delete it first or choose another name")
        read_manifest(self.path)
        self.settle()
        place_of(self._existing()).rename(target)
        self._tier = None
        return Collection(name, target, self.settings)

    def verify(self) -> VerifyReport:
        """Check every stored row: checksums, and that documents and chunks add up.

        Raises:
            CorruptError: the tables cannot be read at all.
        """
        tier = self._newest()
        problems = tier.verify()
        return VerifyReport(not problems, problems, tier.store.count_documents(), len(tier))

    def repair(self) -> list[str]:
        """Remove what `verify` finds wrong, so that the next ingest reads those documents again; say what was done."""
        with writing(self._existing()):
            return self._newest().repair()

    def optimize(self, older_than: float = HOUR) -> dict[str, int]:
        """Merge small files, drop old versions and bring the indexes up to date; give the bytes before and after.

        Args:
            older_than: seconds for which versions are kept, for those who have them open. With 0 nothing is left on
                the disk of the documents and texts that were deleted.
        """
        with writing(self._existing()):
            tier = self._newest()
            before = self.info().bytes
            tier.compact(older_than)
        return {"bytes_before": before, "bytes_after": self.info().bytes}

    def migrate(self) -> str:
        """Bring the collection to the present format, and say what was done."""
        from l2m_rag.memory_tiers.long_term import FORMAT, migrate

        with writing(self._existing()):
            before = migrate(self.path)
        self._tier = None
        return f"is in format {FORMAT} already" if before == FORMAT else f"was brought from format {before} to {FORMAT}"

    def export(self, path: Path) -> Path:
        """Write the collection to one archive, whole or not at all: a zip of Arrow files and JSON with checksums.

        Raises:
            LockedError: another process is writing to the collection.
        """
        from l2m_rag.memory_tiers.archive import write_archive

        with self._at_rest() as tier:
            write_archive(tier, path)
        return path

    # -- inside ------------------------------------------------------------------------------------------------------
    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the writer's lock; what another one writes is waited for, as it is mostly soon over."""
        until = time.monotonic() + PATIENCE
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(writing(self.path))
                    break
                except LockedError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.01)
            yield

    @contextmanager
    def _at_rest(self) -> Iterator[LongTermTier]:
        """Keep writers out, so that both tables are of one moment; nobody writes where the disk takes nothing."""
        with ExitStack() as stack:
            with suppress(ReadOnlyError):
                stack.enter_context(writing(self._existing()))
            yield self._newest()

    def _newest(self) -> LongTermTier:
        """Give the tier at the newest version, which another process may have written."""
        tier = self.tier()
        tier.store.refresh()
        return tier

    def _existing(self) -> Where:
        if not place_of(self.path).there():
            raise CollectionNotFound(
                f"there is no collection {self.name!r}; make it with: l2m ingest PATH -c {self.name}"
            )
        return self.path

    def tier(self) -> LongTermTier:
        """Give the long-term tier, opened once, and again when another process has made the collection anew.

        Raises:
            CollectionNotFound: there is no such collection.
            IncompatibleError: it was made with another embedder, or by a newer version.
            CorruptError: it cannot be read.
        """
        from l2m_rag.memory_tiers.long_term import LongTermTier

        manifest = place_of(self.path).stamp("manifest.json")
        if self._tier is None or self._opened != manifest:
            self._tier = None
            tier = LongTermTier(self.path)
            named = DEFAULT_EMBEDDER if self.settings.embedder == "default" else self.settings.embedder
            wanted = self._given.name if self._given else named
            made = tier.manifest.embedder
            if made != wanted:
                mend = (
                    f"it was opened with {wanted!r}. Open it with the one that made it, or take another collection"
                    if self._given
                    else f"the settings say {wanted!r}. Set embedder = {made!r}, or ingest into a new collection"
                )
                raise IncompatibleError(f"collection {self.name!r} was made with the embedder {made!r}; {mend}")
            self._tier, self._opened = tier, manifest
        return self._tier

    def _create(self) -> LongTermTier:
        from l2m_rag.memory_tiers.long_term import Manifest, create_tier

        embedder = self._load()
        create_tier(
            self.path,
            Manifest(
                embedder=embedder.name,
                fingerprint=embedder.fingerprint,
                dimension=embedder.dimension,
                created_at=time.time(),
            ),
        )
        return self.tier()

    def _load(self) -> Encoder:
        """Give the embedder that was given, or that the settings name."""
        return self._given or load_embedder(self.settings)

    def _embedder(self) -> Encoder:
        """Give the embedder, checked against the one that made the collection."""
        embedder = self._load()
        made = self.tier().manifest
        if (embedder.fingerprint, embedder.dimension) != (made.fingerprint, made.dimension):
            raise IncompatibleError(
                f"collection {self.name!r} was made with other weights of {made.embedder!r} ({made.fingerprint}, "
                f"{made.dimension}-d; now {embedder.fingerprint}, {embedder.dimension}-d). Ingest into a new collection"
            )
        return embedder

    def _cutter(self) -> Embedder:
        """Give the embedder, whose tokenizer also says where texts are cut."""
        self._embedder()
        return load_embedder(self.settings)

    def _ray_workers(self, address: str, limits: Limits) -> RayWorkers:
        """Give the workers of a Ray cluster, which has been seen to answer; they load the embedder by themselves."""
        from l2m_rag.indexers.ray_ingest import RayWorkers

        named = self.settings.embedder
        # the key is no business of theirs, and they run in another folder
        settings = replace(
            self.settings, llm_key="", embedder=os.path.abspath(named) if Path(named).is_dir() else named
        )
        return RayWorkers(address, partial(load_embedder, settings), limits, threads=self.settings.threads)

    def _limits(self, workers: int | None) -> Limits:
        from l2m_rag.indexers.pipeline import Limits

        return Limits(
            chunk_size=self.settings.chunk_size,
            chunk_overlap=self.settings.chunk_overlap,
            workers=workers or self.settings.workers,
            timeout=self.settings.file_timeout,
            memory=self.settings.file_memory,
            max_bytes=self.settings.file_max_bytes,
        )


def open(name: str = "default", *, settings: Settings | None = None) -> Collection:
    """Give a collection by name; it is made when something is first ingested.

    Raises:
        UsageError: the name cannot be used.
    """
    settings = settings or load_settings()[0]
    return Collection(check_name(name), settings.home / "collections" / name, settings)


def list_collections(settings: Settings | None = None) -> list[CollectionInfo]:
    """Say of every collection what it holds, by name."""
    settings = settings or load_settings()[0]
    found = []
    for name in place_of(settings.home / "collections").holding("manifest.json"):
        try:
            found.append(_bare(settings.home / "collections" / name, settings).info())
        except (CorruptError, IncompatibleError, CollectionNotFound) as error:  # the others are listed all the same
            logger.warning("%s", error)
    return found


def open_files(files: Sequence[Path], settings: Settings) -> Collection:
    """Give a collection of some files, to be asked without naming it.

    They are read where that was not done yet or they have changed, and kept in the home for the next questions.

    Raises:
        LoadError: none of the files could be read.
    """
    paths = sorted({os.path.abspath(path) for path in files})
    name = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    collection = Collection(name, settings.data / "files" / name, settings)
    report = collection.ingest(*paths)
    if report.failed and not (report.added or report.updated or report.unchanged):
        first = report.failed[0]
        raise LoadError(first.reason, f"{first.path}: {first.detail}" if first.detail else first.path)
    if not collection.exists():
        raise LoadError("empty", f"there is nothing to read in {', '.join(paths)}")
    return collection


def of_document(document: str) -> str:
    """Give the filter that keeps one document alone."""
    return "document = '" + document.replace("'", "''") + "'"


def import_collection(archive: Path, name: str, settings: Settings | None = None) -> Collection:
    """Make a collection from an export.

    Raises:
        UsageError: the name is taken.
        CorruptError: the archive is not an export, or its checksums do not fit.
    """
    from l2m_rag.memory_tiers.archive import restore_archive

    collection = open(name, settings=settings)
    if collection.exists():
        raise UsageError(f"there is a collection {name!r} already; delete it first or choose another name")
    restore_archive(archive, collection.path)
    return collection


def _tidy(kb: Collection) -> None:
    """Merge the small files that single writes leave, and index their words; no search waits for it."""
    try:
        with kb._turn():
            if kb.exists():
                kb._newest().store.index_text()
    except Exception as error:  # nothing is lost by it, and no one waits for it
        logger.warning("collection %r was not tidied up: %s", kb.name, error)


def _bare(folder: Where, settings: Settings) -> Collection:
    """Give a collection whatever embedder it was made with: what is only listed needs none."""
    from l2m_rag.memory_tiers.long_term import read_manifest

    made = read_manifest(folder).embedder
    return Collection(folder.name, folder, replace(settings, embedder="default" if made == DEFAULT_EMBEDDER else made))
