"""Bytes to characters, and the builder that every loader fills."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from l2m_rag.errors import LoadError
from l2m_rag.memory_tiers.records import Parsed, Scalar, Section

TITLE_CHARS = 300
_SAMPLE = 1 << 16  # bytes looked at when an encoding must be guessed

# The UTF-32 marks come first: the little-endian one begins with that of UTF-16.
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What charset-normalizer may answer. Its full list holds code pages that win on short texts by accident.
_MULTIBYTE = ("cp932", "euc_jp", "gb18030", "big5", "cp949", "iso2022_jp")
_OTHER_SCRIPTS = (
    "cp1251",
    "koi8_r",
    "koi8_u",
    "iso8859_5",
    "cp1253",
    "iso8859_7",
    "cp1255",
    "cp1256",
    "cp874",
)
_LATIN = ("cp1252", "cp1250", "cp1254", "cp1257", "iso8859_2")
_CONTROLS = bytes(sorted({*range(32)} - {9, 10, 12, 13, 27}))
_SURROGATE = re.compile("[\ud800-\udfff]")
# A sign, and no dash or quotation mark, between letters.
_SIGN_IN_WORD = re.compile(
    "[A-Za-z][^\x00-\x7f\\w\u2013\u2014\u2018\u2019\u201c\u201d\u2026\xa0\xab\xbb\xad\xb7\xae\xb0\u2122]+[a-z]"
    "|[a-z][\xb2\xb3\xb9\xbc\xbd\xbe\xaa\xba][a-z]"
)
_SPACE = re.compile(r"\s+")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|(?<=[^\r\n])\Z)")


@dataclass(frozen=True, slots=True)
class Source:
    """The bytes of one file, as handed to a parse function.

    Args:
        data: the whole file.
        suffix: suffix of the format it is read as, in lower case with its dot.
        mime: media type to report.
        max_chars: the most characters its text may have.
    """

    data: bytes
    suffix: str
    mime: str
    max_chars: int


def words(text: str) -> frozenset[str]:
    """The words of a string, as a table to look them up in."""
    return frozenset(text.split())


def scrub(text: str) -> str:
    """The text without lone surrogates; pairs of them become the character they stand for."""
    if _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def squeeze(text: str) -> str:
    """The text on one line, runs of white space as one blank."""
    return _SPACE.sub(" ", text).strip()


def one_line(text: str) -> str:
    """The text as a title: one line of at most 300 characters, without control characters."""
    line = squeeze("".join(char if char.isprintable() else " " for char in scrub(text[: 8 * TITLE_CHARS])))
    return line if len(line) <= TITLE_CHARS else line[: TITLE_CHARS - 1].rstrip() + "…"


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Offset and characters of each line, its line end (LF, CRLF or CR) cut off."""
    for match in _LINE.finditer(text):
        if match.end() > match.start():
            yield match.start(), match.group().rstrip("\r\n")


def share_of_controls(data: bytes) -> float:
    """Part of the bytes, in a sample, that are control characters which text does not use."""
    sample = data[:_SAMPLE]
    return (len(sample) - len(sample.translate(None, _CONTROLS))) / max(1, len(sample))


def decode(data: bytes) -> tuple[str, str]:
    """Decode bytes of unknown encoding.

    Returns:
        The characters, unchanged but for a byte order mark that is left out, and the name of the encoding.

    Raises:
        LoadError: corrupt, if the bytes are no text in any encoding.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace"), encoding
    if b"\0" in data:
        wide = _wide_encoding(data)
        if wide is not None:
            return data.decode(wide, "replace"), wide
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return _decode_legacy(data)


def decode_as(data: bytes, declared: str | None) -> tuple[str, str]:
    """Decode bytes whose sender named an encoding; a name that is unknown or wrong is passed over."""
    if declared and not data.startswith(tuple(mark for mark, _ in _BOMS)):
        try:
            name = codecs.lookup(declared.strip()).name
            # Latin-1 in mail and on the web means Windows-1252, as browsers read it.
            name = {"iso8859-1": "cp1252", "ascii": "utf-8"}.get(name, name)
            return scrub(data.decode(name)), name
        except (LookupError, UnicodeError, ValueError, AssertionError):
            pass
    return decode(data)


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, told by where its zero bytes lie."""
    sample = data[: 4096 - 4096 % 4]
    units = len(sample) // 4
    if units < 2:
        return None
    zeros = [sample[position::4].count(0) / units for position in range(4)]
    if min(zeros[2:]) > 0.9 and zeros[0] < 0.1:
        return "utf-32-le"
    if zeros[0] > 0.9 and zeros[1] > 0.9 and zeros[3] < 0.1:
        return "utf-32-be"
    even, odd = (zeros[0] + zeros[2]) / 2, (zeros[1] + zeros[3]) / 2
    if odd > 0.3 and even < 0.05:
        return "utf-16-le"
    if even > 0.3 and odd < 0.05:
        return "utf-16-be"
    return None


