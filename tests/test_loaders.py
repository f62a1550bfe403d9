from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import docx
import openpyxl
import pptx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2m_rag.errors import REASONS, LoadError
from l2m_rag.indexers import zipped
from l2m_rag.indexers.loaders import SUFFIXES, load
from l2m_rag.indexers.text import TITLE_CHARS
from l2m_rag.memory_tiers.records import Parsed

UNCHANGED = sorted(
    suffix
    for suffix, format_ in SUFFIXES.items()
    if format_.parse.__name__ in ("parse_text", "parse_markdown", "parse_rst")
)


def read(folder: Path, name: str, data: str | bytes, **limits: int) -> Parsed:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return load(path, **limits)


def reason(folder: Path, name: str, data: str | bytes, **limits: int) -> str:
    with pytest.raises(LoadError) as caught:
        read(folder, name, data, **limits)
    assert caught.value.detail
    return caught.value.reason


def outcome(folder: Path, name: str, data: str | bytes) -> Parsed | LoadError:
    try:
        return read(folder, name, data)
    except LoadError as error:
        return error


def check(parsed: Parsed) -> Parsed:
    """What holds of every parsed file."""
    size = len(parsed.text)
    parsed.text.encode()
    assert parsed.text.strip()
    starts = [section.start for section in parsed.sections]
    assert starts == sorted(set(starts))
    assert all(0 <= start < size for start in starts) or not starts
    assert list(parsed.pages) == sorted(set(parsed.pages))
    assert not parsed.pages or parsed.pages[0] == 0
    assert all(page <= size for page in parsed.pages)
    for line in (parsed.title or "", *(section.heading for section in parsed.sections)):
        assert len(line) <= TITLE_CHARS
        assert line.isprintable()
    assert all(value is None or isinstance(value, str | int | float) for value in parsed.metadata.values())
    return parsed


def outline(parsed: Parsed) -> dict[str, str]:
    """The first line of the text behind each heading."""
    return {
        section.heading: parsed.text[section.start :].lstrip().split("\n")[0].strip()
        for section in check(parsed).sections
    }


def zipped_file(members: dict[str, str | bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def pdf_file(*pages: str, title: str = "", extra: str = "") -> bytes:
    """A PDF with a line of text on each page."""
    count = len(pages)
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(count))
    objects.append(f"<< /Type /Pages /Count {count} /Kids [{kids}] >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number, page in enumerate(pages):
        content = f"BT /F1 12 Tf 72 700 Td ({page}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R"
            " /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    objects.append(f"<< /Title ({title}) /Author (Ada) /CreationDate (D:20240131120000) >>")
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    trailer = f"/Root 1 0 R /Info {len(objects)} 0 R /Size {len(objects) + 1} {extra}"
    return out + f"trailer << {trailer} >>\nstartxref\n{start}\n%%EOF".encode()


def saved(document: Any) -> bytes:
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()


def docx_file() -> bytes:
    document = docx.Document()
    document.core_properties.title = "  A\ntitle "
    document.core_properties.author = "Ada"
    document.add_heading("One", 1)
    document.add_paragraph("First text")
    table = document.add_table(2, 2)
    for row, values in zip(table.rows, (("a", "b"), ("c", "d e")), strict=True):
        for cell, value in zip(row.cells, values, strict=True):
            cell.text = value
    document.add_heading("Two", 2)
    document.add_paragraph("Last\ttext 😀")
    document.sections[0].header.paragraphs[0].text = "Running head"
    return saved(document)


# --- PDF


def test_pdf_has_pages_title_and_author(tmp_path: Path) -> None:
    parsed = check(read(tmp_path, "a.pdf", pdf_file("Hello world", "Second page", title="My paper")))
    assert parsed.title == "My paper"
    assert parsed.metadata == {"author": "Ada", "date": "2024-01-31"}
    assert len(parsed.pages) == 2
    assert parsed.text[: parsed.pages[1]].strip() == "Hello world"
    assert parsed.text[parsed.pages[1] :].strip() == "Second page"


def test_an_empty_page_keeps_the_numbers_of_those_behind_it(tmp_path: Path) -> None:
    parsed = check(read(tmp_path, "a.pdf", pdf_file("one", "", "three")))
    assert len(parsed.pages) == 3
    assert parsed.text[parsed.pages[2] :].strip() == "three"


def test_pdf_without_text_is_told_apart_from_damage(tmp_path: Path) -> None:
    assert reason(tmp_path, "a.pdf", pdf_file("")) == "no_text"
    assert reason(tmp_path, "b.pdf", pdf_file("text")[:200]) == "corrupt"
    assert reason(tmp_path, "c.pdf", b"no pdf at all") == "corrupt"
    assert reason(tmp_path, "d.pdf", b"") == "empty"


def test_encrypted_pdf(tmp_path: Path) -> None:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf_file("secret")))
    writer.encrypt("password", algorithm="RC4-128")
    stream = io.BytesIO()
    writer.write(stream)
    assert reason(tmp_path, "a.pdf", stream.getvalue()) == "encrypted"


