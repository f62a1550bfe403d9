"""EPUB books."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l2m_rag.errors import LoadError
from l2m_rag.indexers.markup import decode_html, render_html
from l2m_rag.indexers.text import Source, TextBuilder, squeeze
from l2m_rag.indexers.zipped import Package, local, resolve
from l2m_rag.memory_tiers.records import Parsed, Scalar

if TYPE_CHECKING:
    from lxml import etree

_PAGES = (".xhtml", ".html", ".htm", ".xml")


def parse_epub(source: Source) -> Parsed:
    """A book: the chapters in the order of its spine, each a hard section with its title."""
    package = Package(source.data)
    opf = _package_document(package)
    root = package.optional_xml(opf)
    metadata = _metadata(root)
    chapters, contents = _spine(root, opf)
    if not chapters:
        chapters = [name for name in package.names if name.lower().endswith(_PAGES) and "META-INF" not in name]
    if not chapters:
        raise LoadError("corrupt", "the book has no chapters")
    titles = _table_of_contents(package, contents)
    locked = _encrypted(package)
    builder = TextBuilder(source.max_chars)
    for name in chapters:
        if name in locked:
            raise LoadError("encrypted", "the book is protected against copying")
        if name not in package:
            continue  # a chapter that is named but missing costs only itself
        text, _ = decode_html(package.read(name))
        chapter = TextBuilder(source.max_chars)
        heading, _ = render_html(text, chapter, source.max_chars)
        if chapter.length:
            builder.section(titles.get(name) or heading, hard=True)
            content = chapter.build(source)
            builder.merge(content.text, content.sections)
    title = metadata.pop("title", None)
    return builder.build(source, title=str(title) if title else None, metadata=metadata)


def _package_document(package: Package) -> str:
    container = package.optional_xml("META-INF/container.xml")
    for rootfile in container.iter("{*}rootfile") if container is not None else ():
        if rootfile.get("full-path"):
            return str(rootfile.get("full-path"))
    return next((name for name in package.names if name.lower().endswith(".opf")), "")


def _metadata(root: etree._Element | None) -> dict[str, Scalar]:
    wanted = {
        "title": "title",
        "creator": "author",
        "date": "date",
        "language": "language",
        "publisher": "publisher",
        "subject": "subject",
    }
    found: dict[str, Scalar] = {}
    block = next(root.iter("{*}metadata"), None) if root is not None else None
    for element in block.iter() if block is not None else ():
        key = wanted.get(local(element))
        if key and element.text and element.text.strip():
            found.setdefault(key, squeeze(element.text))
    return found


def _spine(root: etree._Element | None, opf: str) -> tuple[list[str], list[str]]:
    """The chapters in reading order, and the members that may hold a table of contents."""
    if root is None:
        return [], []
    items: dict[str, str] = {}
    contents = []
    for item in root.iter("{*}item"):
        name = resolve(opf, item.get("href") or "")
        items[item.get("id") or ""] = name
        if "nav" in (item.get("properties") or "").split() or name.endswith(".ncx"):
            contents.append(name)
    order = (items.get(reference.get("idref") or "") for reference in root.iter("{*}itemref"))
    return list(dict.fromkeys(name for name in order if name)), contents


def _table_of_contents(package: Package, names: list[str]) -> dict[str, str]:
    """Titles of chapters by member, from the navigation page (EPUB 3) or the NCX (EPUB 2)."""
    titles: dict[str, str] = {}
    for name in names:
        root = package.optional_xml(name)
        for point in root.iter("{*}navPoint", "{*}a") if root is not None else ():
            target = point if local(point) == "a" else next(point.iter("{*}content"), None)
            label = point if local(point) == "a" else next(point.iter("{*}text"), None)
            if target is not None and label is not None:
                href = target.get("href") or target.get("src") or ""
                titles.setdefault(resolve(name, href), squeeze("".join(label.itertext())))
    return titles


def _encrypted(package: Package) -> set[str]:
    """Members under encryption; fonts often are, which does not matter."""
    root = package.optional_xml("META-INF/encryption.xml")
    if root is None:
        return set()
    return {resolve("", reference.get("URI") or "") for reference in root.iter("{*}CipherReference")}
