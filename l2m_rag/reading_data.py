"""What the reader learns from: passages with questions whose answers stand in them, and near ones where they do not.

`gather` reads the question sets that may be trained on, leaves out whatever an evaluation set also holds, makes cloze
questions, and lets the embedder say which passages are near each other and which questions a passage only seems to
answer. `rows_of` then lays one epoch out: a row is a few near passages with all the questions that are asked of them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from l2m_rag.bridges import Bridge, bridges, hotpot, titled
from l2m_rag.clozes import Triple, lists, texts_of, untitled
from l2m_rag.clozes import clozes as make_clozes
from l2m_rag.contracts import contracts
from l2m_rag.errors import CorruptError, UsageError
from l2m_rag.indexers.chunking import Tokenizer, split
from l2m_rag.memory_tiers.records import Parsed
from l2m_rag.notices import notices
from l2m_rag.tasks import WIKI, part_of, rows

EVALUATION = (
    "squad_subset/xquad_en", "squad_subset/squad2_small", "nq_oracle/dev", "clapnq/dev", "policyqa/dev",
    "hotpotqa/distractor_500", "fairytaleqa/dev", "tweetqa/dev", "ropes/dev", "lambada/test_openai",
)  # fmt: skip
"""Files of the data folder that nothing may be learnt from."""

KEPT_OUT = ("timeqa/docs", "cuad/contracts")
"""Files of documents of which one part may not be learnt from, either."""

SOURCES = (
    "squad", "qed", "qamr", "tweetqa", "fairytaleqa", "ropes", "narrativeqa", "timeqa", "covidqa", "cloze", "lists",
    "books", "meetings", "papers", "stories", "dialogue", "bridges", "told", "yes-no", "notices",
    "contracts",
)  # fmt: skip
_FILES = {
    "squad": "squad/squad11_train_subset",
    "qed": "qed/dev",
    "qamr": "qamr/dev",
    "tweetqa": "tweetqa/train",
    "fairytaleqa": "fairytaleqa/train",
    "ropes": "ropes/train",
    "narrativeqa": "narrativeqa_sub/summaries_subset",
}
_FREE = {
    "told": ("fairytaleqa/train", "onestopqa/all", "conditionalqa/gold_evidence"),
    "yes-no": ("boolq/dev", "conditionalqa/gold_evidence"),
}
"""Sources whose answers do not stand in the passage; they are asked for in the reader's own words."""
_YES_NO = ("yes", "no")
_DOCUMENTS = {"timeqa": ("timeqa/docs", "timeqa/qa_train"), "covidqa": ("covidqa/docs", "covidqa/qa")}
_ALIKE = ("notices", "contracts")
"""Sources whose passages are so alike that what is asked of one is answered, otherwise, by another."""
ASKED = "asked"
"""The source of questions that were written by a model (`l2m_rag.asking`)."""
_CLOZES = {"cloze": "wiki", "books": "books", "meetings": "meetings", "papers": "papers"}
_GRAM = 13  # words that two texts must share to count as the same, the usual measure of contamination
_LONGEST_ANSWER = 100  # characters
_NEAR = 8