def test_pdf_outline_gives_sections_where_the_headings_stand(tmp_path: Path) -> None:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf_file("first page", "some words Chapter two begins")))
    writer.add_outline_item(title="Start", page_number=0)
    writer.add_outline_item(title="Chapter  Two", page_number=1)
    stream = io.BytesIO()
    writer.write(stream)
    parsed = read(tmp_path, "a.pdf", stream.getvalue())
    assert outline(parsed) == {"Start": "first page", "Chapter Two": "Chapter two begins"}


def test_pdf_with_a_page_tree_that_loops_ends(tmp_path: Path) -> None:
    data = pdf_file("text").replace(b"/Kids [4 0 R]", b"/Kids [2 0 R]")
    assert reason(tmp_path, "a.pdf", data) in ("corrupt", "no_text")


# --- Office


def test_docx_keeps_the_order_and_the_headings(tmp_path: Path) -> None:
    parsed = read(tmp_path, "a.docx", docx_file())
    assert parsed.text.startswith("One\n\nFirst text\n\na | b\nc | d e\n\nTwo\n\nLast\ttext 😀\n\n")
    assert outline(parsed) == {"One": "One", "Two": "Two", "Headers": "Running head"}
    assert parsed.title == "A title"
    assert parsed.metadata["author"] == "Ada"


def test_docx_text_that_was_deleted_or_doubled_stays_out(tmp_path: Path) -> None:
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    compatible = "http://schemas.openxmlformats.org/markup-compatibility/2006"
    body = (
        "<w:p><w:r><w:t>kept</w:t></w:r><w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
        "<w:ins><w:r><w:t> added</w:t></w:r></w:ins>"
        "<w:r><m:AlternateContent><m:Choice><w:txbxContent><w:p><w:r><w:t>box</w:t></w:r></w:p></w:txbxContent>"
        "</m:Choice><m:Fallback><w:p><w:r><w:t>box</w:t></w:r></w:p></m:Fallback></m:AlternateContent></w:r></w:p>"
    )
    document = f'<w:document xmlns:w="{word}" xmlns:m="{compatible}"><w:body>{body}</w:body></w:document>'
    parsed = read(tmp_path, "a.docx", ooxml("word/document.xml", document))
    assert parsed.text == "kept added\n\nbox\n\n"


def ooxml(part: str, document: str) -> bytes:
    relations = "http://schemas.openxmlformats.org/package/2006/relationships"
    return zipped_file(
        {
            "[Content_Types].xml": "<Types/>",
            "_rels/.rels": f'<Relationships xmlns="{relations}"><Relationship Id="r" Type="x/officeDocument"'
            f' Target="{part}"/></Relationships>',
            part: document,
        }
    )


def test_pptx_slides_are_pages_and_hard_sections(tmp_path: Path) -> None:
    deck = pptx.Presentation()
    for title in ("First", "Second"):
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = f"Body of {title}"
    slide.notes_slide.notes_text_frame.text = "Say hello"
    table = slide.shapes.add_table(1, 2, 0, 0, 100, 100).table
    table.cell(0, 0).text, table.cell(0, 1).text = "x", "y"
    parsed = check(read(tmp_path, "a.pptx", saved(deck)))
    assert [(section.heading, section.hard) for section in parsed.sections] == [
        ("First", True),
        ("Second", True),
    ]
    assert tuple(section.start for section in parsed.sections) == parsed.pages
    assert parsed.text[parsed.pages[1] :] == "Second\nBody of Second\nx | y\nNotes: Say hello\n\n"
    assert parsed.title in ("First", "PowerPoint Presentation")


def test_xlsx_rows_carry_their_headers(tmp_path: Path) -> None:
    import datetime

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Prices"
    for row in (["fruit", "price", "day"], ["apple", 1.1, datetime.date(2024, 5, 1)], ["pear", 3.0, None]):
        sheet.append(row)
    other = book.create_sheet("Notes")
    other.append([1, 2])
    other.append(["two\nlines", True])
    parsed = check(read(tmp_path, "a.xlsx", saved(book)))
    assert parsed.text == (
        "fruit; price; day\nfruit: apple; price: 1.1; day: 2024-05-01\nfruit: pear; price: 3\n\n"
        "1; 2\ntwo lines; True\n\n"
    )
    assert [(section.heading, section.hard) for section in parsed.sections] == [
        ("Prices", True),
        ("Notes", True),
    ]
    assert parsed.text[parsed.sections[1].start :].startswith("1; 2")


