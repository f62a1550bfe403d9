"""Any file to its text: one table of formats, one function, one kind of error."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from l2m_rag.errors import LoadError
from l2m_rag.indexers import epub, json_formats, mail, markup, office, opendocument, pdf, plain, rtf, tables
from l2m_rag.indexers.text import Source, one_line, share_of_controls
from l2m_rag.indexers.zipped import Package
from l2m_rag.memory_tiers.records import Parsed

MAX_BYTES = 256 << 20
MAX_CHARS = 64 << 20


class Format(NamedTuple):
    """How the files of a suffix are read.

    Args:
        mime: their media type.
        parse: what turns the bytes into text.
    """

    mime: str
    parse: Callable[[Source], Parsed]


def _all(suffixes: str, mime: str, parse: Callable[[Source], Parsed]) -> dict[str, Format]:
    return dict.fromkeys(suffixes.split(), Format(mime, parse))


def _source_code(languages: Iterable[tuple[str, str]]) -> dict[str, Format]:
    return {
        suffix: Format(f"text/x-{name}", plain.parse_text)
        for name, suffixes in languages
        for suffix in suffixes.split()
    }


_OOXML = "application/vnd.openxmlformats-officedocument."
_ODF = "application/vnd.oasis.opendocument."

SUFFIXES: dict[str, Format] = {
    ".pdf": Format("application/pdf", pdf.parse_pdf),
    **_all(".docx .docm .dotx .dotm", _OOXML + "wordprocessingml.document", office.parse_docx),
    **_all(".pptx .pptm .potx .ppsx .ppsm", _OOXML + "presentationml.presentation", office.parse_pptx),
    **_all(".xlsx .xlsm .xltx .xltm", _OOXML + "spreadsheetml.sheet", office.parse_xlsx),
    **_all(".odt .ott", _ODF + "text", opendocument.parse_opendocument),
    **_all(".ods .ots", _ODF + "spreadsheet", opendocument.parse_opendocument),
    **_all(".odp .otp", _ODF + "presentation", opendocument.parse_opendocument),
    ".epub": Format("application/epub+zip", epub.parse_epub),
    ".rtf": Format("application/rtf", rtf.parse_rtf),
    **_all(".html .htm", "text/html", markup.parse_html),
    **_all(".xhtml .xht", "application/xhtml+xml", markup.parse_html),
    **_all(".xml .nxml .dbk .tei .rss .atom .svg", "application/xml", markup.parse_xml_text),
    **_all(".md .markdown .mdown .mkd .qmd .rmd", "text/markdown", plain.parse_markdown),
    **_all(".rst .rest", "text/x-rst", plain.parse_rst),
    ".csv": Format("text/csv", tables.parse_csv),
    **_all(".tsv .tab", "text/tab-separated-values", tables.parse_csv),
    **_all(".json .geojson", "application/json", json_formats.parse_json),
    **_all(".jsonl .ndjson", "application/x-ndjson", json_formats.parse_json_lines),
    ".ipynb": Format("application/x-ipynb+json", json_formats.parse_notebook),
    ".eml": Format("message/rfc822", mail.parse_eml),
    ".mbox": Format("application/mbox", mail.parse_mbox),
    **_all(".txt .text .log .me .srt .lrc .conf .cfg .ini .env .diff .patch", "text/plain", plain.parse_text),
    ".vtt": Format("text/vtt", plain.parse_text),
    **_all(".tex .latex .ltx .bib", "application/x-tex", plain.parse_text),
    **_all(".adoc .asciidoc", "text/asciidoc", plain.parse_text),
    ".org": Format("text/org", plain.parse_text),
    **_all(".yaml .yml", "application/yaml", plain.parse_text),
    ".toml": Format("application/toml", plain.parse_text),
    **_source_code(
        (
            ("python", ".py .pyi .pyw"),
            ("javascript", ".js .mjs .cjs .jsx"),
            ("typescript", ".ts .tsx"),
            ("java", ".java"),
            ("kotlin", ".kt .kts"),
            ("scala", ".scala"),
            ("c", ".c .h"),
            ("c++", ".cpp .cc .cxx .hpp .hh .cu"),
            ("csharp", ".cs"),
            ("objective-c", ".m"),
            ("rust", ".rs"),
            ("go", ".go"),
            ("ruby", ".rb"),
            ("php", ".php"),
            ("perl", ".pl .pm"),
            ("lua", ".lua"),
            ("r", ".r"),
            ("julia", ".jl"),
            ("swift", ".swift"),
            ("dart", ".dart"),
            ("elixir", ".ex .exs"),
            ("erlang", ".erl"),
            ("haskell", ".hs"),
            ("clojure", ".clj"),
            ("sh", ".sh .bash .zsh"),
            ("powershell", ".ps1"),
            ("batch", ".bat .cmd"),
            ("sql", ".sql"),
            ("css", ".css .scss .less"),
            ("proto", ".proto"),
            ("cmake", ".cmake"),
        )
    ),
}

# Beginnings of files that are no text and cannot be read here.
_FOREIGN = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x89PNG\r\n\x1a\n", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"GIF87a", "an image"),
    (b"GIF89a", "an image"),
    (b"II*\0", "an image"),
    (b"MM\0*", "an image"),
    (b"ITSF", "a compiled help file"),
    (b"SQLite format 3\0", "a database"),
    (b"\x7fELF", "a program"),
    (b"OggS\0", "a sound file"),
    (b"ID3\x03", "a sound file"),
    (b"ID3\x04", "a sound file"),
    (b"fLaC\0", "a sound file"),
    (b"RIFF", "a media file"),
)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# Formats that are told by their bytes alone.
_BINARY = frozenset(suffix for suffix, format_ in SUFFIXES.items() if format_.mime.startswith((_OOXML, _ODF))) | {
    ".pdf",
    ".epub",
    ".rtf",
}


def load(path: Path, *, max_bytes: int = MAX_BYTES, max_chars: int = MAX_CHARS) -> Parsed:
    """The text of one file.

    Args:
        path: a regular file; its suffix is a hint, its bytes decide.
        max_bytes: the largest file that is read.
        max_chars: the longest text that is given back.

    Raises:
        LoadError: for whatever keeps the text from being had, and nothing else.
    """
    data = _read(path, max_bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            suffix = detect(data, path.suffix.lower())
            format_ = SUFFIXES[suffix]
            return format_.parse(Source(data, suffix, format_.mime, max_chars))
    except LoadError:
        raise
    except MemoryError as error:
        raise LoadError("too_large", "there is not enough memory to read the file") from error
    except RecursionError as error:
        raise LoadError("corrupt", "the file is nested too deeply") from error
    # The parsers are other people's code on hostile bytes: what they raise means that the file is damaged.
    except Exception as error:
        raise LoadError("corrupt", one_line(f"{type(error).__name__}: {error}")) from error


def _read(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file; opening never blocks."""
    try:
        _check_regular(os.stat(path).st_mode)
        # Without O_NONBLOCK a pipe that took the file's place in between would block for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            _check_regular(status.st_mode)
            # What is added to the file from here on is not read. As much as is asked for is allocated.
            data = file.read(status.st_size) if status.st_size <= max_bytes else b""
    except MemoryError as error:
        raise LoadError("too_large", "there is not enough memory to read the file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise LoadError("unreadable", one_line(reason or str(error))) from error
    if status.st_size > max_bytes:
        raise LoadError("too_large", f"the file has {status.st_size} bytes; the limit is {max_bytes}")
    if not data:
        raise LoadError("empty", "the file has no bytes")
    return data


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise LoadError("unreadable", "it is not a regular file")


def detect(data: bytes, suffix: str) -> str:
    """The suffix of the format that the bytes are in.

    Args:
        data: the whole file, not empty.
        suffix: what its name says, in lower case.

    Raises:
        LoadError: unsupported, encrypted or corrupt.
    """
    found = _by_signature(data, suffix)
    if found is not None:
        return found
    if suffix in _BINARY:
        if suffix == ".pdf" and b"%PDF-" in data[:4096]:
            return suffix  # with something in front of it, as mail gateways leave behind
        if _looks_like_html(data[:1024]):
            return ".html"
        raise LoadError("corrupt", f"the file is named {suffix}, but its bytes are something else")
    if suffix in SUFFIXES:
        return suffix
    return _by_looks(data)


def _by_signature(data: bytes, suffix: str) -> str | None:
    """The format of a file that begins with a signature; None if there is none."""
    if data.startswith(b"%PDF-"):
        return ".pdf"
    if data.startswith(b"{\\rt"):
        return ".rtf"
    if data.startswith(_OLE):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise LoadError("encrypted", "the Office file is protected by a password")
        raise LoadError("unsupported", "Office files of before 2007 cannot be read; save it in a newer format")
    if data.startswith(_ZIPS):
        return _by_members(data, suffix)
    foreign = next((name for mark, name in _FOREIGN if data.startswith(mark)), None)
    if foreign is None and data[257:262] == b"ustar":
        foreign = "a tar archive"
    if foreign is not None and (b"\0" in data[:4096] or share_of_controls(data) > 0.02):
        raise LoadError("unsupported", f"the file is {foreign}")
    return None


def _by_members(data: bytes, suffix: str) -> str:
    """The format of a zip archive."""
    try:
        package = Package(data)
    except LoadError as error:
        if error.reason == "corrupt" and suffix not in _BINARY:
            raise LoadError("unsupported", "the file is a zip archive, and damaged") from error
        raise
    kind = package.read("mimetype")[:200].strip().decode("latin-1") if "mimetype" in package else ""
    if kind == SUFFIXES[".epub"].mime or "META-INF/container.xml" in package:
        return ".epub"
    for odf in (".odt", ".ods", ".odp"):
        if kind.startswith(SUFFIXES[odf].mime):
            return odf
    if "[Content_Types].xml" in package:
        for folder, ooxml in (("word/", ".docx"), ("ppt/", ".pptx"), ("xl/", ".xlsx")):
            if any(name.startswith(folder) for name in package.names):
                return suffix if SUFFIXES.get(suffix) == SUFFIXES[ooxml] else ooxml
    if suffix in _BINARY and suffix not in (".pdf", ".rtf"):
        return suffix
    raise LoadError("unsupported", "the file is a zip archive; unpack it first")


def _looks_like_html(head: bytes) -> bool:
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith((b"<!doctype html", b"<html")) or (head.startswith(b"<") and b"<html" in head)


def _by_looks(data: bytes) -> str:
    """The format of a file whose name says nothing."""
    head = data[:4096]
    if _looks_like_html(head):
        return ".html"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<?xml"):
        return ".xml"
    if head.startswith(b"From ") and mail.looks_like_mail(head):
        return ".mbox"
    if mail.looks_like_mail(head):
        return ".eml"
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"))
    wide = head.count(b"\0") * 10 > 3 * len(head)
    if not marked and not wide and (b"\0" in head or share_of_controls(head) > 0.02):
        raise LoadError("unsupported", "the file holds binary data of an unknown kind")
    return ".txt"