class Encoder(Protocol):
    """What an embedder is needed for."""

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Give a unit vector of each text."""
        ...


class Question(NamedTuple):
    """A question and its answer.

    Args:
        passage: number of the passage that the answer stands in, as it is written.
        text: of the question.
        answer: "" where the passage holds none.
        beside: number of the passage that has to be read too; -1 when this one is enough.
        free: whether the answer is in the reader's own words.
    """

    passage: int
    text: str
    answer: str
    beside: int = -1
    free: bool = False


@dataclass(frozen=True, slots=True)
class Material:
    """Everything the rows of an epoch are made of.

    Args:
        passages: texts.
        sources: of each passage, one of `SOURCES`.
        questions: all of them.
        near: for each passage others that the embedder finds most like it, nearest first.
        lures: for each passage, numbers of questions of other passages that it is near to.
    """

    passages: list[str]
    sources: list[str]
    questions: list[Question]
    near: list[list[int]]
    lures: list[list[int]]
    asked: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        asked: list[list[int]] = [[] for _ in self.passages]
        for number, question in enumerate(self.questions):
            asked[question.passage].append(number)
        object.__setattr__(self, "asked", asked)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        told = {name: value for name, value in asdict(self).items() if name != "asked"}
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(told), encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Material:
        """Read what `save` wrote.

        Raises:
            CorruptError: it cannot be read.
        """
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            questions = [Question(*one) for one in told.pop("questions")]
            return cls(questions=questions, **told)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CorruptError(f"{path} cannot be read ({error}); remove it, and it is made again") from error


class Row(NamedTuple):
    """Passages in the order in which they are read, and (question, whether it has an answer here) for each question."""

    passages: list[int]
    questions: list[tuple[int, bool]]


# -- what may be learnt from -------------------------------------------------------------------------------------------
class Seen:
    """Texts that stand in evaluation sets.

    Args:
        texts: passages; a text that shares `_GRAM` words in a row with one of them is held.
        questions: a question that reads the same is held.
    """

    def __init__(self, texts: Iterable[str], questions: Iterable[str]) -> None:
        self._grams = {gram for text in texts for gram in _grams(text)}
        self._questions = {bare(question) for question in questions}

    def holds(self, text: str, question: str = "") -> bool:
        """Say whether a passage or a question is one of them."""
        return (bool(question) and bare(question) in self._questions) or any(
            gram in self._grams for gram in _grams(text)
        )

    @classmethod
    def of(cls, data: Path) -> Seen:
        """Read the evaluation sets of a data folder; those that are not there hold nothing."""
        texts: dict[str, None] = {}
        questions: dict[str, None] = {}
        for name in EVALUATION:
            path = data / f"{name}.jsonl.zst"
            for row in rows(path) if path.exists() else ():
                texts |= dict.fromkeys(_texts(row))
                if isinstance(row.get("question"), str):
                    questions[row["question"]] = None
        for path in (data / f"{name}.jsonl.zst" for name in KEPT_OUT):
            for row in rows(path) if path.exists() else ():
                if part_of(str(row["doc_id"])) == "evaluation":
                    texts |= dict.fromkeys(_texts(row))
        return cls(texts, questions)


def _texts(row: dict[str, Any]) -> list[str]:
    found = [row[name] for name in ("context", "text") if isinstance(row.get(name), str)]
    many = row.get("contexts", row.get("context"))
    if isinstance(many, list):
        for one in many:
            found += [" ".join(map(str, part)) if isinstance(part, list) else str(part) for part in _parts(one)]
    return found


def _parts(one: Any) -> list[Any]:
    if isinstance(one, dict):
        return [one.get("text") or one.get("sentences") or ""]
    return [part for part in one if not isinstance(part, str) or len(part) > 80] if isinstance(one, list) else [one]


def bare(text: str) -> str:
    """Give the words of a text in small letters, and nothing between them."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _grams(text: str) -> Iterator[int]:
    words = bare(text).split()
    for at in range(max(1, len(words) - _GRAM + 1)) if len(words) >= _GRAM // 2 else ():
        yield hash(tuple(words[at : at + _GRAM]))


