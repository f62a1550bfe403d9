"""A collection in one file: a zip of Arrow files and JSON with their checksums, read by fixed names only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from l2m_rag.errors import CorruptError, IncompatibleError, L2MError
from l2m_rag.memory_tiers.lance_store import LanceStore
from l2m_rag.memory_tiers.long_term import FORMAT, LongTermTier, Manifest, create_tier
from l2m_rag.memory_tiers.places import Where, place_of
from l2m_rag.memory_tiers.state_table import StateFormat, form_of

_EXPORT = ("manifest.json", "documents.arrow", "chunks.arrow", "checksums.json")  # the only members,
_STATES = ("states.json", "states.arrow")  # and these together or not at all
_MAX_DIMENSION = 65_536


def write_archive(tier: LongTermTier, path: Path) -> None:
    """Write a tier, which nobody is writing to, to an archive that is there whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    digests: dict[str, str] = {}
    try:
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            members = {"manifest.json": json.dumps(asdict(tier.manifest)).encode()}
            tables = tier.store.to_arrow()
            if states := tier.state_table():
                members["states.json"] = json.dumps(states.pin["form"]).encode()
                tables["states"] = states.to_arrow()
            for name, table in tables.items():
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


def restore_archive(archive: Path, target: Where) -> None:
    """Make a collection from an archive, whole or not at all.

    Raises:
        UsageError: there is something at `target` already.
        CorruptError: the archive is not an export, or its checksums do not fit.
        IncompatibleError: a newer version wrote it.
    """
    try:
        found = read_archive(archive)

        def fill(store: LanceStore) -> None:
            store.add_arrow(found.documents, found.chunks)
            if store.damaged():
                raise CorruptError("what is stored of some chunks has been altered")
            store.index_text()

        with place_of(target).anew() as made:
            tier = create_tier(made, found.manifest, fill)
            if found.states is not None:
                tier.put_states(*found.states)
    except (CorruptError, zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        if isinstance(error, L2MError) and not isinstance(error, CorruptError):
            raise
        raise CorruptError(f"{archive} is not an export of a collection, or was altered ({error})") from error


class Archive(NamedTuple):
    """What an export holds; of states their format and rows, or None."""

    manifest: Manifest
    documents: pa.Table
    chunks: pa.Table
    states: tuple[StateFormat, pa.Table] | None


def read_archive(archive: Path) -> Archive:
    """Read and check an export."""
    members = _members(archive)
    digests = json.loads(members.pop("checksums.json"))
    for member, content in members.items():
        if hashlib.sha256(content).hexdigest() != digests[member]:
            raise CorruptError(f"{member} has another checksum")
    found = json.loads(members["manifest.json"])
    if int(found["format"]) > FORMAT:
        raise IncompatibleError(
            f"{archive} has format {found['format']}; this version reads up to {FORMAT}. Upgrade l2m-rag"
        )
    manifest = Manifest(**found)
    if type(manifest.dimension) is not int or not 0 < manifest.dimension <= _MAX_DIMENSION:
        raise CorruptError(f"its vectors have {manifest.dimension!r} dimensions")
    tables = {name: pa.ipc.open_file(members[name]).read_all() for name in members if name.endswith(".arrow")}
    states = None
    if "states.json" in members:
        states = form_of(json.loads(members["states.json"]), archive), tables["states.arrow"]
    return Archive(manifest, tables["documents.arrow"], tables["chunks.arrow"], states)


def _members(archive: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(archive) as source:
            entries = source.infolist()
            if sorted(entry.filename for entry in entries) not in (sorted(_EXPORT), sorted(_EXPORT + _STATES)):
                raise CorruptError("its members are not those of an export")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CorruptError("its members are packed, as those of an export never are")
            return {entry.filename: source.read(entry) for entry in entries}
    except (RuntimeError, struct.error) as error:  # a password, a version or a method that zipfile does not know
        raise CorruptError(str(error)) from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise CorruptError("its members lie outside of it") from error
