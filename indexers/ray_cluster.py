"""The way to a Ray cluster: an address becomes a connection within seconds, or one error that says what to do."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from l2m_rag.errors import L2MError, MissingExtraError, UsageError

logger = logging.getLogger(__name__)

_CPUS = 4  # of a worker, where the setting `threads` says nothing: a small embedder gains little by more
_PATIENCE = 5.0  # seconds in which a port must answer
_OBJECT_STORE = 256 << 20  # bytes, on this machine: what is in flight is small


def import_ray() -> Any:
    """Import ray, without its reports of usage.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import grpc  # noqa: F401  # what Ray speaks; its `client` extra brings it
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    return ray


def check_reachable(address: str) -> None:
    """Check within seconds that something like Ray listens at an address; Ray itself tries for minutes.

    Args:
        address: `local`, `auto`, `HOST:PORT` or `ray://HOST:PORT`.

    Raises:
        UsageError: the address has none of these forms.
        L2MError: nothing answers.
    """
    target = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if target in ("local", "auto"):
        return
    host, _, port = target.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or "/" in host or " " in host:
        raise UsageError(f"--ray {target!r} must be local, auto, HOST:PORT or ray://HOST:PORT")
    import grpc

    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):  # its certificates are Ray's to look for
            with grpc.insecure_channel(f"{host}:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=_PATIENCE)
    except OSError as error:
        raise _silent(target, error.strerror or str(error)) from error
    except grpc.FutureTimeoutError as error:
        raise _silent(target, "what listens there is not Ray") from error


def connect(ray: Any, address: str) -> bool:
    """Join a cluster, or start one on this machine; say whether that is new, and so ours to end.

    Workers run in an empty folder: Ray would put the working folder of this process first on their path for imports,
    where a file of the documents may lie that is called like a library.

    Raises:
        L2MError: it does not take us.
    """
    if ray.is_initialized():
        return False
    logging.getLogger("ray").addHandler(logging.NullHandler())  # its remarks on how it was set up are not for users
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    here = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if here else {}
    try:
        with tempfile.TemporaryDirectory() as empty, _quiet():
            ray.init(address=address, runtime_env={"working_dir": empty}, **options)
    except Exception as error:  # of another version or Python, without the token, no longer there, ...
        ray.shutdown()
        if address == "auto" and isinstance(error, ConnectionError):
            raise _silent(address, str(error).split(". ")[0]) from error
        raise L2MError(
            f"the Ray cluster at {address!r} cannot be used ({said(error)}). It must run ray {version('ray')} on the "
            f"same Python; one that asks for a token wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN set here"
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray has put its own in place
            signal.signal(number, handler)
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off stderr what Ray's C++ half writes there while it connects, whatever its log level is."""
    if logger.isEnabledFor(logging.INFO):  # `--debug`
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def shares(nodes: Sequence[dict[str, float]], threads: int) -> list[dict[str, float]]:
    """Give the resources of each worker that some machines have room for: one for each GPU, else for each few CPUs.

    Args:
        nodes: resources of each machine, as Ray calls them.
        threads: CPUs of a worker; 0 for at most 4 of its machine.

    Returns:
        Options of an actor, `num_cpus` and where there is one `num_gpus`.
    """
    found: list[dict[str, float]] = []
    for node in nodes:
        cpus, gpus = int(node.get("CPU", 0)), int(node.get("GPU", 0))
        share = min(threads or _CPUS, cpus)
        if gpus and cpus:
            found += [{"num_cpus": min(share, max(1, cpus // gpus)), "num_gpus": 1}] * min(gpus, cpus)
        elif cpus:
            found += [{"num_cpus": share}] * (cpus // share)
    return found


def said(error: BaseException) -> str:
    """Give what an error of Ray says, without the traces behind it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _silent(address: str, reason: str) -> L2MError:
    return L2MError(
        f"no Ray cluster answers at {address!r} ({reason}); start one with: ray start --head, or give --ray local"
    )
