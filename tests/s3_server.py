"""Object storage on loopback, for tests."""

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("moto")
pytest.importorskip("obstore")
from moto.server import ThreadedMotoServer


def environment(endpoint: str) -> dict[str, str]:
    """Give the variables that lead to an endpoint; credentials of a role are looked for where nobody answers."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_REGION": "us-east-1",
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
    }


@contextmanager
def serving() -> Iterator[str]:
    """Run a server; give its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def make_bucket(endpoint: str, name: str) -> None:
    """Make a bucket."""
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")):
        pass


def clear_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what the machine says of AWS out of the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