def test_encrypted_and_old_office_files(tmp_path: Path) -> None:
    ole = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)
    assert reason(tmp_path, "a.docx", ole + "EncryptedPackage".encode("utf-16-le")) == "encrypted"
    assert reason(tmp_path, "a.doc", ole) == "unsupported"
    assert reason(tmp_path, "a.docx", ole) == "unsupported"


# --- zip archives


def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(tmp_path, "a.docx", ooxml("word/document.xml", "x" * (40 << 20))) == "too_large"
    monkeypatch.setattr(zipped, "MAX_MEMBERS", 2)
    assert reason(tmp_path, "b.docx", docx_file()) == "too_large"


@pytest.mark.parametrize("name", ["a.docx", "a.pptx", "a.xlsx", "a.epub", "a.odt"])
def test_damaged_archives_are_corrupt(tmp_path: Path, name: str) -> None:
    assert reason(tmp_path, name, docx_file()[:-300]) == "corrupt"
    assert reason(tmp_path, name, b"random bytes") == "corrupt"
    assert reason(tmp_path, name, zipped_file({"a.txt": "x"})) == "corrupt"


def test_flipped_bits_give_an_error_or_text(tmp_path: Path) -> None:
    data = docx_file()
    for position in range(0, len(data), 997):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        result = outcome(tmp_path, "a.docx", bytes(damaged))
        assert check(result) if isinstance(result, Parsed) else result.reason in REASONS


def test_archives_are_unsupported(tmp_path: Path) -> None:
    assert reason(tmp_path, "a.zip", zipped_file({"../a.txt": "x"})) == "unsupported"
    assert reason(tmp_path, "a.gz", b"\x1f\x8b\x08" + bytes(30)) == "unsupported"
    assert reason(tmp_path, "a.png", b"\x89PNG\r\n\x1a\n" + bytes(30)) == "unsupported"
    assert reason(tmp_path, "a.txt", b"\x89PNG\r\n\x1a\n" + bytes(30)) == "unsupported"
    assert not (tmp_path.parent / "a.txt").exists()


ENTITIES = (
    '<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd"><!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;">'
    + "".join(f'<!ENTITY c{n} "&c{n - 1};&c{n - 1};&c{n - 1};&c{n - 1};&c{n - 1};">' for n in range(1, 12))
    + '<!ENTITY c0 "&b;">]>'
)


def test_entities_are_never_resolved(tmp_path: Path) -> None:
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    body = "<w:p><w:r><w:t>before &x; &c11; after</w:t></w:r></w:p>"
    document = f'{ENTITIES}<w:d xmlns:w="{word}"><w:body>{body}</w:body></w:d>'
    for name, data in (
        ("a.docx", ooxml("word/document.xml", document)),
        ("a.xml", f"{ENTITIES}<d>before &x; &c11; after</d>".encode()),
        ("a.xhtml", f"{ENTITIES}<html><p>before &x; &c11; after</p></html>".encode()),
        (
            "a.odt",
            zipped_file({"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": document}),
        ),
    ):
        result = outcome(tmp_path, name, data)
        if isinstance(result, Parsed):
            assert "root:" not in result.text
            assert "after" in result.text
            assert len(result.text) < 2 * len(ENTITIES) + 200
        else:
            assert result.reason == "corrupt"


# --- OpenDocument and EPUB

ODF = "urn:oasis:names:tc:opendocument:xmlns"


def odf(kind: str, body: str) -> bytes:
    names = {
        "office": "office",
        "text": "text",
        "table": "table",
        "draw": "drawing",
        "presentation": "presentation",
    }
    spaces = " ".join(f'xmlns:{short}="{ODF}:{name}:1.0"' for short, name in names.items())
    content = f"<office:document-content {spaces}><office:body>{body}</office:body></office:document-content>"
    return zipped_file({"mimetype": f"application/vnd.oasis.opendocument.{kind}", "content.xml": content})