def _decode_legacy(data: bytes) -> tuple[str, str]:
    loose = data.decode("utf-8", "replace")
    broken = loose.count("\ufffd")
    # A few damaged places in what is UTF-8 everywhere else are no reason to garble all the rest.
    intact = len(re.findall(rb"[\xc2-\xf4][\x80-\xbf]+", data[:_SAMPLE]))
    if share_of_controls(data) > 0.02:
        if broken * 20 < len(loose):
            return loose, "utf-8"
        raise LoadError("corrupt", "the file holds binary data, not text in any known encoding")
    guess = _guess(data)
    if (guess is None or guess in _LATIN) and intact > broken:
        return loose, "utf-8"
    if guess is None or (guess in _LATIN and _western(data)):
        guess = "cp1252"
    try:
        return data.decode(guess), guess
    except UnicodeDecodeError:
        # The guess came from the beginning of the file only.
        return (data.decode(guess, "replace"), guess) if guess in _MULTIBYTE else (data.decode("latin-1"), "latin-1")


def _guess(data: bytes) -> str | None:
    from charset_normalizer import from_bytes

    best = from_bytes(data[:_SAMPLE], cp_isolation=[*_MULTIBYTE, *_OTHER_SCRIPTS, *_LATIN]).best()
    return None if best is None else best.encoding


def _western(data: bytes) -> bool:
    """Whether Windows-1252 leaves no odd sign inside a word, as wrong code pages do."""
    try:
        text = data[:_SAMPLE].decode("cp1252")
    except UnicodeDecodeError:
        return False
    return _SIGN_IN_WORD.search(text) is None


class TextBuilder:
    """Collects text with the places where its sections and pages begin.

    Args:
        max_chars: the most characters; more raise `LoadError` (too_large).
    """

    def __init__(self, max_chars: int) -> None:
        self.length = 0
        self._max_chars = max_chars
        self._pieces: list[str] = []
        self._pages: list[int] = []
        self._sections: list[Section] = []

    def add(self, text: str) -> None:
        """Append characters."""
        text = scrub(text)
        self.length += len(text)
        check_length(self.length, self._max_chars)
        self._pieces.append(text)

    def line(self, text: str, end: str = "\n") -> None:
        """Append a line, unless it is blank."""
        if text and not text.isspace():
            self.add(text + end)

    def page(self) -> None:
        """Begin a page here; the text between two calls is never empty."""
        if self._pages and self._pages[-1] == self.length:
            self.add("\n")
        self._pages.append(self.length)

    def section(self, heading: str = "", *, hard: bool = False) -> None:
        """Begin a section here; one that would be empty gives way, but its border stays hard."""
        heading = one_line(heading)
        if self._sections and self._sections[-1].start == self.length:
            last = self._sections.pop()
            heading, hard = heading or last.heading, hard or last.hard
        self._sections.append(Section(self.length, heading, hard))

    def merge(self, text: str, sections: tuple[Section, ...]) -> None:
        """Append a text that has sections of its own."""
        position = 0
        for section in sections:
            self.add(text[position : section.start])
            position = section.start
            self.section(section.heading, hard=section.hard)
        self.add(text[position:])

    @property
    def sections(self) -> tuple[Section, ...]:
        """The sections so far that have text; the last one may have none, such as an empty sheet."""
        return tuple(section for section in self._sections if section.start < self.length)

    @property
    def first_heading(self) -> str:
        """The first heading so far, or ""."""
        return next((section.heading for section in self._sections if section.heading), "")

    def text(self) -> str:
        """The characters so far."""
        return "".join(self._pieces)

    def build(
        self, source: Source, *, title: str | None = None, metadata: Mapping[str, Scalar] | None = None
    ) -> Parsed:
        """The finished value.

        Raises:
            LoadError: no_text, if there is nothing but white space.
        """
        # A page list starts at 0 even if something was written before the first page.
        pages = (0, *self._pages[1:]) if self._pages else ()
        return parsed(self.text(), source, title, self.sections, metadata, pages)


def check_length(length: int, max_chars: int) -> None:
    """Raise `LoadError` (too_large) if a text has more characters than allowed."""
    if length > max_chars:
        raise LoadError("too_large", f"its text has more than {max_chars} characters")


def parsed(
    text: str,
    source: Source,
    title: str | None = None,
    sections: tuple[Section, ...] = (),
    metadata: Mapping[str, Scalar] | None = None,
    pages: tuple[int, ...] = (),
) -> Parsed:
    """A `Parsed` whose title, headings and metadata are tidy.

    Raises:
        LoadError: no_text, if there is nothing but white space; too_large, if there is too much.
    """
    if not text or text.isspace():
        raise LoadError("no_text", "the file holds no text")
    check_length(len(text), source.max_chars)
    tidy: dict[str, Scalar] = {
        key: one_line(value) if isinstance(value, str) else value
        for key, value in (metadata or {}).items()
        if value not in (None, "")
    }
    return Parsed(
        text=text,
        mime=source.mime,
        title=one_line(title or "") or None,
        pages=pages,
        sections=sections,
        metadata=tidy,
    )
