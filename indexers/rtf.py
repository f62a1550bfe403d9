"""Rich Text Format: a small reader of groups, control words and bytes."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, replace

from l2m_rag.errors import LoadError
from l2m_rag.indexers.text import Source, TextBuilder, scrub, squeeze, words
from l2m_rag.memory_tiers.records import Parsed, Scalar

_TOKEN = re.compile(
    rb"\\(?P<word>[a-zA-Z]{1,32})(?P<number>-?\d{1,10})?[ ]?"
    rb"|\\'(?P<byte>[0-9a-fA-F]{2})"
    rb"|\\(?P<sign>[^a-zA-Z])"
    rb"|(?P<brace>[{}])"
    rb"|[\r\n\0]+"
    rb"|(?P<text>[^\\{}\r\n\0]+)"
    rb"|\\",
    re.DOTALL,
)
# Groups whose content is no text of the document. Groups marked with \* are skipped too, unless known below.
_SKIPPED = words(
    "colortbl stylesheet pict object"
    " fldinst bkmkstart bkmkend themedata colorschememapping datastore latentstyles listtable"
    " listoverridetable rsidtbl generator xmlnstbl wgrffmtfilter filetbl revtbl mmathPr private1 ftnsep"
    " ftnsepc ftncn aftnsep aftnsepc aftncn pgptbl nonshppict objdata operator company category doccomm"
    " comment hlinkbase vern version creatim revtim printim buptim keywords subject manager sp sn sv"
    " pntxta pntxtb pnseclvl xe tc tcn atnid atnauthor atndate atrfstart atrfend annotation falt panose"
    " blipuid picprop ud"
)
_EDGES = words("header headerl headerr headerf footer footerl footerr footerf")
_KEPT = frozenset(("shpinst", "shptxt", "shp"))
_SPECIAL = {
    **dict.fromkeys(("par", "line", "sect", "page", "column", "row", "nestrow"), "\n"),
    **dict.fromkeys(("cell", "nestcell"), " | "),
    "ta": "\t",
    "emdash": "—",
    "endash": "\u2013",
    "emspace": " ",
    "enspace": " ",
    "qmspace": " ",
    "bullet": "•",
    "lquote": "\u2018",
    "rquote": "\u2019",
    "ldblquote": "“",
    "rdblquote": "”",
}
_SIGNS = {b"~": " ", b"_": "-", b"\n": "\n", b"\r": "\n", b"\\": "\\", b"{": "{", b"}": "}", b"\t": "\t"}
_CODE_PAGES = {"mac": "mac_roman", "pc": "cp437", "pca": "cp850", "ansi": "cp1252"}
_CHARSETS = {
    77: "mac_roman",
    128: "cp932",
    129: "cp949",
    130: "johab",
    134: "gb18030",
    136: "big5",
    161: "cp1253",
    162: "cp1254",
    163: "cp1258",
    177: "cp1255",
    178: "cp1256",
    186: "cp1257",
    204: "cp1251",
    222: "cp874",
    238: "cp1250",
    255: "cp437",
}
_MAX_DEPTH = 2000
_FIELDS = {"title": "title", "author": "author"}


@dataclass(frozen=True, slots=True)
class _State:
    """What a group inherits from the one around it, and gives back when it ends."""

    # "body", "edges" for running heads, "fonts", the name of a field of the info group, or "" for nowhere.
    target: str = "body"
    encoding: str = ""  # of the font in use; "" for that of the document
    fallback: int = 1  # characters behind a \u that stand for it in old readers
    hidden: bool = False
    starred: bool = False  # \* was just read


class _Reader:
    """Reads one RTF text."""

    def __init__(self, data: bytes, builder: TextBuilder) -> None:
        self._data = data
        self._builder = builder
        self._state = _State()
        self._stack: list[_State] = []
        self._encoding = "cp1252"
        self._fonts: dict[int, str] = {}
        self._font = 0
        self._bytes = bytearray()
        self._line: list[str] = []
        self._edges: list[str] = []
        self._skip = 0  # characters still to be left out behind a \u
        self._heading = False
        self.fields: dict[str, Scalar] = {}

    def read(self) -> None:
        """Read the whole text."""
        position, end = 0, len(self._data)
        while position < end:
            match = _TOKEN.match(self._data, position)
            if match is None:
                raise LoadError("corrupt", "the RTF is damaged")
            position = match.end()
            if match["word"]:
                if match["word"] == b"bin":
                    position += max(0, int(match["number"] or 0))
                else:
                    self._word(match["word"].decode(), None if match["number"] is None else int(match["number"]))
            elif match["brace"]:
                self._brace(match["brace"])
                if not self._stack and match["brace"] == b"}":
                    break  # what follows the outermost group is no RTF
            elif match["byte"]:
                self._add_bytes(bytes.fromhex(match["byte"].decode()))
            elif match["text"]:
                self._add_bytes(match["text"])
            elif match["sign"]:
                self._sign(match["sign"])
        self._end_line()
        edges = [line.strip() for line in "".join(self._edges).split("\n")]
        if any(edges):
            self._builder.section("Headers and footers")
            for line in dict.fromkeys(edges):
                self._builder.line(line)

    def _brace(self, brace: bytes) -> None:
        self._decode()
        self._skip = 0
        if brace == b"{":
            if len(self._stack) >= _MAX_DEPTH:
                raise LoadError("corrupt", "the RTF is nested too deeply")
            self._stack.append(self._state)
            self._state = replace(self._state, starred=False)
        elif self._stack:
            self._state = self._stack.pop()

    def _sign(self, sign: bytes) -> None:
        if sign == b"*":
            self._state = replace(self._state, starred=True)
        elif sign in _SIGNS:
            self._add(_SIGNS[sign])

    def _word(self, word: str, number: int | None) -> None:
        if self._skip and word not in ("u", "uc"):
            self._skip -= 1
            return
        if not self._state.target:
            return
        starred = self._state.starred
        if starred:
            self._state = replace(self._state, starred=False)
        if word == "fonttbl":
            self._state = replace(self._state, target="fonts")
        elif word in _EDGES:
            self._add("")
            self._edges.append("\n")
            self._state = replace(self._state, target="edges")
        elif word in _SKIPPED or (starred and word not in _KEPT):
            self._decode()
            self._state = replace(self._state, target="")
        elif word in _FIELDS or word == "info":
            self._state = replace(self._state, target=_FIELDS.get(word, "info"))
        elif word in _SPECIAL:
            self._add(_SPECIAL[word])
        elif word in _CODE_PAGES:
            self._encoding = _CODE_PAGES[word]
        else:
            self._property(word, number)

    def _property(self, word: str, number: int | None) -> None:
        """A control word that changes how what follows is read."""
        if word == "u":
            self._unicode(number or 0)
        elif word == "uc":
            self._state = replace(self._state, fallback=max(0, number or 0))
        elif word == "ansicpg":
            self._encoding = _known(f"cp{number}") or self._encoding
        elif word == "f":
            self._decode()
            self._font = number or 0
            self._state = replace(self._state, encoding=self._fonts.get(self._font, ""))
        elif word in ("fcharset", "cpg") and self._state.target == "fonts":
            name = _CHARSETS.get(number or 0, "") if word == "fcharset" else _known(f"cp{number}")
            self._fonts[self._font] = name or self._fonts.get(self._font, "")
        elif word == "plain":
            self._decode()
            self._state = replace(self._state, encoding="", hidden=False)
        elif word in ("v", "deleted"):
            self._decode()
            self._state = replace(self._state, hidden=number != 0)
        elif word in ("outlinelevel", "pard"):
            self._heading = word == "outlinelevel" and (number or 0) < 9

    def _unicode(self, number: int) -> None:
        code = number & 0xFFFF
        # Word shifts the characters of symbol fonts into the private area.
        self._add("•" if 0xF000 <= code <= 0xF0FF else chr(code))
        self._skip = self._state.fallback

    def _add_bytes(self, piece: bytes) -> None:
        dropped = min(self._skip, len(piece))
        self._skip -= dropped
        if self._state.target not in ("", "fonts", "info"):
            self._bytes += piece[dropped:]

    def _decode(self) -> None:
        """Turn the bytes read so far into characters; those of one character may come in several tokens."""
        if self._bytes:
            text = bytes(self._bytes).decode(self._state.encoding or self._encoding, "replace")
            self._bytes.clear()
            self._write(text)

    def _add(self, text: str) -> None:
        self._decode()
        self._write(text)

    def _write(self, text: str) -> None:
        target = self._state.target
        if target in _FIELDS.values():
            self.fields[target] = str(self.fields.get(target, "")) + text
        elif target == "edges":
            self._edges.append(text)
        elif target == "body" and not self._state.hidden:
            self._line.append(text)
            if text == "\n":
                self._end_line()

    def _end_line(self) -> None:
        self._decode()
        # Surrogates come one by one, and meet only here.
        text, self._line = scrub("".join(self._line)).strip("\n"), []
        text = text.removesuffix(" | ").rstrip() if text.strip(" |") else ""
        if text and self._heading:
            self._builder.section(squeeze(text))
        self._builder.line(text)


def _known(name: str) -> str:
    """The name of an encoding, or "" if Python has none of that name."""
    try:
        return codecs.lookup({"cp65001": "utf-8", "cp10000": "mac_roman", "cp936": "gb18030"}.get(name, name)).name
    except LookupError:
        return ""


def parse_rtf(source: Source) -> Parsed:
    """The text of an RTF file; paragraphs with an outline level are headings."""
    start = source.data.find(b"{\\rt", 0, 1024)
    if start < 0:
        raise LoadError("corrupt", "the file is no RTF")
    builder = TextBuilder(source.max_chars)
    reader = _Reader(source.data[start:], builder)
    reader.read()
    title = reader.fields.pop("title", None)
    return builder.build(source, title=str(title) if title else None, metadata=reader.fields)