def test_odt_headings_spaces_and_tables(tmp_path: Path) -> None:
    cell = "<table:table-cell><text:p>{}</text:p></table:table-cell>"
    body = (
        "<office:text><text:h text:outline-level='1'>One</text:h>"
        "<text:p>a<text:s text:c='3'/>b <text:span>c</text:span><text:tab/>d</text:p>"
        f"<table:table><table:table-row>{cell.format('x')}{cell.format('y')}</table:table-row></table:table>"
        "</office:text>"
    )
    parsed = read(tmp_path, "a.odt", odf("text", body))
    assert parsed.text == "One\n\na   b c\td\nx | y\n\n"
    assert outline(parsed) == {"One": "One"}
    assert parsed.title == "One"


def test_ods_repeated_cells_do_not_explode(tmp_path: Path) -> None:
    def row(*cells: str, times: int = 1) -> str:
        inside = "".join(f"<table:table-cell><text:p>{cell}</text:p></table:table-cell>" for cell in cells)
        empty = "<table:table-cell table:number-columns-repeated='16000'/>"
        return f"<table:table-row table:number-rows-repeated='{times}'>{inside}{empty}</table:table-row>"

    rows = row("name", "age") + row("Ann", "7") + row(times=1_000_000)
    body = f"<office:spreadsheet><table:table table:name='S1'>{rows}</table:table></office:spreadsheet>"
    parsed = check(read(tmp_path, "a.ods", odf("spreadsheet", body)))
    assert parsed.text == "name; age\nname: Ann; age: 7\n\n"
    assert [(section.heading, section.hard) for section in parsed.sections] == [("S1", True)]


def test_odp_slides_are_pages(tmp_path: Path) -> None:
    frame = "<draw:frame presentation:class='title'><text:p>{}</text:p></draw:frame>"
    pages = "".join(f"<draw:page draw:name='p{n}'>{frame.format(f'Slide {n}')}</draw:page>" for n in (1, 2))
    body = f"<office:presentation>{pages}</office:presentation>"
    parsed = check(read(tmp_path, "a.odp", odf("presentation", body)))
    assert parsed.pages == (0, parsed.text.index("Slide 2"))
    assert [section.heading for section in parsed.sections] == ["Slide 1", "Slide 2"]


def test_encrypted_odt(tmp_path: Path) -> None:
    manifest = "<m:manifest xmlns:m='x'><m:file-entry><m:encryption-data/></m:file-entry></m:manifest>"
    data = zipped_file(
        {
            "mimetype": "application/vnd.oasis.opendocument.text",
            "META-INF/manifest.xml": manifest,
            "content.xml": "??",
        }
    )
    assert reason(tmp_path, "a.odt", data) == "encrypted"


def epub_file() -> bytes:
    opf = (
        "<package xmlns='http://www.idpf.org/2007/opf' xmlns:dc='http://purl.org/dc/elements/1.1/'><metadata>"
        "<dc:title>The Book</dc:title><dc:creator>Ada</dc:creator></metadata><manifest>"
        "<item id='one' href='text/one%20a.xhtml'/><item id='two' href='text/two.xhtml'/>"
        "<item id='gone' href='text/gone.xhtml'/><item id='n' href='nav.xhtml' properties='nav'/></manifest>"
        "<spine><itemref idref='two'/><itemref idref='gone'/><itemref idref='one'/></spine></package>"
    )
    nav = "<html><body><nav><a href='text/two.xhtml'>Chapter 2</a></nav></body></html>"
    container = "<container><rootfiles><rootfile full-path='OEBPS/c.opf'/></rootfiles></container>"
    return zipped_file(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": container,
            "OEBPS/c.opf": opf,
            "OEBPS/nav.xhtml": nav,
            "OEBPS/text/one a.xhtml": "<html><body><h1>One</h1><p>Text of one</p></body></html>",
            "OEBPS/text/two.xhtml": "<html><body><p>Text of two</p></body></html>",
        }
    )


def test_epub_follows_the_spine(tmp_path: Path) -> None:
    parsed = check(read(tmp_path, "a.epub", epub_file()))
    assert parsed.text == "Text of two\n\nOne\n\nText of one\n\n"
    assert [(section.heading, section.hard) for section in parsed.sections] == [
        ("Chapter 2", True),
        ("One", True),
    ]
    assert (parsed.title, parsed.metadata["author"]) == ("The Book", "Ada")


# --- markup

PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title> A &amp;
page </title><meta name="author" content="Ada"><style>p {}</style></head><body>
<nav><a href="/">Home</a></nav><h1>Top</h1><p>Some <b>bold</b> text&nbsp;here<br>next line</p>
<script>var x = 1;</script><ul><li>one</li><li>two</li></ul>
<h2>Below</h2><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table><pre>x
  y</pre>
