"""A collection: a named set of documents that can be ingested, searched and asked.

This is where indexers, tier and decoder meet. It stands above `qa` because `kb.ask(...)` belongs to it
(docs/decisions/0001-collection-above-qa.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from l2m_rag import qa
from l2m_rag.config import Settings, check_name, load_settings
from l2m_rag.errors import CollectionNotFound, CorruptError, IncompatibleError, LoadError, UsageError
from l2m_rag.weights import DEFAULT_DECODER, DEFAULT_EMBEDDER, find

if TYPE_CHECKING:
    from l2m_rag.endpoint import Endpoint
    from l2m_rag.generate import Decoder
    from l2m_rag.indexers.embedding import Embedder
    from l2m_rag.indexers.pipeline import IngestReport, Limits, Progress, Work
    from l2m_rag.memory_tiers.long_term import Fusion, LongTermTier, Mode
    from l2m_rag.memory_tiers.records import DocumentRow, Passage

_EXPORT = ("manifest.json", "documents.arrow", "chunks.arrow", "checksums.json")  # the only members ever read


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What a collection holds.

    Args:
        name: its name.
        path: its folder.
        documents: documents that are in.
        failed: files that could not be read.
        chunks: chunks of the documents.
        bytes: space on disk.
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
    """

    def __init__(self, name: str, folder: Path, settings: Settings) -> None:
        self.name = name
        self.path = folder
        self.settings = settings
        self._tier: LongTermTier | None = None

    # -- in ----------------------------------------------------------------------------------------------------------
    def ingest(
        self,
        *paths: str | Path,
        glob: str | None = None,
        workers: int | None = None,
        prune: bool = False,
        dry_run: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> IngestReport:
        """Read files and folders into the collection; what is in and unchanged costs one stat.

        Args:
            paths: files and folders.
            glob: only files whose name or relative path fits.
            workers: parsing processes; default from the settings.
            prune: remove documents whose file is gone from the folders that are read.
            dry_run: say what would be done, and do nothing.
            progress: called after each file and while vectors are computed.

        Raises:
            UsageError: a path does not exist; nothing was done.
            LockedError: another process is writing.
            IncompatibleError: the collection was made with another embedder.
        """
        from l2m_rag.indexers import pipeline
        from l2m_rag.memory_tiers.long_term import writing

        limits = self._limits(workers)
        if dry_run:
            tier = self._open() if self.exists() else None
            work = pipeline.plan(paths, tier.store if tier else None, limits, glob=glob, prune=prune)
            return _foretell(self.name, work, tier.store.documents() if tier else {})
        if not self.exists() and not pipeline.plan(paths, None, limits, glob=glob).todo:
            return pipeline.IngestReport(self.name)  # nothing to read: no collection is made for it
        with writing(self.path):
            tier = self._open() if self.exists() else self._create()
            tier.store.refresh()
            work = pipeline.plan(paths, tier.store, limits, glob=glob, prune=prune)
            return pipeline.ingest(self.name, work, tier, self._embedder, limits, progress)

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
        tier = self._open()
        vector = None if mode == "text" else self._embedder().encode([text])[0]
        return tier.search(text, vector, k, mode=mode, where=where, fusion=fusion)

    def ask(
        self,
        question: str,
        *,
        free: bool = False,
        where: str | None = None,
        history: Sequence[tuple[str, str]] = (),
        on_text: Callable[[str], object] | None = None,
    ) -> qa.Answer:
        """Answer a question from the documents, with citations.

        Args:
            question: the question.
            free: let the model use its own words instead of quoting.
            where: filter on what may be read, as in `search`.
            history: (question, answer) of the turns before, oldest first.
            on_text: called with each piece of the answer as soon as it is certain.

        Raises:
            CollectionNotFound: there is no such collection.
            UsageError: the question cannot be asked.
        """
        qa.check_question(question)
        self._open()
        return qa.answer(
            question,
            lambda text, k: self.search(text[: qa.LONGEST_QUESTION], k, where=where),
            _language_model(self.settings),
            passages=self.settings.passages,
            budget=self.settings.budget,
            abstain_below=self.settings.abstain_below,
            free=free,
            history=history,
            on_text=on_text,
        )

    def documents(self) -> list[DocumentRow]:
        """Give a row for every document and for every file that could not be read, by id."""
        return sorted(self._open().store.documents().values(), key=lambda row: row.id)

    def info(self) -> CollectionInfo:
        """Say what the collection holds."""
        tier = self._open()
        rows = tier.store.documents().values()
        return CollectionInfo(
            name=self.name,
            path=str(self.path),
            documents=sum(1 for row in rows if not row.error),
            failed=sum(1 for row in rows if row.error),
            chunks=tier.store.count_chunks(),
            bytes=sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file()),
            embedder=tier.manifest.embedder,
            dimension=tier.manifest.dimension,
            format=tier.manifest.format,
            created_at=tier.manifest.created_at,
            updated_at=max((row.ingested_at for row in rows), default=None),
        )

    # -- care --------------------------------------------------------------------------------------------------------
    def exists(self) -> bool:
        """Say whether the collection was ever made."""
        return (self.path / "manifest.json").is_file()

    def delete(self) -> None:
        """Delete the collection and all that it holds."""
        from l2m_rag.memory_tiers.long_term import read_manifest, writing

        with writing(self._existing()):
            with suppress(CorruptError):  # a damaged collection can be deleted too
                read_manifest(self.path)
            grave = Path(tempfile.mkdtemp(prefix=".deleted-", dir=self.path.parent))
            self.path.rename(grave / "collection")
        self._tier = None
        shutil.rmtree(grave)

    def rename(self, name: str) -> Collection:
        """Give the collection another name.

        Raises:
            UsageError: the name cannot be used, or is taken.
        """
        from l2m_rag.memory_tiers.long_term import writing

        target = self.path.with_name(check_name(name))
        if target.exists():
            raise UsageError(f"there is a collection {name!r} already; delete it first or choose another name")
        with writing(self._existing()):
            self.path.rename(target)
        self._tier = None
        return Collection(name, target, self.settings)

    def verify(self) -> VerifyReport:
        """Check every stored row: checksums, and that documents and chunks add up."""
        tier = self._open()
        rows = tier.store.documents()
        counts = tier.store.chunks_per_document()
        problems = [f"chunk {identity}: its text or embedding has been altered" for identity in tier.store.damaged()]
        for name in sorted(rows.keys() | counts.keys()):
            expected = rows[name].chunks if name in rows else 0
            if counts.get(name, 0) != expected:
                problems.append(f"{name}: {counts.get(name, 0)} chunks are stored, {expected} are expected")
        return VerifyReport(not problems, problems, len(rows), sum(counts.values()))

    def repair(self) -> list[str]:
        """Remove what `verify` finds wrong, so that the next ingest reads those documents again; say what was done."""
        from l2m_rag.memory_tiers.long_term import writing

        done: list[str] = []
        with writing(self._existing()):
            tier = self._open()
            damaged = tier.store.damaged()
            if damaged:
                tier.store.delete_chunks(damaged)
                done.append(f"removed {len(damaged)} damaged chunks")
            rows = tier.store.documents()
            counts = tier.store.chunks_per_document()
            wrong = [
                name
                for name in sorted(rows.keys() | counts.keys())
                if counts.get(name, 0) != (rows[name].chunks if name in rows else 0)
            ]
            if wrong:
                tier.store.remove_documents(wrong)
                done.append(
                    f"removed {len(wrong)} incomplete documents; ingest again to bring them back: "
                    + ", ".join(wrong[:5])
                )
            shutil.rmtree(self.path / "hot", ignore_errors=True)
            tier.hot_index()
            done.append("built the hot index again")
        return done

    def optimize(self) -> dict[str, int]:
        """Merge small files, drop old versions and bring the indexes up to date; give the bytes before and after."""
        from l2m_rag.memory_tiers.long_term import writing

        with writing(self._existing()):
            tier = self._open()
            before = self.info().bytes
            tier.store.optimize()
            shutil.rmtree(self.path / "hot", ignore_errors=True)
            tier.hot_index()
        return {"bytes_before": before, "bytes_after": self.info().bytes}

    def migrate(self) -> str:
        """Bring the collection to the present format, and say what was done."""
        from l2m_rag.memory_tiers.long_term import FORMAT

        manifest = self._open().manifest
        return f"collection {self.name!r} has format {manifest.format}, the present one is {FORMAT}; nothing to do"

    def export(self, path: Path) -> Path:
        """Write the collection to one archive, whole or not at all: a zip of Arrow files and JSON with checksums."""
        import pyarrow as pa

        tier = self._open()
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        digests: dict[str, str] = {}
        try:
            with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                members = {"manifest.json": json.dumps(asdict(tier.manifest)).encode()}
                for name, table in tier.store.to_arrow().items():
                    sink = pa.BufferOutputStream()
                    with pa.ipc.new_file(sink, table.schema) as writer:
                        writer.write_table(table)
                    members[f"{name}.arrow"] = sink.getvalue().to_pybytes()
                for name, content in members.items():
                    archive.writestr(name, content)
                    digests[name] = hashlib.sha256(content).hexdigest()
                archive.writestr("checksums.json", json.dumps(digests))
            with scratch.open("rb") as written:
                os.fsync(written.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return path

    # -- inside ------------------------------------------------------------------------------------------------------
    def _existing(self) -> Path:
        if not self.path.is_dir():
            raise CollectionNotFound(
                f"there is no collection {self.name!r}; make it with: l2m ingest PATH -c {self.name}"
            )
        return self.path

    def _open(self) -> LongTermTier:
        from l2m_rag.memory_tiers.long_term import LongTermTier

        if self._tier is None:
            tier = LongTermTier(self.path)
            wanted = DEFAULT_EMBEDDER if self.settings.embedder == "default" else self.settings.embedder
            if tier.manifest.embedder != wanted:
                raise IncompatibleError(
                    f"collection {self.name!r} was made with the embedder {tier.manifest.embedder!r}; the settings say "
                    f"{wanted!r}. Set embedder = {tier.manifest.embedder!r}, or ingest into a new collection"
                )
            self._tier = tier
        return self._tier

    def _create(self) -> LongTermTier:
        from l2m_rag.memory_tiers.long_term import Manifest, create_tier

        embedder = _embedder(self.settings)
        self._tier = create_tier(
            self.path,
            Manifest(
                embedder=embedder.name,
                fingerprint=embedder.fingerprint,
                dimension=embedder.dimension,
                created_at=time.time(),
            ),
        )
        return self._tier

    def _embedder(self) -> Embedder:
        """Give the embedder, checked against the one that made the collection."""
        embedder = _embedder(self.settings)
        made = self._open().manifest
        if (embedder.fingerprint, embedder.dimension) != (made.fingerprint, made.dimension):
            raise IncompatibleError(
                f"collection {self.name!r} was made with other weights of {made.embedder!r} ({made.fingerprint}, "
                f"{made.dimension}-d; now {embedder.fingerprint}, {embedder.dimension}-d). Ingest into a new collection"
            )
        return embedder

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
    manifests = sorted((settings.home / "collections").glob("*/manifest.json"))
    return [_bare(path.parent, settings).info() for path in manifests]


def ask_files(
    files: Sequence[Path],
    question: str,
    settings: Settings,
    *,
    free: bool = False,
    history: Sequence[tuple[str, str]] = (),
    on_text: Callable[[str], object] | None = None,
) -> qa.Answer:
    """Answer a question from some files; they are read on the first question and kept in the home for the next ones.

    Raises:
        LoadError: none of the files could be read.
    """
    qa.check_question(question)
    paths = sorted({os.path.abspath(path) for path in files})
    name = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    collection = Collection(name, settings.home / "files" / name, settings)
    report = collection.ingest(*paths)
    if report.failed and not (report.added or report.updated or report.unchanged):
        first = report.failed[0]
        raise LoadError(first.reason, f"{first.path}: {first.detail}" if first.detail else first.path)
    if not collection.exists():
        raise LoadError("empty", f"there is nothing to read in {', '.join(paths)}")
    return collection.ask(question, free=free, history=history, on_text=on_text)


def import_collection(archive: Path, name: str, settings: Settings | None = None) -> Collection:
    """Make a collection from an export.

    Raises:
        UsageError: the name is taken.
        CorruptError: the archive is not an export, or its checksums do not fit.
    """
    import pyarrow as pa

    from l2m_rag.memory_tiers.long_term import Manifest, create_tier, writing

    collection = open(name, settings=settings)
    if collection.exists():
        raise UsageError(f"there is a collection {name!r} already; delete it first or choose another name")
    try:
        with zipfile.ZipFile(archive) as source:
            members = {member: source.read(member) for member in _EXPORT}
        digests = json.loads(members.pop("checksums.json"))
        altered = [
            member for member, content in members.items() if hashlib.sha256(content).hexdigest() != digests[member]
        ]
        if altered:
            raise CorruptError(f"{archive}: {', '.join(altered)} has been altered; export the collection again")
        manifest = Manifest(**json.loads(members["manifest.json"]))
        documents, chunks = (
            pa.ipc.open_file(members[f"{table}.arrow"]).read_all() for table in ("documents", "chunks")
        )
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise CorruptError(f"{archive} is not an export of a collection ({error})") from error
    with writing(collection.path):
        tier = create_tier(collection.path, manifest)
        tier.store.add_arrow(documents, chunks)
        tier.store.index_text()
    return collection


def _bare(folder: Path, settings: Settings) -> Collection:
    """Give a collection whatever embedder it was made with: what is only listed needs none."""
    from l2m_rag.memory_tiers.long_term import read_manifest

    made = read_manifest(folder).embedder
    return Collection(folder.name, folder, replace(settings, embedder="default" if made == DEFAULT_EMBEDDER else made))


def _foretell(name: str, work: Work, documents: dict[str, DocumentRow]) -> IngestReport:
    from l2m_rag.indexers.pipeline import Failure, IngestReport

    report = IngestReport(name, unchanged=work.unchanged, failed=list(work.known_bad), dry_run=True)
    report.removed = sum(1 for identity in work.gone if identity in documents)
    for file in work.todo:
        if file.error:
            report.failed.append(Failure(file.id, file.error.reason, file.error.detail))
        elif file.id in documents and not documents[file.id].error:
            report.updated += 1
        else:
            report.added += 1
    return report


def _embedder(settings: Settings) -> Embedder:
    if settings.embedder == "default":
        return _load_embedder(str(find(DEFAULT_EMBEDDER, settings)), DEFAULT_EMBEDDER, settings.threads)
    return _load_embedder(settings.embedder, settings.embedder, settings.threads)


def _language_model(settings: Settings) -> Decoder | Endpoint:
    if settings.llm_url:
        return _load_endpoint(settings.llm_url, settings.llm_model, settings.llm_key)
    if settings.model == "default":
        return _load_decoder(str(find(DEFAULT_DECODER, settings)), DEFAULT_DECODER, settings.threads)
    return _load_decoder(settings.model, settings.model, settings.threads)


@lru_cache(maxsize=2)
def _load_embedder(source: str, name: str, threads: int) -> Embedder:
    from l2m_rag.indexers.embedding import Embedder

    return Embedder(source, name=name, threads=threads)


@lru_cache(maxsize=2)
def _load_decoder(source: str, name: str, threads: int) -> Decoder:
    from l2m_rag.generate import Decoder

    return Decoder(source, name=name, threads=threads)


@lru_cache(maxsize=8)
def _load_endpoint(url: str, model: str, key: str) -> Endpoint:
    from l2m_rag.endpoint import Endpoint

    return Endpoint(url, model=model, key=key)
