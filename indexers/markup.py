"""HTML and XML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser

from lxml import etree

from l2m_rag.errors import LoadError
from l2m_rag.indexers.text import Source, TextBuilder, decode_as, parsed, squeeze, words
from l2m_rag.indexers.zipped import attribute, local, parse_xml
from l2m_rag.memory_tiers.records import Parsed, Scalar

_META_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]+)""", re.IGNORECASE)
_XML_CHARSET = re.compile(rb"""\A\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9_:.-]+)""")
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_BLOCKS = _HEADINGS | words(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset"
    " figcaption figure footer form header hgroup hr html legend li main menu nav ol option p pre"
    " section select summary table tbody tfoot thead tr ul"
)
_SILENT = words("script style template head title noscript svg math iframe object canvas datalist")
_BOILERPLATE = frozenset(("nav", "footer", "aside"))
_BOILERPLATE_ROLES = frozenset(("navigation", "banner", "contentinfo", "search"))
_VOID = words("area base br col embed hr img input link meta param source track wbr")
_ATTRIBUTES = ("alt", "hidden", "role", "style")
_DOCTYPE = re.compile(r"\A\s*(?:<\?xml[^>]*>\s*)?<!DOCTYPE[^>\[]*\[[^\]]*\]\s*>", re.IGNORECASE)
_CELL_BREAK = 200  # characters in a table cell from which on its paragraphs become lines of their own

Attributes = Mapping[str, str | None]
Event = tuple[str, str, Attributes]  # ("start", tag, attributes), ("end", tag, {}) or ("text", characters, {})


class Renderer:
    """Turns a stream of tags and characters into lines.

    Args:
        max_chars: the most characters of the text.
        whole: keep menus, footers and the like.
    """

    def __init__(self, max_chars: int, *, whole: bool) -> None:
        self.builder = TextBuilder(max_chars)
        self.dropped = False  # whether something was left out as boilerplate
        self._whole = whole
        self._inline: list[str] = []
        self._size = 0
        self._silenced: list[str] = []  # open tags from the outermost one that is not to be shown
        self._cells = 0
        self._pre = 0
        self._heading = False

    def feed(self, events: Iterable[Event]) -> None:
        """Take in all events."""
        for kind, value, attributes in events:
            if kind == "text":
                if not self._silenced:
                    self._inline.append(value)
                    self._size += len(value)
            elif kind == "start":
                self._start(value, attributes)
            else:
                self._end(value)
        self._flush()

    def _hidden(self, tag: str, attributes: Attributes) -> bool:
        if tag in ("html", "body"):
            return False  # pages that hide themselves until a script has run
        if tag in _SILENT or "hidden" in attributes:
            return True
        if re.search(r"display\s*:\s*none", attributes.get("style") or "", re.IGNORECASE):
            return True
        boilerplate = tag in _BOILERPLATE or attributes.get("role") in _BOILERPLATE_ROLES
        self.dropped = self.dropped or boilerplate
        return boilerplate and not self._whole

    def _start(self, tag: str, attributes: Attributes) -> None:
        if self._silenced:
            if tag not in _VOID:
                self._silenced.append(tag)
        elif tag in _VOID or not self._hidden(tag, attributes):
            self._open(tag, attributes)
        else:
            self._silenced.append(tag)

    def _open(self, tag: str, attributes: Attributes) -> None:
        if tag == "br":
            self._inline.append("\v")
        elif tag == "img":
            self._inline.append(f" {attributes.get('alt') or ''} ")
        elif tag in ("td", "th"):
            self._cells += 1
            if "".join(self._inline).strip():
                self._inline.append(" | ")
        elif tag in _BLOCKS:
            self._block(tag)
            self._pre += tag == "pre"
            self._heading = self._heading or tag in _HEADINGS
            if tag == "li":
                self._inline.append("- ")

    def _end(self, tag: str) -> None:
        if self._silenced:
            # A tag that was never closed ends with the one around it.
            if tag in self._silenced:
                del self._silenced[len(self._silenced) - 1 - self._silenced[::-1].index(tag) :]
        elif tag in ("td", "th"):
            self._cells = max(0, self._cells - 1)
        elif tag in _BLOCKS:
            self._block(tag)
            if tag == "pre":
                self._pre = max(0, self._pre - 1)
            if tag in _HEADINGS:
                self._heading = False

    def _block(self, tag: str) -> None:
        if self._cells and tag in ("p", "div", "span", "center") and self._size < _CELL_BREAK:
            self._inline.append(" ")
        else:
            self._flush("\n" if tag in ("li", "tr", "dt", "dd", "option") else "\n\n")

    def _flush(self, end: str = "\n\n") -> None:
        text, self._inline, self._size = "".join(self._inline), [], 0
        if self._pre:
            text = text.replace("\v", "\n").strip("\n")
        else:
            text = "\n".join(line for line in map(squeeze, text.split("\v")) if line)
        text = text.removesuffix(" |")
        if text.strip(" |-"):
            if self._heading:
                self.builder.section(text)
            self.builder.line(text, end)


