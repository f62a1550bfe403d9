"""Formats whose text is the decoded file, unchanged: prose, Markdown, reStructuredText, source code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from l2m_rag.indexers.text import Source, decode, lines, one_line, parsed
from l2m_rag.memory_tiers.records import Parsed, Section

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*\Z")
_SETEXT = re.compile(r" {0,3}(?:=+|-{2,})[ \t]*\Z")
_NO_PARAGRAPH = re.compile(r" {4}|\t| {0,3}(?:[#>|]|[-*+][ \t]|\d{1,9}[.)][ \t]|<)|\s*\Z")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_FRONT_TITLE = re.compile(r"""^title:[ \t]*(["']?)(.*?)\1[ \t]*\r?$""", re.MULTILINE | re.IGNORECASE)
_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1{2,}[ \t]*\Z")

# Lines at which a section of a source or text file begins; the named group `heading` is its heading.
_PYTHON = r"^(?:@[^\r\n]*\r?\n){0,20}(?P<heading>(?:async[ ]def|def|class)[ ]+\w+)"
_DECLARATION = (
    r"^(?:(?:export|default|public|private|protected|internal|static|async|abstract|final|sealed|open|data|partial"
    r"|unsafe|extern|inline|virtual|override|const|case|pub(?:\([^)\r\n]{1,40}\))?)[ ]+)*"
    r"(?P<heading>(?:function|class|interface|struct|enum|union|trait|impl|fn|func|fun|module|namespace|object|def|type"
    r"|protocol|extension|record|sub|package|defmodule)\b[ ]*[^\r\n{]{1,120})"
)
_C_FUNCTION = r"|^(?P<function>(?!return|else|if|for|while|switch)[A-Za-z_][\w \t*&:<>,~]{0,150}\()[^;\r\n]*$"
_SHELL = r"^(?:function[ ]+)?(?P<heading>[\w.-]+)[ ]*\(\)"
_SQL = r"^(?P<heading>(?:CREATE|ALTER)[ ](?:OR[ ]REPLACE[ ])?[^\r\n(;]{1,120})"
_TEX = r"^[ \t]*\\(?:part|chapter|(?:sub){0,2}section)\*?(?:\[[^\]\r\n]*\])?\{(?P<heading>[^\r\n]*?)\}"
_ASCIIDOC = r"^={1,6}[ ]+(?P<heading>[^\r\n]+)"
_ORG = r"^\*{1,8}[ ]+(?P<heading>[^\r\n]+)"
_TABLE = r"^[ \t]*\[{1,2}(?P<heading>[^\]\r\n]{1,200})\]{1,2}[ \t]*\r?$"


def _compile(pattern: str, flags: re.RegexFlag = re.MULTILINE) -> re.Pattern[str]:
    return re.compile(pattern, flags)


def _by_suffix(*rows: tuple[str, re.Pattern[str]]) -> dict[str, re.Pattern[str]]:
    return {suffix: pattern for suffixes, pattern in rows for suffix in suffixes.split()}


_SECTION_LINES = _by_suffix(
    (".py .pyi .pyw", _compile(_PYTHON)),
    (".c .cc .cpp .cxx .h .hh .hpp .m .cu", _compile(_DECLARATION + _C_FUNCTION)),
    (".js .mjs .cjs .jsx .ts .tsx .java .kt .kts .scala .swift .cs .rs .go .rb .php", _compile(_DECLARATION)),
    (".lua .pl .pm .jl .ex .exs .dart .proto", _compile(_DECLARATION)),
    (".sh .bash .zsh", _compile(_SHELL)),
    (".sql", _compile(_SQL, re.MULTILINE | re.IGNORECASE)),
    (".tex .ltx .latex", _compile(_TEX)),
    (".adoc .asciidoc", _compile(_ASCIIDOC)),
    (".org", _compile(_ORG)),
    (".ini .cfg .toml", _compile(_TABLE)),
)
_TITLES = {
    ".tex": re.compile(r"\\title(?:\[[^\]]*\])?\{([^{}]{1,1000})\}"),
    ".asciidoc": re.compile(r"\A\s*=[ ]+([^\r\n]+)"),
    ".adoc": re.compile(r"\A\s*=[ ]+([^\r\n]+)"),
    ".org": re.compile(r"^#\+title:[ \t]*([^\r\n]+)", re.MULTILINE | re.IGNORECASE),
}


def parse_text(source: Source) -> Parsed:
    """Any text file: decoded and otherwise left alone; sections where its language has declarations."""
    text, encoding = decode(source.data)
    pattern = _SECTION_LINES.get(source.suffix)
    title = _TITLES.get(source.suffix)
    found = title.search(text) if title else None
    sections = tuple(_matched_sections(text, pattern)) if pattern else ()
    return parsed(text, source, found[1] if found else None, sections, {"encoding": encoding})


def _matched_sections(text: str, pattern: re.Pattern[str]) -> Iterator[Section]:
    for match in pattern.finditer(text):
        heading = match["heading"] or match.groupdict().get("function") or ""
        yield Section(match.start(), one_line(heading.rstrip(" \t(:;")))


def parse_markdown(source: Source) -> Parsed:
    """Markdown, unchanged; sections at its headings, title from the front matter or the first heading."""
    text, encoding = decode(source.data)
    front = _FRONT_MATTER.match(text)
    sections = tuple(markdown_sections(text, front.end() if front else 0))
    named = _FRONT_TITLE.search(front[1]) if front else None
    title = named[2] if named else next((section.heading for section in sections if section.heading), None)
    return parsed(text, source, title, sections, {"encoding": encoding})


def markdown_sections(text: str, start: int = 0) -> Iterator[Section]:
    """The headings of a Markdown text, ATX and setext, that stand outside of code fences."""
    fence = ""
    before: tuple[int, str] | None = None  # the line before, if it could be the text of a setext heading
    for offset, line in lines(text):
        if offset < start:
            continue
        mark = _FENCE.match(line)
        if fence:
            # A fence ends with at least as many of its own characters, and nothing behind them.
            closes = mark is not None and mark[1].startswith(fence) and not line[mark.end() :].strip()
            fence = "" if closes else fence
        elif mark is not None:
            fence, before = mark[1], None
        elif (atx := _ATX.match(line)) is not None:
            before = None
            yield Section(offset, one_line(atx[2] or ""))
        elif before is not None and _SETEXT.match(line):
            yield Section(before[0], one_line(before[1]))
            before = None
        else:
            before = None if _NO_PARAGRAPH.match(line) else (offset, line)


def parse_rst(source: Source) -> Parsed:
    """reStructuredText, unchanged; sections at its underlined titles."""
    text, encoding = decode(source.data)
    sections = tuple(_rst_sections(text))
    return parsed(text, source, sections[0].heading if sections else None, sections, {"encoding": encoding})


def _rst_sections(text: str) -> Iterator[Section]:
    overline: tuple[int, str] | None = None
    title: tuple[int, str] | None = None
    for offset, line in lines(text):
        adorned = _ADORNMENT.match(line)
        if adorned is None:
            # An overline belongs to the title right below it only.
            overline = overline if title is None else None
            title = (offset, line) if line.strip() else None
            overline = overline if title else None
        elif title is not None and len(line.rstrip()) >= min(len(title[1].strip()), 4):
            begins = overline[0] if overline and overline[1] == adorned[1] else title[0]
            yield Section(begins, one_line(title[1]))
            overline = title = None
        else:
            overline, title = (offset, adorned[1]), None
