"""What a collection on object storage costs beside one in a folder, with a server on loopback.

    python benchmarks/object_storage.py --chunks 5000

The server is moto, a Python program: it adds a few milliseconds to each request and no distance. With AWS_ENDPOINT_URL
and L2M_HOME set, that place is measured instead.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from l2m_rag.config import parse_url
from l2m_rag.memory_tiers.long_term import LongTermTier, Manifest, create_tier
from l2m_rag.memory_tiers.places import Where, place_of, writing
from l2m_rag.memory_tiers.records import Chunk

DIMENSION = 384
WORDS = [f"word{number}" for number in range(2000)]


def measured(where: Where, count: int) -> dict[str, float]:
    """Give the seconds of what is done with a collection of so many chunks."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((count, DIMENSION)).astype(np.float32)
    texts = [" ".join(draw.choice(WORDS, 60)) for _ in range(count)]
    chunks = [Chunk(f"{at:032x}", "d", at, 1, "", 0, len(text), text, {}) for at, text in enumerate(texts)]
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - start

    made = Manifest(embedder="none", fingerprint="x", dimension=DIMENSION, created_at=time.time())
    timed("make", lambda: create_tier(where, made))
    tier = LongTermTier(where)

    def add() -> None:
        with writing(where):
            for start in range(0, count, 1000):
                tier.add(chunks[start : start + 1000], vectors[start : start + 1000])
            tier.store.index_text()

    timed("add", add)
    timed("first search", lambda: tier.search(texts[0], vectors[0], 10))
    timed("open and search, cached", lambda: LongTermTier(where).search(texts[1], vectors[1], 10))
    for mode in ("dense", "hybrid"):
        runs = []
        for at in range(50):
            start = time.perf_counter()
            tier.search(" ".join(texts[at].split()[:6]), vectors[at], 10, mode=mode)  # type: ignore[arg-type]
            runs.append(time.perf_counter() - start)
        seconds[f"search, {mode}, median"] = statistics.median(runs)
    timed("verify", tier.verify)
    timed("compact", tier.compact)
    place_of(where).remove()
    return seconds


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=5000)
    count = parser.parse_args().chunks
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ.setdefault("XDG_CACHE_HOME", str(scratch / "cache"))
        home = os.environ.get("L2M_HOME", "")
        if not home:
            from moto.server import ThreadedMotoServer

            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            stack.callback(server.stop)
            address = "http://{}:{}".format(*server.get_host_and_port())
            os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
            os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "key"}
            urllib.request.urlopen(urllib.request.Request(f"{address}/bench", method="PUT")).close()
            home = "s3://bench/l2m"
        there = measured(parse_url(home) / f"bench-{uuid.uuid4().hex[:8]}", count)
        here = measured(scratch / "folder", count)
    rows = {
        name: {
            "folder_s": round(here[name], 4),
            "object_storage_s": round(there[name], 4),
            "ratio": round(there[name] / here[name], 2),
        }
        for name in here
    }
    print(json.dumps({"chunks": count, "dimension": DIMENSION, "seconds": rows}, indent=1))


if __name__ == "__main__":
    main()