<p>long enough to be the main part of the page, so that menus and footers may go</p>
<footer>imprint</footer></body></html>"""


def test_html_main_text_headings_and_title(tmp_path: Path) -> None:
    parsed = read(tmp_path, "a.html", PAGE)
    assert parsed.text.startswith(
        "Top\n\nSome bold text here\nnext line\n\n- one\n- two\nBelow\n\na | b\n1 | 2\nx\n  y\n\nlong enough"
    )
    assert outline(parsed) == {"Top": "Top", "Below": "Below"}
    assert parsed.title == "A & page"
    assert parsed.metadata == {"encoding": "utf-8", "author": "Ada", "language": "en"}
    assert "Home" not in parsed.text
    assert "imprint" not in parsed.text


@pytest.mark.parametrize(
    "page",
    [
        "<html><body><nav>" + "only the menu holds text " * 20 + "</nav><p>x</p></body></html>",
        "<div>" * 200_000 + "only the menu holds text",
        "<p>only the menu holds text<p><b>",
        "only the menu holds text",
        "<html><body hidden style='display:none'>only the menu holds text</body></html>",
    ],
)
def test_no_page_loses_its_text(tmp_path: Path, page: str) -> None:
    assert "only the menu holds text" in check(read(tmp_path, "a.html", page)).text


def test_html_encoding_is_the_declared_one(tmp_path: Path) -> None:
    page = "<html><head><meta charset='windows-1251'></head><body>Привет мир</body></html>"
    parsed = read(tmp_path, "a.html", page.encode("cp1251"))
    assert parsed.text.strip() == "Привет мир"
    assert parsed.metadata["encoding"] == "cp1251"


def test_xml_loses_its_tags_only(tmp_path: Path) -> None:
    xml = "<article><title>On <i>things</i></title><p>One &amp; two</p><!-- no --><p>three</p></article>"
    parsed = read(tmp_path, "a.xml", xml)
    assert parsed.text == "On things\nOne & two\nthree\n"
    assert (parsed.title, outline(parsed)) == ("On things", {"On things": "On things"})
    assert read(tmp_path, "b.xml", "<a><b>broken").text == "<a><b>broken"
    assert read(tmp_path, "c.xml", "<a b='only attributes'/>").text == "<a b='only attributes'/>"


# --- text


@pytest.mark.parametrize(
    ("encoding", "text", "name"),
    [
        ("utf-8", "plain\r\ntext\rwith\n ends ", "utf-8"),
        ("utf-8-sig", "marked 日本語", "utf-8"),
        ("utf-16", "wide 日本語 text", "utf-16-le"),
        ("utf-16-be", "wide latin text without a mark", "utf-16-be"),
        ("utf-16-le", "wide latin text without a mark", "utf-16-le"),
        ("utf-32", "very wide", "utf-32-le"),
        ("utf-32-be", "very wide text without a mark", "utf-32-be"),
        ("cp1252", "“Müller” — café, naïve señor €", "cp1252"),
        ("latin-1", "Größe in Köln, él está aquí", "cp1252"),
        ("cp932", "日本語の文書です。テキストを読みます。", "cp932"),
        ("gb18030", "中文文档测试。这是一个例子。", "gb18030"),
        ("koi8_r", "Съешь ещё этих мягких французских булок", "koi8_r"),
        ("cp949", "한국어 문서 시험입니다. 안녕하세요", "cp949"),
    ],
)
def test_encodings(tmp_path: Path, encoding: str, text: str, name: str) -> None:
    parsed = read(tmp_path, "a.txt", text.encode(encoding))
    assert parsed.text == text
    assert parsed.metadata["encoding"] == name


def test_damaged_utf8_is_still_utf8(tmp_path: Path) -> None:
    data = "Größe, naïve, 日本語 ".encode() * 20 + b"\xff"
    assert read(tmp_path, "a.txt", data).text == data.decode("utf-8", "replace")


MARKDOWN = """---
title: "Front: matter"
---
Intro
# One #
text
```python
# no heading
```
Two words
===
- item
---
    # code