# -- reading the sets --------------------------------------------------------------------------------------------------
def gather(
    data: Path,
    sources: Sequence[str],
    embedder: Encoder,
    tokenizer: Tokenizer,
    *,
    clozes: int = 3000,
    seed: int = 0,
    asked: Iterable[Triple] = (),
    told: Callable[[str], object] = lambda text: None,
) -> Material:
    """Read question sets and make cloze questions; see the module.

    Args:
        data: folder of the data sets.
        sources: which of `SOURCES`.
        embedder: says what is near.
        tokenizer: long documents are cut into chunks by.
        clozes: passages of each kind that cloze questions are made of; stories, conversations and notices.
        seed: of what is drawn.
        asked: more questions, of the source "asked".
        told: called with what is being done.

    Raises:
        UsageError: a source is not known, or nothing of it was found.
    """
    unknown = sorted(set(sources) - set(SOURCES))
    if unknown:
        raise UsageError(f"no training source named {', '.join(unknown)}; known: {', '.join(SOURCES)}")
    told("reading the evaluation sets, to leave them out")
    seen = Seen.of(data)
    passages: dict[str, int] = {}
    found: list[str] = []
    questions: list[Question] = []
    more = list(asked)
    for source in [*sources, *([ASKED] if more else [])]:
        told(f"reading {source}")
        before = len(questions)
        triples = more if source == ASKED else _triples(source, data, tokenizer, clozes, seed)
        clean: dict[str, bool] = {}
        for passage, question, answer, *beside in triples:
            needed = [passage, *beside]
            for text in needed:
                if text not in clean:
                    clean[text] = not seen.holds(text)
            if all(clean[text] for text in needed) and not seen.holds("", question):
                for text in needed:
                    if text not in passages:
                        passages[text] = len(found)
                        found.append(source)
                with_it = passages[beside[0]] if beside else -1
                questions.append(Question(passages[passage], question, answer, with_it, source in _FREE))
        if len(questions) == before:
            raise UsageError(f"nothing of {source} was found in {data}")
    texts = list(passages)
    told(f"comparing {len(texts)} passages and {len(questions)} questions")
    near, lures = _near(texts, questions, embedder)
    for at, source in enumerate(found):
        if source in _ALIKE:
            near[at] = [other for other in near[at] if found[other] not in _ALIKE]
            lures[at] = [one for one in lures[at] if found[questions[one].passage] not in _ALIKE]
    return Material(texts, found, questions, near, lures)


def _triples(source: str, data: Path, tokenizer: Tokenizer, most: int, seed: int) -> Iterator[Triple | Bridge]:
    """Read or make the questions of a source."""
    if source in _FILES:
        return _plain(data / f"{_FILES[source]}.jsonl.zst")
    if source in _FREE:
        return _free(source, data)
    if source in _DOCUMENTS:
        return _chunked(source, data, tokenizer)
    if source == "notices":
        return notices(random.Random(seed), most)
    if source == "contracts":
        learnt = [row for row in rows(data / "cuad/qa.jsonl.zst") if part_of(row["doc_id"]) == "train"]
        return contracts(rows(data / "cuad/contracts.jsonl.zst"), learnt, tokenizer)
    if source == "stories":
        return _stories(_drawn(data / "babi/train.jsonl.zst", most, seed))
    if source == "dialogue":
        return _dialogues(_drawn(data / "sgd/train.jsonl.zst", most, seed))
    draw = random.Random(seed)
    if source == "bridges":
        wiki = titled(row for name in WIKI for row in rows(data / name))
        return chain(bridges(wiki, draw), hotpot(data / "hotpotqa_100/train_sample.jsonl.zst"))
    texts = texts_of(_CLOZES.get(source, "wiki"), data, draw, most)
    return lists(texts, draw) if source == "lists" else make_clozes(texts, draw)


def _plain(path: Path) -> Iterator[Triple]:
    """Give (passage, question, answer) of the answers that stand in their passage."""
    for row in rows(path):
        answers = [answer for answer in row["answers"] if answer in row["context"] and len(answer) <= _LONGEST_ANSWER]
        if row.get("answer_start") is not None and answers:
            yield row["context"], row["question"].strip(), min(answers, key=len) if "n_answers" in row else answers[0]


def _free(source: str, data: Path) -> Iterator[Triple]:
    """Give (passage, question, answer) of short answers that do not stand in their passage; "Yes" and "No" apart."""
    for name in _FREE[source]:
        for row in rows(data / f"{name}.jsonl.zst"):
            answer = str(row["answers"][0]) if row["answers"] else ""
            passage = untitled(row["context"]) if name == "boolq/dev" else row["context"]
            if name == "boolq/dev" and part_of(row["context"]) != "train":
                continue
            if (answer in _YES_NO) != (source == "yes-no") or not answer or len(answer) > _LONGEST_ANSWER:
                continue
            if source == "yes-no" or answer not in passage:
                yield passage, row["question"].strip(), answer.capitalize() if source == "yes-no" else answer


