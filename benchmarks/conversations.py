"""What is found again of a conversation: by L2MChatMessageHistory, by a vector store, and in the newest tokens alone.

pip install -e '.[eval,langchain,train]'
python benchmarks/conversations.py memorybank --plot docs/images/memory-by-age.png
python benchmarks/conversations.py locomo --answers 100
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
from conversation_sets import Question, Talk, Turn, line, locomo, memorybank
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.vectorstores import InMemoryVectorStore

from l2m_rag import qa
from l2m_rag.collection import Collection
from l2m_rag.config import Settings, load_settings
from l2m_rag.conversation import line_of
from l2m_rag.evaluate import half_width, sample
from l2m_rag.langchain import L2MChatMessageHistory, L2MEmbeddings
from l2m_rag.memory_tiers.records import Chunk, Passage
from l2m_rag.models import load_embedder, load_language_model
from l2m_rag.overlap import token_f1

OURS, AROUND = "L2MChatMessageHistory", "the same, around=1"
STORE, BESIDE = "InMemoryVectorStore", "the same, neighbours added"
DATED = "the same, days written out"
K, DEPTHS = 10, (1, 5, 10)
PASSAGE = 256  # tokens; a window is read in pieces of whole turns that are no longer, as the reader has learnt

Found = list[tuple[list[str], str]]
"""What was found, best first: ids of turns, and the text that is read."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of finding turns: by rank, or all that a window of so many tokens holds.

    Args:
        find: gives what is found for a question.
        window: tokens; 0 for ways that rank.
        counted: is what it finds compared with the evidence?
        read: is what it finds read?
    """

    find: Callable[[str], Found]
    window: int = 0
    counted: bool = True
    read: bool = True


# -- ways --------------------------------------------------------------------------------------------------------------
def ways(talk: Talk, kb: Collection, count: Callable[[str], int], windows: Sequence[int]) -> dict[str, Way]:
    """Give the ways of finding turns of one conversation; whatever they give to read begins with its day."""
    history = L2MChatMessageHistory(talk.name, kb)
    for at, told in groupby(talk.turns, key=lambda turn: turn.at):
        history.add_messages([_message(turn) for turn in told], at=at.timestamp())
    turns = talk.turns
    stored = sorted(kb.texts(f"metadata.chat = '{talk.name}'"), key=lambda text: text.id)
    assert [text.text for text in stored] == [f"{turn.by}: {turn.text}" for turn in turns]  # in the same order
    place = {text.id: number for number, text in enumerate(stored)}
    store = InMemoryVectorStore(L2MEmbeddings(settings=kb.settings))
    store.add_texts([text.text for text in stored], ids=[str(number) for number in range(len(stored))])

    plain, dated = [line(turn) for turn in turns], [line_of(text) for text in stored]

    def alone(places: Iterable[int], lines: Sequence[str]) -> Found:
        return [([turns[at].id], lines[at]) for at in places]

    def ours(query: str) -> Found:
        return alone((place[document.id or ""] for document in history.recall(query, K)), dated)

    def near(at: int) -> slice:
        return slice(max(0, at - 1), at + 2)

    def around(query: str) -> Found:
        found = [(near(place[one.id or ""]), one.page_content) for one in history.recall(query, K, around=1)]
        return [([turn.id for turn in turns[beside]], text) for beside, text in found]

    def vectors(query: str, lines: Sequence[str] = plain) -> Found:
        return alone((int(document.id or "") for document in store.similarity_search(query, K)), lines)

    def beside(query: str) -> Found:
        found = [near(int(document.id or "")) for document in store.similarity_search(query, K)]
        return [([turn.id for turn in turns[one]], "\n".join(plain[one])) for one in found]

    made = {OURS: Way(ours), AROUND: Way(around), STORE: Way(vectors)}
    made |= {DATED: Way(partial(vectors, lines=dated), counted=False), BESIDE: Way(beside)}
    costs = [count(one) for one in plain]
    for window in windows:
        pieces = pieces_of(costs, newest_of(costs, window), PASSAGE)
        newest = [([turns[at].id for at in piece], "\n".join(plain[at] for at in piece)) for piece in pieces]
        made[f"newest {window:,} tokens"] = Way(partial(_all, newest), window, read=window <= 2048)
    return made


def newest_of(costs: Sequence[int], window: int) -> list[int]:
    """Give the places of the turns that a window of so many tokens holds whole, newest first."""
    spent = list(accumulate(reversed(costs)))
    return [len(costs) - 1 - number for number, total in enumerate(spent) if total <= window]


def pieces_of(costs: Sequence[int], newest: Sequence[int], most: int) -> list[list[int]]:
    """Cut the newest turns into pieces of at most so many tokens, newest first, the turns of each oldest first."""
    pieces: list[list[int]] = []
    for at in newest:
        if pieces and sum(costs[one] for one in [at, *pieces[-1]]) <= most:
            pieces[-1].insert(0, at)
        else:
            pieces.append([at])
    return pieces


def _all(found: Found, query: str) -> Found:
    return found


def _message(turn: Turn) -> BaseMessage:
    if turn.by in ("human", "ai"):
        return HumanMessage(turn.text) if turn.by == "human" else AIMessage(turn.text)
    return HumanMessage(turn.text, name=turn.by)


# -- measures ----------------------------------------------------------------------------------------------------------
def recalled(found: Found, evidence: frozenset[str], k: int | None) -> float:
    """Give the share of the evidence among the first k that were found, or among all."""
    held = {name for names, _ in found[:k] for name in names}
    return len(evidence & held) / len(evidence)


class Asked:
    """The shipped reader over what a way has found, under the same options whatever the way.

    A passage comes with its cosine to the question, which the reader weighs: for the newest tokens, too, where no
    search has computed it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._embedder = load_embedder(settings)
        self._known: dict[str, Any] = {}
        self._quoted: dict[tuple[str, ...], Any] = {}  # a passage that several ways find is read once
        self._model: Any = load_language_model(settings)
        self._read, self._model.quote = self._model.quote, self._quote

    def answer(self, question: str, found: Found) -> qa.Answer:
        """Answer always; how likely it is that there is an answer stands beside it."""
        new = [text for text in dict.fromkeys([question, *(text for _, text in found)]) if text not in self._known]
        self._known |= zip(new, self._embedder.encode(new) if new else [], strict=True)
        passages = []
        for number, (_, text) in enumerate(found):
            cosine = float(self._known[text] @ self._known[question])
            chunk = Chunk(str(number), str(number), 0, None, "", 0, len(text), text)
            passages.append(Passage(chunk, cosine, dense=cosine))
        return qa.answer(
            question,
            lambda *_: passages,
            self._model,
            budget=10**6,  # whatever was found is looked at
            enough=self._settings.enough,
            abstain_below=0.0,
        )

    def _quote(self, question: str, texts: Sequence[str]) -> Any:
        key = (question, *texts)
        if key not in self._quoted:
            self._quoted[key] = self._read(question, texts)
        return self._quoted[key]