### Three
"""


def test_markdown_headings_outside_of_code(tmp_path: Path) -> None:
    parsed = read(tmp_path, "a.md", MARKDOWN)
    assert parsed.text == MARKDOWN
    assert outline(parsed) == {"One": "# One #", "Two words": "Two words", "Three": "### Three"}
    assert parsed.title == "Front: matter"
    assert read(tmp_path, "b.md", "text\r\n# A heading\r\n").title == "A heading"


def test_rst_titles(tmp_path: Path) -> None:
    text = "=====\nTitle\n=====\n\nText\n\nPart\n----\n\nmore\n\n----\n\nend\n"
    parsed = read(tmp_path, "a.rst", text)
    assert parsed.text == text
    assert outline(parsed) == {"Title": "=====", "Part": "Part"}
    assert parsed.title == "Title"


@pytest.mark.parametrize(
    ("name", "text", "headings"),
    [
        (
            "a.py",
            "import x\n\n@dec\ndef f(a):\n    def inner(): ...\nclass C(B):\n    pass\n",
            ["def f", "class C"],
        ),
        (
            "a.rs",
            "use x;\npub fn f<T>(a: T) -> T {\n}\nimpl A for B {\n}\n",
            ["fn f<T>(a: T) -> T", "impl A for B"],
        ),
        ("a.go", "package p\n\nfunc F(a int) {\n\treturn\n}\n", ["package p", "func F(a int)"]),
        ("a.c", "int x;\nstatic int f(int a)\n{\n  return g(a);\n}\n", ["static int f"]),
        ("a.js", "export async function f(a) {\n}\nclass A {\n}\n", ["function f(a)", "class A"]),
        ("a.tex", "\\section{One}\ntext\n\\subsection*{Two}\n", ["One", "Two"]),
        ("a.ini", "[one]\na=1\n[two]\n", ["one", "two"]),
        ("a.sql", "create table a (\n b int);\n", ["create table a"]),
    ],
)
def test_sections_of_source_code(tmp_path: Path, name: str, text: str, headings: list[str]) -> None:
    parsed = check(read(tmp_path, name, text))
    assert parsed.text == text
    assert [section.heading for section in parsed.sections] == headings


# --- data


def test_csv_rows_carry_their_headers(tmp_path: Path) -> None:
    text = 'name;note\nAnn;"two\nlines; and a semicolon"\nBob;\n'
    parsed = read(tmp_path, "a.csv", text)
    assert parsed.text == "name; note\nname: Ann; note: two lines; and a semicolon\nname: Bob\n"
    assert parsed.metadata["delimiter"] == ";"
    assert read(tmp_path, "b.tsv", "1\t2\n3\t4\n").text == "1; 2\n3; 4\n"


def test_csv_that_is_no_table_stays_as_it_is(tmp_path: Path) -> None:
    text = "Just a line of prose\r\nand another"
    assert read(tmp_path, "a.csv", text).text == text
    swallowed = 'a,b\n1,"' + "x\n" * 100_000
    assert check(read(tmp_path, "b.csv", swallowed)).text.count("x") == 100_000


def test_json_is_flattened(tmp_path: Path) -> None:
    parsed = read(tmp_path, "a.json", '{"title": "T", "a": [{"b": 1.5}, true, null], "é": "\\ud83d\\ude00 \\ud800"}')
    assert parsed.text == "title: T\na[0].b: 1.5\na[1]: true\né: 😀 �\n"
    assert parsed.title == "T"


def test_json_that_is_too_deep_or_damaged_stays_as_it_is(tmp_path: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    assert read(tmp_path, "a.json", deep).text == deep
    assert read(tmp_path, "b.json", '{"a": 1').text == '{"a": 1'


def test_json_lines_records_are_hard_sections(tmp_path: Path) -> None:
    records = [
        {"title": "One", "text": "Text one", "x": 1},
        {"id": 7, "passage": "Two\nlines"},
        {"k": "v", "n": [1]},
    ]
    text = "\n".join(map(json.dumps, records)) + "\nno json\n\n"
    parsed = check(read(tmp_path, "a.jsonl", text))
    assert parsed.text == "One\nText one\n\nTwo\nlines\n\nk: v\nn[0]: 1\n\nno json\n\n"
    assert [section.heading for section in parsed.sections] == ["One", "7", "", ""]
    assert all(section.hard for section in parsed.sections)
    assert parsed.text[parsed.sections[2].start :].startswith("k: v")


def test_notebook_cells_and_outputs(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Head\n", "words"]},
        {
            "cell_type": "code",
            "source": "1 + 1",
            "outputs": [{"data": {"text/plain": ["2"], "image/png": "xx"}}],
        },
        {"cell_type": "code", "source": "print(3)", "outputs": [{"output_type": "stream", "text": ["3\n"]}]},
        {"cell_type": "markdown", "source": "## Next"},
    ]
    parsed = read(tmp_path, "a.ipynb", json.dumps({"cells": cells, "metadata": {"kernelspec": {"language": "python"}}}))
    assert parsed.text == "# Head\nwords\n\n1 + 1\n\n2\n\nprint(3)\n\n3\n\n## Next\n\n"
    assert outline(parsed) == {"Head": "# Head", "Next": "## Next"}
    assert (parsed.title, parsed.metadata["language"]) == ("Head", "python")


# --- RTF and mail


def test_rtf(tmp_path: Path) -> None:
    data = (
        rb"{\rtf1\ansi\ansicpg1252\uc1{\fonttbl{\f0 Arial;}{\f1\fcharset204 Cyr;}{\f2\fcharset128 Gothic;}}"
        rb"{\info{\title My \'fcber title}{\author Ada}}{\*\generator Nobody;}{\header Top line\par}"
        rb"\pard\outlinelevel0 Heading\par\pard\plain Caf\'e9 \u8364? \{x\} \emdash{\v hidden}"
        rb"{\f1 \'cf\'f0\'e8}{\f2 \'93\'fa\'96{\b\'7b}}\par \u-10179?\u-8704?{\pict\bin4 }{}}}\line"
        rb" b\cell c\row}"
    )
    parsed = check(read(tmp_path, "a.rtf", data))
    assert parsed.text.startswith("Heading\nCafé € {x} —При日")
    assert "😀" in parsed.text
    assert "b | c\n" in parsed.text
    assert "hidden" not in parsed.text
    assert (parsed.title, parsed.metadata["author"]) == ("My über title", "Ada")
    assert [section.heading for section in parsed.sections] == ["Heading", "Headers and footers"]
    assert reason(tmp_path, "b.rtf", rb"{\rtf1" + b"{" * 100_000) == "corrupt"
    assert reason(tmp_path, "c.rtf", b"plain") == "corrupt"


MAIL = """From: =?utf-8?q?J=C3=B6rg?= <j@x.y>
To: a@b.c
Date: Mon, 1 Jan 2024 10:00:00 +0000
Subject: {subject}
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=B

