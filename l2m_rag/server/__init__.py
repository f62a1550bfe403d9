"""Collections for other programs: over HTTP (`http`, the extra `server`) and as MCP tools (`mcp`, the extra `mcp`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from l2m_rag.errors import MissingExtraError

_PACKAGES = {"server": ("fastapi", "uvicorn"), "mcp": ("mcp",)}


def require(extra: Literal["server", "mcp"]) -> None:
    """Check that the packages of an extra are there, before the module that needs them is imported.

    Raises:
        MissingExtraError: one is not.
    """
    for package in _PACKAGES[extra]:
        if find_spec(package) is None:
            raise MissingExtraError(package, extra)