def tree_events(root: etree._Element) -> Iterator[Event]:
    """The events of a parsed tree."""
    for action, element in etree.iterwalk(root, events=("start", "end", "comment", "pi")):
        tag = local(element).lower()
        if action == "start":
            # Only these are asked for: reading all of them fails on a page with impossible names.
            yield (
                "start",
                tag,
                {name: value for name in _ATTRIBUTES if (value := element.get(name)) is not None},
            )
            if element.text:
                yield "text", element.text, {}
        elif action == "end":
            yield "end", tag, {}
        if action != "start" and element is not root and element.tail:
            yield "text", element.tail, {}


class _Events(HTMLParser):
    """The standard library's parser: slow, but no nesting is too deep for it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.events: list[Event] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.events.append(("start", tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.events.append(("end", tag, {}))

    def handle_data(self, data: str) -> None:
        self.events.append(("text", data, {}))


def _loose_events(text: str) -> list[Event]:
    parser = _Events()
    parser.feed(text)
    parser.close()
    return parser.events


def html_root(text: str) -> etree._Element | None:
    """The tree of an HTML text, or None if it is too deep or too odd for one."""
    # huge_tree lifts the limits on depth and text size; HTML has no entities that could be made to explode.
    parser = etree.HTMLParser(encoding="utf-8", no_network=True, huge_tree=True, remove_pis=True)
    try:
        root = etree.fromstring(text.encode(), parser)
    except (etree.XMLSyntaxError, ValueError):
        return None
    fatal = any(entry.type_name == "ERR_RESOURCE_LIMIT" for entry in parser.error_log)
    return None if fatal else root


def render_html(text: str, builder: TextBuilder, max_chars: int) -> tuple[str, etree._Element | None]:
    """Add the text of an HTML page to a builder: its main text, or all of it where that would lose too much.

    Returns:
        The first heading, and the tree, if one could be made.
    """
    # Declarations inside a document type are no part of HTML, and would show up as text.
    text = _DOCTYPE.sub("", text.replace("\0", ""), count=1)
    root = html_root(text)
    events = list(_loose_events(text) if root is None else tree_events(root))
    renderer = Renderer(max_chars, whole=False)
    renderer.feed(events)
    chosen = renderer.builder
    if renderer.dropped:
        renderer = Renderer(max_chars, whole=True)
        renderer.feed(events)
        if 3 * chosen.length < renderer.builder.length:
            chosen = renderer.builder
    builder.merge(chosen.text(), chosen.sections)
    return chosen.first_heading, root


def decode_html(data: bytes) -> tuple[str, str]:
    """Decode a page by its mark, its declaration or its looks."""
    declared = _META_CHARSET.search(data[:4096]) or _XML_CHARSET.match(data[:512])
    try:
        return decode_as(data, declared[1].decode("ascii") if declared else None)
    except LoadError:
        # A page is text even where somebody pasted bytes into it.
        return data.decode("cp1252", "replace"), "cp1252"


def parse_html(source: Source) -> Parsed:
    """An HTML page: its main text with headings as sections; title from its head."""
    text, encoding = decode_html(source.data)
    builder = TextBuilder(source.max_chars)
    heading, root = render_html(text, builder, source.max_chars)
    metadata: dict[str, Scalar] = {"encoding": encoding}
    title = ""
    if root is not None:
        title = squeeze("".join(next(root.iter("title"), etree.Element("title")).itertext()))
        metadata |= _page_metadata(root)
    if not builder.length and root is None:
        # Not even one tag was understood; the bare characters are better than nothing.
        builder.add(squeeze(re.sub(r"<[^<>]*>", " ", text)))
    return builder.build(source, title=title or heading, metadata=metadata)


def _page_metadata(root: etree._Element) -> dict[str, Scalar]:
    wanted = {
        "author": "author",
        "article:author": "author",
        "date": "date",
        "article:published_time": "date",
        "dc.date": "date",
        "description": "description",
        "og:description": "description",
        "keywords": "keywords",
    }
    found: dict[str, Scalar] = {}
    for element in root.iter("meta"):
        key = wanted.get((element.get("name") or element.get("property") or "").lower())
        if key and element.get("content"):
            found.setdefault(key, str(element.get("content")))
    language = root.get("lang")
    return {**found, "language": str(language)} if language else found


_XML_HEADINGS = frozenset(("title", "head", "heading", "article-title", "subject"))
_XML_INLINE = words(
    "a abbr b bold br break code em emph emphasis ext-link hi i inline-formula italic link named-"
    " content q ref s sc span strong styled-content sub sup tt u underline uri xref"
)


def parse_xml_text(source: Source) -> Parsed:
    """XML with its tags stripped, a line per element; damaged or empty XML stays as it is."""
    if b"<!ENTITY" in source.data:
        return _raw_xml(source)  # entities are never resolved, so stripping tags would lose what they stand for
    try:
        root = parse_xml(source.data)
    except LoadError:
        return _raw_xml(source)
    builder = TextBuilder(source.max_chars)
    title = _render_xml(root, builder)
    if not builder.length:
        return _raw_xml(source)
    return builder.build(source, title=title, metadata={"encoding": root.getroottree().docinfo.encoding})


def _raw_xml(source: Source) -> Parsed:
    declared = _XML_CHARSET.match(source.data[:512])
    text, encoding = decode_as(source.data, declared[1].decode("ascii") if declared else None)
    return parsed(text, source, metadata={"encoding": encoding})


def _render_xml(root: etree._Element, builder: TextBuilder) -> str:
    """Add the text of each element as a line; gives the first heading."""
    title = ""
    inline: list[str] = []
    for kind, tag, value in _xml_events(root):
        if kind == "text":
            inline.append(value)
        elif tag not in _XML_INLINE:
            text = squeeze("".join(inline))
            inline = []
            if text and kind == "end" and tag in _XML_HEADINGS:
                builder.section(text)
                title = title or text
            builder.line(text)
    builder.line(squeeze("".join(inline)))
    return title


def _xml_events(root: etree._Element) -> Iterator[tuple[str, str, str]]:
    for action, element in etree.iterwalk(root, events=("start", "end", "comment", "pi")):
        tag = local(element).lower()
        if action == "start":
            yield "start", tag, ""
            # Names and labels are often attributes, as in configuration and exchange formats.
            label = attribute(element, "label")
            yield "text", tag, f"{label} " if label else ""
            yield "text", tag, element.text or ""
        elif action == "end":
            yield "end", tag, ""
        if action != "start" and element is not root:
            yield "text", tag, element.tail or ""
