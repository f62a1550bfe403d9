"""What L2MReranker does to the order in which documents were found, and the milliseconds that it takes.

Shown are the share of questions whose document comes first, or among the first three, and the mean reciprocal rank.

pip install -e '.[langchain,eval]'
python benchmarks/reranker.py --data DATA      # DATA/fairytaleqa/dev.jsonl.zst: questions to sections of stories
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from l2m_rag.config import load_settings
from l2m_rag.evaluate import half_width
from l2m_rag.langchain import L2MEmbeddings, L2MReranker, L2MVectorStore
from l2m_rag.tasks import rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--by", nargs="+", default=["sentences", "reader"])
    parser.add_argument("--k", type=int, default=10, help="documents that are put in another order")
    options = parser.parse_args()
    home = tempfile.mkdtemp()
    given = load_settings()[0]
    settings = load_settings({"home": home, "models": str(given.models or given.data / "models")})[0]
    asked = list(rows(options.data / "fairytaleqa" / "dev.jsonl.zst"))
    texts = list(dict.fromkeys(one["context"] for one in asked))
    documents = [Document(text, id=str(number)) for number, text in enumerate(texts)]
    ours = L2MVectorStore("sections", settings=settings)
    ours.add_documents(documents)
    store = InMemoryVectorStore(L2MEmbeddings(settings=settings))
    store.add_documents(documents)
    find: dict[str, Callable[[str], list[Document]]] = {
        "InMemoryVectorStore": lambda text: store.similarity_search(text, k=options.k),
        "hybrid search": lambda text: ours.similarity_search(text, k=options.k),
    }
    rerank = {by: L2MReranker(by=by, top_n=None, settings=settings) for by in options.by}
    ranks: dict[str, list[int]] = {}
    took: dict[str, float] = dict.fromkeys(rerank, 0.0)
    for one in random.Random(0).sample(asked, options.questions):
        for name, search in find.items():
            found = search(one["question"])
            ranks.setdefault(name, []).append(_rank(found, one["context"]))
            for by, reranker in rerank.items():
                began = time.monotonic()
                again = reranker.compress_documents(found, one["question"])
                took[by] += (time.monotonic() - began) / (len(find) * options.questions)
                ranks.setdefault(f"{name}, by {by}", []).append(_rank(again, one["context"]))
    print(f"{len(texts)} sections, {options.questions} questions, the first {options.k}")
    for name, places in ranks.items():
        shares = [_shown([float(0 < place <= top) for place in places]) for top in (1, 3)]
        print(f"{name:36} @1 {shares[0]}  @3 {shares[1]}  MRR {_shown([1 / p if p else 0.0 for p in places])}")
    print({by: f"{1000 * seconds:.0f} ms" for by, seconds in took.items()})


def _rank(found: list[Document], text: str) -> int:
    """Give the place of a text among documents, from 1; 0 when it is not there."""
    return next((place for place, one in enumerate(found, 1) if one.page_content == text), 0)


def _shown(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ±{half_width(values):.3f}"


if __name__ == "__main__":
    main()