def _chunked(source: str, data: Path, tokenizer: Tokenizer) -> Iterator[Triple]:
    """Give the chunk of a long document that holds an answer."""
    documents, asked = _DOCUMENTS[source]
    texts = {
        str(row["doc_id"]): str(row.get("text") or row["context"]) for row in rows(data / f"{documents}.jsonl.zst")
    }
    chunks: dict[str, list[tuple[int, str]]] = {}
    for row in rows(data / f"{asked}.jsonl.zst"):
        document = str(row["doc_id"])
        if source == "timeqa" and part_of(document) != "train":
            continue
        for answer in row["answers"][:1]:
            text, start = (
                (answer["text"], answer["start"]) if isinstance(answer, dict) else (answer, row["answer_start"])
            )
            if start is None or len(text) > _LONGEST_ANSWER:
                continue
            if document not in chunks:
                whole = Parsed(texts[document], "text/plain")
                chunks[document] = [(chunk.start, chunk.text) for chunk in split(whole, document, tokenizer, overlap=0)]
            for first, chunk in chunks[document]:
                if first <= start and start + len(text.strip()) <= first + len(chunk) and text.strip() in chunk:
                    yield chunk, row["question"].strip(), text.strip()
                    break


def _drawn(path: Path, most: int, seed: int) -> list[dict[str, Any]]:
    found = list(rows(path))
    return random.Random(seed).sample(found, min(most, len(found)))


def _stories(told: Iterable[dict[str, Any]]) -> Iterator[Triple]:
    """Give stories of bAbI whose answer is one of their words: who, what or where, after all that has happened."""
    for row in told:
        story = " ".join(row["story"])
        if re.search(rf"\b{re.escape(row['answer'])}\b", story):
            yield story, row["question"], row["answer"]


def _dialogues(held: Iterable[dict[str, Any]]) -> Iterator[Triple]:
    """Give conversations, and what was settled in them in the end."""
    for row in held:
        told = "\n".join(f"{speaker.capitalize()}: {text}" for speaker, text in row["turns"])
        for slots in row["final_slots"].values():
            for name, value in slots.items():
                if value not in ("True", "False", "dontcare") and re.search(rf"\b{re.escape(value)}\b", told):
                    yield told, f"What {name.replace('_', ' ')} was settled on?", value


def _near(texts: list[str], questions: list[Question], embedder: Encoder) -> tuple[list[list[int]], list[list[int]]]:
    vectors = np.asarray(embedder.encode(texts), np.float32)
    asked = np.asarray(embedder.encode([question.text for question in questions]), np.float32)
    near: list[list[int]] = []
    lures: list[list[int]] = []
    owner = np.array([question.passage for question in questions])
    for first in range(0, len(texts), 512):
        block = vectors[first : first + 512]
        alike = block @ vectors.T
        alike[np.arange(len(block)), np.arange(first, first + len(block))] = -1
        near += _best(alike, _NEAR)
        meant = block @ asked.T
        for at, candidates in enumerate(_best(meant, 4 * _NEAR)):
            own = [number for number in candidates if owner[number] != first + at]
            lures.append([number for number in own if bare(questions[number].answer) not in bare(texts[first + at])])
    return near, lures


def _best(scores: npt.NDArray[np.float32], count: int) -> list[list[int]]:
    count = min(count, scores.shape[1])
    places = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(scores, places, 1), axis=1)
    found: list[list[int]] = np.take_along_axis(places, order, 1).tolist()
    return found