--B
Content-Type: multipart/alternative; boundary=C

--C
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

Gr=FC=DFe
--C
Content-Type: text/html

<p>html body</p>
--C--
--B
Content-Type: application/pdf; name="a.pdf"
Content-Disposition: attachment; filename="a.pdf"

xx
--B--
"""


def mail(subject: str) -> str:
    return MAIL.format(subject=subject)


def test_eml(tmp_path: Path) -> None:
    parsed = check(read(tmp_path, "a.eml", mail("Hello")))
    assert parsed.text == (
        "From: Jörg <j@x.y>\nTo: a@b.c\nDate: Mon, 1 Jan 2024 10:00:00 +0000\nSubject: Hello\n\n"
        "Grüße\n\nAttachments: a.pdf\n\n"
    )
    assert parsed.title == "Hello"
    html = read(tmp_path, "b.eml", "From: a\nSubject: s\nContent-Type: text/html\n\n<p>html <b>body</b></p>")
    assert html.text.endswith("\n\nhtml body\n\n")


def test_mbox_messages_are_hard_sections(tmp_path: Path) -> None:
    box = "".join(f"From a@b Mon Jan  1 10:00:00 2024\n{mail(subject)}\n" for subject in ("One", "Two"))
    parsed = check(read(tmp_path, "a.mbox", box))
    assert [(section.heading, section.hard) for section in parsed.sections] == [("One", True), ("Two", True)]
    assert parsed.text[parsed.sections[1].start :].startswith("From: Jörg")
    assert parsed.metadata["messages"] == 2


# --- any file


@pytest.mark.parametrize(
    ("name", "data", "mime"),
    [
        ("paper", pdf_file("text"), "application/pdf"),
        ("paper.docx", pdf_file("text"), "application/pdf"),
        ("page", PAGE.encode(), "text/html"),
        ("page.xls", PAGE.encode(), "text/html"),
        ("notes.unknown", b"just text", "text/plain"),
        ("letter.doc", rb"{\rtf1 text}", "application/rtf"),
        ("message", mail("x").encode(), "message/rfc822"),
        ("book", epub_file(), "application/epub+zip"),
        ("memo.pdf", docx_file(), SUFFIXES[".docx"].mime),
        ("MEMO.TXT", b"text", "text/plain"),
    ],
)
def test_the_bytes_decide_what_a_file_is(tmp_path: Path, name: str, data: bytes, mime: str) -> None:
    assert check(read(tmp_path, name, data)).mime == mime


def test_binary_files_of_unknown_kind(tmp_path: Path) -> None:
    assert reason(tmp_path, "a.bin", bytes(range(256)) * 4) == "unsupported"
    assert reason(tmp_path, "a.txt", bytes(range(256)) * 4) == "corrupt"


@pytest.mark.parametrize("suffix", ["", *sorted(SUFFIXES)])
def test_empty_and_blank_files(tmp_path: Path, suffix: str) -> None:
    assert reason(tmp_path, "a" + suffix, b"") == "empty"
    assert reason(tmp_path, "b" + suffix, b" \r\n\t\n") in ("no_text", "corrupt")
    assert reason(tmp_path, "c" + suffix, b"\xef\xbb\xbf") in ("no_text", "corrupt")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for path in (
        tmp_path / "fifo.txt",
        tmp_path / "loop.txt",
        tmp_path,
        tmp_path / "gone.txt",
        Path("/dev/zero"),
    ):
        with pytest.raises(LoadError) as caught:
            load(path)
        assert caught.value.reason == "unreadable"
    with pytest.raises(LoadError, match="unreadable"):
        load(Path("nul\0byte.txt"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("secret")
    path.chmod(stat.S_IWUSR)
    with pytest.raises(LoadError, match="unreadable"):
        load(path)


def test_odd_names(tmp_path: Path) -> None:
    for name in ("a\n.txt", "ü" * 125 + ".txt", "\udcff.txt", ".txt", "é.txt", "é.TXT"):
        assert read(tmp_path, name, "text").text == "text"


def test_limits(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", "x" * 10, max_bytes=10, max_chars=10).text == "x" * 10
    assert reason(tmp_path, "a.txt", "x" * 11, max_bytes=10) == "too_large"
    assert reason(tmp_path, "a.txt", "x" * 11, max_chars=10) == "too_large"
    for name, data in (
        ("a.docx", docx_file()),
        ("a.html", PAGE),
        ("a.csv", "a,b\n1,2\n"),
        ("a.epub", epub_file()),
    ):
        assert reason(tmp_path, name, data, max_chars=5) == "too_large"


def test_a_parser_that_fails_is_an_error_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, expected in (
        (MemoryError(), "too_large"),
        (RecursionError(), "corrupt"),
        (OverflowError("x"), "corrupt"),
        (KeyError("\ud800"), "corrupt"),
    ):

        def fail(_: object, error: Exception = error) -> Parsed:
            raise error

        monkeypatch.setitem(SUFFIXES, ".txt", SUFFIXES[".txt"]._replace(parse=fail))
        assert reason(tmp_path, "a.txt", "text") == expected


SEEDS = [
    pdf_file("some text", "more"),
    docx_file(),
    epub_file(),
    PAGE.encode(),
    MARKDOWN.encode(),
    mail("x").encode(),
    rb"{\rtf1\ansi\uc1 {\fonttbl{\f0\fcharset128 A;}}\f0\'93\'fa \u8364?\par}",
    b'{"a": [1, "\\ud800"]}\n{"text": "b"}\n',
    b'a,b\n1,"2\n',
]


def damaged(seed: bytes, cuts: list[tuple[int, bytes]]) -> bytes:
    data = bytearray(seed)
    for place, piece in cuts:
        begin = place % (len(data) + 1)
        data[begin : begin + len(piece)] = piece
    return bytes(data)


FILES = st.binary(max_size=300) | st.builds(
    damaged,
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=8)), max_size=4),
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=FILES, suffix=st.sampled_from(["", ".doc", *sorted(SUFFIXES)]))
def test_whatever_the_bytes_there_is_text_or_a_reason(tmp_path: Path, data: bytes, suffix: str) -> None:
    result = outcome(tmp_path, "file" + suffix, data)
    assert check(result) if isinstance(result, Parsed) else result.reason in REASONS
    assert isinstance(result, Parsed) or result.detail.isprintable()


def test_a_name_in_an_archive_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    data = epub_file().replace(b"OEBPS/c.opf", b"\x1bEBPS/c.opf")
    before, _, behind = data.rpartition(b"OEBPS/text/one")  # in the directory of the archive, not in the header
    result = outcome(tmp_path, "file.epub", before + b"\x1bEBPS/text/one" + behind)
    assert isinstance(result, LoadError)
    assert "EBPS/text/one" in result.detail
    assert result.detail.isprintable()
    assert str(result).isprintable()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")),
    suffix=st.sampled_from(UNCHANGED),
)
def test_text_formats_are_left_alone(tmp_path: Path, text: str, suffix: str) -> None:
    result = outcome(tmp_path, "file" + suffix, text)
    if isinstance(result, LoadError):
        assert result.reason == ("no_text" if text else "empty")
        assert not text.removeprefix("\ufeff").strip()
    else:
        assert result.text == text.removeprefix("\ufeff")
