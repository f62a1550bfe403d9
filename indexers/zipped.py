"""Documents that are zip archives: opened with limits, read in memory, never written to disk."""

from __future__ import annotations

import io
import posixpath
import zipfile
import zlib
from urllib.parse import unquote

from lxml import etree

from l2m_rag.errors import LoadError

MAX_MEMBERS = 20_000
MAX_BYTES = 512 << 20  # of all members, unpacked
MAX_RATIO = 100  # unpacked to packed, where more than `FREE_BYTES` come out
FREE_BYTES = 32 << 20


class Package:
    """The members of a zip archive.

    Args:
        data: the archive.

    Raises:
        LoadError: corrupt, encrypted, or too_large if it would unpack to more than the limits allow.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OverflowError) as error:
            raise LoadError("corrupt", f"the zip archive cannot be opened: {error}") from error
        members = self._archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise LoadError("too_large", f"the archive has {len(members)} members; the limit is {MAX_MEMBERS}")
        unpacked = sum(member.file_size for member in members)
        if unpacked > MAX_BYTES:
            raise LoadError("too_large", f"the archive unpacks to {unpacked} bytes; the limit is {MAX_BYTES}")
        if unpacked > FREE_BYTES and unpacked > MAX_RATIO * len(data):
            raise LoadError(
                "too_large",
                f"the archive unpacks to {unpacked // len(data)} times its size, as a zip bomb does",
            )
        self._members = {member.filename: member for member in members}
        self._folded = {name.lower(): name for name in self._members}

    @property
    def names(self) -> list[str]:
        """The names of the members, in the order of the archive."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return self._name(name) is not None

    def _name(self, name: str) -> str | None:
        # Names in packages compare without case; some writers also use backslashes.
        name = name.lstrip("/")
        return name if name in self._members else self._folded.get(name.lower())

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            LoadError: corrupt or encrypted.
        """
        found = self._name(name)
        if found is None:
            raise LoadError("corrupt", f"the archive lacks {name}")
        member = self._members[found]
        if member.flag_bits & 1:
            raise LoadError("encrypted", "the archive is protected by a password")
        try:
            return self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError) as error:
            raise LoadError("corrupt", f"{name} cannot be unpacked: {error}") from error

    def xml(self, name: str) -> etree._Element:
        """The root element of a member.

        Raises:
            LoadError: corrupt or encrypted.
        """
        return parse_xml(self.read(name), name)

    def optional_xml(self, name: str) -> etree._Element | None:
        """The root element of a member, or None if it is missing or damaged."""
        try:
            return self.xml(name) if name and name in self else None
        except LoadError as error:
            if error.reason == "corrupt":
                return None
            raise

    def relations(self, part: str) -> dict[str, tuple[str, str]]:
        """The relations of an Office part: id to (last word of the type, name of the member)."""
        folder, base = posixpath.split(part)
        root = self.optional_xml(posixpath.join(folder, "_rels", base + ".rels"))
        found = {}
        for relation in root if root is not None else ():
            target = relation.get("Target") or ""
            if isinstance(relation.tag, str) and relation.get("TargetMode") != "External":
                kind = (relation.get("Type") or "").rpartition("/")[2]
                found[relation.get("Id") or ""] = (kind, resolve(part, target))
        return found


def resolve(part: str, target: str) -> str:
    """The name of the member that a reference inside another member points to."""
    target = unquote(target.partition("#")[0])
    if target.startswith("/"):
        return target.lstrip("/")
    return posixpath.normpath(posixpath.join(posixpath.dirname(part), target))


def parse_xml(data: bytes, name: str = "the file") -> etree._Element:
    """The root element of an XML text; entities are never resolved and nothing is fetched.

    Raises:
        LoadError: corrupt.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise LoadError("corrupt", f"the XML of {name} is damaged: {error}") from error
    if root is None:
        raise LoadError("corrupt", f"the XML of {name} is damaged")
    return root


def local(element: etree._Element) -> str:
    """The name of an element without its namespace; "" for comments and the like."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def attribute(element: etree._Element, name: str) -> str | None:
    """The value of an attribute, whatever namespace it is in."""
    plain = element.get(name)
    if plain is not None:
        return str(plain)
    return next((str(value) for key, value in element.attrib.items() if key.endswith("}" + name)), None)