# -- one epoch ---------------------------------------------------------------------------------------------------------
def rows_of(
    material: Material,
    draw: random.Random,
    *,
    sizes: Sequence[int],
    costs: Sequence[int],
    longest: int,
    shares: dict[str, float] | None = None,
    per_passage: int = 6,
    unanswerable: float = 0.25,
    most_passages: int = 4,
) -> list[Row]:
    """Lay out an epoch: every passage once (or a share of each source), alone or among near ones, with its questions.

    Args:
        material: of all rows.
        draw: chance.
        sizes: tokens of each passage.
        costs: tokens of each question with its answer.
        longest: most tokens of a row.
        shares: share of the passages of each source that are taken; all of a source that is not named.
        per_passage: most questions of a passage.
        unanswerable: about how many questions for each that has an answer are asked of passages that hold none.
        most_passages: of a row.
    """
    order = list(range(len(material.passages)))
    draw.shuffle(order)
    part = shares or {}
    used = {passage for passage in order if draw.random() >= part.get(material.sources[passage], 1.0)}
    made: list[Row] = []
    for first in order:
        if first in used or sizes[first] > longest // 2:
            continue
        wanted = draw.choices(range(1, most_passages + 1), [2.0**-at for at in range(most_passages)])[0]
        taken, size = [first], sizes[first]
        needed = [material.questions[number].beside for number in material.asked[first]]
        needed = [other for other in needed if other >= 0 and size + sizes[other] <= longest * 3 // 4]
        if needed and most_passages > 1:
            taken.append(draw.choice(needed))
            size += sizes[taken[1]]
        fresh = [other for other in material.near[first] if other not in used]
        for other in fresh + [other for other in material.near[first] if other in used]:
            if len(taken) < wanted and other not in taken and size + sizes[other] <= longest // 2 + sizes[first] // 2:
                taken.append(other)
                size += sizes[other]
        asked: list[tuple[int, bool]] = []
        for passage in taken:
            if passage not in used:
                own = [number for number in material.asked[passage] if _answered(material.questions[number], taken)]
                asked += [(number, True) for number in draw.sample(own, min(per_passage, len(own)))]
        wrong = unanswerable * len(asked)
        count = int(wrong) + (draw.random() < wrong % 1)
        asked += [(number, False) for number in _wrong(material, taken, used, count, draw)]
        used.update(taken)
        draw.shuffle(asked)
        kept = []
        for number, right in asked:
            if size + costs[number] <= longest:
                kept.append((number, right))
                size += costs[number]
        draw.shuffle(taken)
        if kept:
            made.append(Row(taken, kept))
    return made


def _answered(question: Question, taken: Sequence[int]) -> bool:
    """Say whether a question that is asked of one of some passages has its answer in them."""
    return bool(question.answer) and (question.beside < 0 or question.beside in taken)


def _wrong(material: Material, taken: Sequence[int], used: set[int], count: int, draw: random.Random) -> list[int]:
    """Give so many questions without an answer: half of the passages' own, where there are as many, and lures."""
    own = [
        number
        for passage in taken
        if passage not in used
        for number in material.asked[passage]
        if not _answered(material.questions[number], taken)
    ]
    lures = _lures(material, taken)
    draw.shuffle(own)
    draw.shuffle(lures)
    first = -(-count // 2)
    return (own[:first] + lures + own[first:])[:count]


def _lures(material: Material, taken: Sequence[int]) -> list[int]:
    """Give questions that the passages seem to answer, but whose answer stands in none of them."""
    texts = [bare(material.passages[passage]) for passage in taken]
    found: dict[int, None] = {}
    for passage in taken:
        for number in material.lures[passage][: 2 * _NEAR]:
            question = material.questions[number]
            elsewhere = question.answer and question.passage not in taken
            if elsewhere and not any(bare(question.answer) in text for text in texts):
                found[number] = None
    return list(found)


def batches_of(
    made: Sequence[Row], lengths: Callable[[Row], tuple[int, int]], batch: int, longest: int, draw: random.Random
) -> list[list[Row]]:
    """Give batches of rows of about the same lengths, in any order.

    Args:
        made: rows.
        lengths: tokens of a row's passages, and of its questions.
        batch: rows of full length in a batch; of shorter ones there are more, a multiple of it.
        longest: full length.
        draw: chance.
    """
    found: list[list[Row]] = []
    ordered = sorted(made, key=lambda row: (lengths(row)[0] // 48, lengths(row)[1]), reverse=True)
    at = 0
    while at + batch <= len(ordered):
        many = batch * max(1, longest // max(1, sum(lengths(ordered[at]))))
        while at + many > len(ordered):
            many -= batch
        found.append(ordered[at : at + many])
        at += many
    draw.shuffle(found)
    return found