Values = dict[str, dict[str, dict[str, list[float]]]]
"""What was measured of each question, by way, measure and group."""


def measure(
    talks: Sequence[Talk], settings: Settings, windows: Sequence[int], answers: int | None, seed: int
) -> Values:
    """Ask everything of every conversation.

    Args:
        talks: conversations.
        settings: of the library.
        windows: how many of the newest tokens are kept.
        answers: how many questions are answered, by chance; the rest is only searched for. None for all.
        seed: of which.
    """
    values: Values = {}
    model, reader = load_language_model(settings), Asked(settings)
    read = {id(one) for one in sample([one for talk in talks for one in talk.questions], answers, seed)}
    with tempfile.TemporaryDirectory() as folder:
        kb = Collection("conversations", Path(folder) / "conversations", settings)
        for talk in talks:
            made = ways(talk, kb, model.count, windows)
            for number, one in enumerate(talk.questions, 1):
                for name, way in made.items():
                    found = way.find(one.text)
                    scores = {}
                    for k in DEPTHS if one.evidence and way.counted else ():
                        scores[f"recall@{k}"] = recalled(found, one.evidence, None if way.window else k)
                    if id(one) in read and way.read:
                        evidence = found if way.window else found[: settings.passages]
                        scores |= _scores(one, reader.answer(one.text, evidence), settings.abstain_below)
                    for measured, value in scores.items():
                        values.setdefault(name, {}).setdefault(measured, {}).setdefault(one.group, []).append(value)
                print(f"\r{talk.name}: {number} of {len(talk.questions)}", end=" ", file=sys.stderr, flush=True)
            print(file=sys.stderr)
        kb.settle()
    return values


