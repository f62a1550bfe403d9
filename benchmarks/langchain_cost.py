"""What a call of L2MRetriever costs beside the search that it makes, in turns on one collection.

pip install -e '.[langchain]'
python benchmarks/langchain_cost.py --collection contracts
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from l2m_rag import collection
from l2m_rag.langchain import L2MRetriever


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="default")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    kb = collection.open(options.collection)
    retriever = L2MRetriever(collection=kb, k=5)
    questions = [" ".join(one.chunk.text.split()[:12]) for one in kb.search("what is it about?", 20)]
    took: dict[str, list[float]] = {"search": [], "retriever": []}
    calls: dict[str, Callable[[str], object]] = {
        "search": lambda text: kb.search(text, 5),
        "retriever": retriever.invoke,
    }
    for turn in range(options.rounds + 20):
        for name in sorted(calls, reverse=bool(turn % 2)):
            begun = time.perf_counter()
            calls[name](questions[turn % len(questions)])
            if turn >= 20:  # the first ones warm up
                took[name].append(1000 * (time.perf_counter() - begun))
    pairs = zip(took["retriever"], took["search"], strict=True)
    found = {
        "chunks": kb.info().chunks,
        "search_ms": round(statistics.median(took["search"]), 2),
        "retriever_ms": round(statistics.median(took["retriever"]), 2),
        "ratio": round(statistics.median(one / other for one, other in pairs), 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