def _scores(question: Question, answer: qa.Answer, threshold: float) -> dict[str, float]:
    said = float(answer.answerable_probability >= threshold)
    if question.answer is None:
        return {"abstained": 1 - said}
    return {"F1": token_f1(answer.answer, question.answer), "answered": said}


# -- report ------------------------------------------------------------------------------------------------------------
def table(values: Values) -> dict[str, dict[str, dict[str, tuple[int, float, float]]]]:
    """Give (number, mean, half of the 95 % interval) by measure, way and group; print them.

    The last columns are ours less the other way, question by question.
    """
    made: dict[str, dict[str, dict[str, tuple[int, float, float]]]] = {}
    for measured in dict.fromkeys(name for way in values.values() for name in way):
        ours = [way for way in (OURS, AROUND) if measured in values[way]]
        groups = sorted(values[ours[0]][measured], key=lambda group: (len(group), group))
        print(f"\n| {measured} | all | {' | '.join([*groups, *(f'{way} - this' for way in ours)])} |")
        print(f"|{'---|' * (len(groups) + len(ours) + 2)}")
        for way in (name for name in values if measured in values[name]):
            by = {group: values[way][measured][group] for group in groups}
            columns = {"all": _joined(by), **by}
            for one in ours:
                ahead = np.subtract(_joined(values[one][measured], groups), columns["all"])
                columns[f"{one} - this"] = list(ahead)
            row = {name: (len(each), float(np.mean(each)), half_width(each)) for name, each in columns.items()}
            made.setdefault(measured, {})[way] = row
            print(f"| {way} |" + "".join(f" {mean:.3f} ±{half:.3f} ({n}) |" for n, mean, half in row.values()))
    return made


def _joined(by: dict[str, list[float]], groups: Iterable[str] = ()) -> list[float]:
    return [value for group in groups or by for value in by[group]]


def plot(values: Values, path: Path) -> None:
    """Draw recall@10 by age."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for way, measures in values.items():
        if way in (AROUND, BESIDE):
            continue
        by = measures["recall@10"]
        ages = sorted(by, key=lambda age: int(age.split("-")[0]))
        means = [float(np.mean(by[age])) for age in ages]
        axes.errorbar(ages, means, [half_width(by[age]) for age in ages], label=way, marker="o", capsize=3)
    axes.set(xlabel="age of what was said", ylabel="recall@10", ylim=(-0.05, 1.05))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["locomo", "memorybank"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds both sets")
    parser.add_argument("--answers", type=int, default=0, help="questions of LoCoMo that are answered; -1 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="picture of recall by age (memorybank)")
    options = parser.parse_args()
    settings = load_settings({"threads": options.threads})[0]
    answers = None if options.answers < 0 else options.answers
    made = {}
    if options.part == "locomo":
        values = measure(list(locomo(options.data)), settings, (2048, 8192), answers, options.seed)
        made["locomo"] = table(values)
    else:
        for name, stitched in (("each user", False), ("all users in a row", True)):
            talks = list(memorybank(options.data, options.seed, stitched=stitched))
            values = measure(talks, settings, (512, 2048), 0, options.seed)
            print(f"\n{name}: {len(talks)} histories, {sum(len(talk.turns) for talk in talks)} messages")
            made[name] = table(values)
        if options.plot:
            plot(values, options.plot)
    if options.json:
        options.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
