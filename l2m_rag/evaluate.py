"""Quality, measured: retrieval, question answering, and the fit of the probability that there is an answer.

Each function takes a collection and questions and gives rows of figures; the command line prints them. A set's
documents are written out as files and ingested as a user's would be, so what is measured is the whole way.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from l2m_rag import answerability
from l2m_rag.collection import Collection, of_document
from l2m_rag.errors import MissingExtraError, UsageError
from l2m_rag.findings import Reader, cut_question, findings, within
from l2m_rag.memory_tiers.records import Passage
from l2m_rag.models import load_language_model
from l2m_rag.overlap import normal, token_f1
from l2m_rag.tasks import Task, TaskSet
from l2m_rag.unanswerable import twisted

if TYPE_CHECKING:
    from l2m_rag.config import Settings
    from l2m_rag.indexers.pipeline import Progress
    from l2m_rag.memory_tiers.long_term import Fusion, Mode

_Item = TypeVar("_Item")
Told = Callable[[int, int], object]
"""Called with (questions done, questions in all)."""

RETRIEVALS: tuple[tuple[str, Mode, Fusion], ...] = (
    ("dense", "dense", "scores"),
    ("text (BM25)", "text", "scores"),
    ("hybrid, reciprocal rank", "hybrid", "rrf"),
    ("hybrid (default)", "hybrid", "scores"),
)
BESIDE: dict[str, dict[str, Any]] = {
    "every passage that fits": {"enough": 1.0},
    "the first passage alone": {"passages": 1},
}
"""What the shipped way is measured beside, over the same search, as settings: with `enough` 1 no passage is skipped."""
_DEPTH = 10
_RESAMPLES = 1000  # of the bootstrap
_TWISTED = 2  # changed questions for each, at most
_LONG = 5000  # characters


@dataclass(frozen=True, slots=True)
class RetrievalRow:
    """How well one way of searching finds the documents that hold the answers.

    Args:
        search: the way.
        questions: number of questions.
        recall_1: share of questions whose document (or a passage with an answer) comes first.
        recall_5: the same among the first five.
        recall_10: the same among the first ten.
        mrr: mean reciprocal rank, 0 beyond the tenth.
        ndcg_10: normalised discounted cumulative gain of the first ten.
        p50_ms: median time of a search, the question's embedding included.
    """

    search: str
    questions: int
    recall_1: float
    recall_5: float
    recall_10: float
    mrr: float
    ndcg_10: float
    p50_ms: float


@dataclass(frozen=True, slots=True)
class QARow:
    """How well questions are answered; shares in [0, 1], each with the half-width of its 95 % interval in `half`.

    Args:
        evidence: "gold document" or "own search", and what else was changed.
        questions: answerable questions.
        em: exact match after SQuAD's normalisation, answering always.
        f1: token F1, answering always.
        answered: share of the answerable questions that get an answer at the threshold.
        f1_answered: token F1 of those.
        auroc: of the probability, answerable against unanswerable questions.
        citation_precision: share of the answers whose first citation lies in a document that holds the answer, in a
            sentence with a gold answer.
        verbatim: share of all quotes that stand at their offsets, character by character.
        first_token_ms: median.
        positions: of evidence that was read, mean over the answerable questions.
        half: half-widths of the intervals, by field.
    """

    evidence: str
    questions: int
    em: float
    f1: float
    answered: float
    f1_answered: float
    auroc: float
    citation_precision: float
    verbatim: float
    first_token_ms: float
    positions: float
    half: dict[str, float] = field(default_factory=dict)


def collection_of(tasks: TaskSet, settings: Settings, progress: Callable[[Progress], None] | None = None) -> Collection:
    """Write the documents of a set to the home, ingest them, and give their collection; a second call is quick."""
    folder = settings.data / "eval" / tasks.name
    documents = folder / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    for name, text in tasks.documents.items():
        path = documents / (name if name.endswith(".txt") else f"{name}.txt")
        if not path.is_file():
            path.write_text(text, encoding="utf-8", newline="")
    collection = Collection(f"eval-{tasks.name}", folder / "collection", settings)
    collection.ingest(documents, progress=progress)
    return collection


def sample(tasks: Sequence[_Item], n: int | None, seed: int = 0) -> list[_Item]:
    """Give n of the tasks (or whatever is given), chosen by chance but the same each time; all when n is None."""
    if n is None or n >= len(tasks):
        return list(tasks)
    chosen = random.Random(seed).sample(range(len(tasks)), n)
    return [tasks[index] for index in sorted(chosen)]


# -- retrieval ---------------------------------------------------------------------------------------------------------
def retrieval(collection: Collection, tasks: Sequence[Task], *, told: Told | None = None) -> list[RetrievalRow]:
    """Measure dense, full-text and hybrid search.

    A question with a `document` is about finding that document (its best passage counts); one without it is about
    passages that hold one of its answers, pooled over all ways of searching.

    Raises:
        UsageError: no question says what is to be found.
        MissingExtraError: pytrec-eval is not installed.
    """
    try:
        import pytrec_eval
    except ImportError as error:
        raise MissingExtraError("pytrec-eval-terrier", "eval") from error
    asked = [task for task in tasks if task.answerable and (task.document or task.answers)]
    if not asked:
        raise UsageError('no question says what is to be found: give "document" or "answers"')
    runs: list[dict[str, dict[str, float]]] = []
    relevant: dict[str, dict[str, int]] = {str(number): {} for number in range(len(asked))}
    times: list[list[float]] = []
    for way, (_, mode, fusion) in enumerate(RETRIEVALS):
        run: dict[str, dict[str, float]] = {}
        spent = []
        for number, task in enumerate(asked):
            began = time.perf_counter()
            # two chunks of one document count once, so a few more are asked for than are looked at
            hits = collection.search(task.question, 3 * _DEPTH, mode=mode, fusion=fusion)
            spent.append((time.perf_counter() - began) * 1000)
            ranked = _ranked(task, hits, relevant[str(number)])
            run[str(number)] = {name: float(-rank) for rank, name in enumerate(ranked)}
            if told:
                told(way * len(asked) + number + 1, len(RETRIEVALS) * len(asked))
        runs.append(run)
        times.append(spent)
    measures = {"success.1,5,10", "recip_rank", "ndcg_cut.10"}
    found = [pytrec_eval.RelevanceEvaluator(relevant, measures).evaluate(run) for run in runs]
    return [_retrieval_row(way[0], result, spent) for way, result, spent in zip(RETRIEVALS, found, times, strict=True)]


def _ranked(task: Task, hits: Sequence[Passage], relevant: dict[str, int]) -> list[str]:
    """Give the ids of what was found in order, and note which of them are right."""
    if task.document:
        relevant[task.document] = 1
        names = [hit.chunk.document for hit in hits]
    else:
        names = [hit.chunk.id for hit in hits]
        wanted = [normal(answer) for answer in task.answers]
        for hit in hits:
            text = normal(hit.chunk.text)
            if any(answer and answer in text for answer in wanted):
                relevant[hit.chunk.id] = 1
    return list(dict.fromkeys(names))[:_DEPTH]


def _retrieval_row(name: str, found: dict[str, dict[str, float]], spent: Sequence[float]) -> RetrievalRow:
    def mean(measure: str) -> float:
        # a question with nothing relevant in the pool is left out by pytrec-eval; it counts as missed
        return round(sum(one.get(measure, 0.0) for one in found.values()) / len(spent), 4)

    return RetrievalRow(
        search=name,
        questions=len(spent),
        recall_1=mean("success_1"),
        recall_5=mean("success_5"),
        recall_10=mean("success_10"),
        mrr=mean("recip_rank"),
        ndcg_10=mean("ndcg_cut_10"),
        p50_ms=round(float(np.median(spent)), 2),
    )


# -- answers -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Outcome:
    em: float
    f1: float
    probability: float
    cited: float
    verbatim: list[bool]
    first_token_ms: float
    positions: int


Outcomes = dict[tuple[Task, str | None], _Outcome]
"""What was asked already, by question and filter of the search."""


def changed(collection: Collection, settings: dict[str, Any]) -> Collection:
    """Give a collection that is asked with other settings."""
    return Collection(collection.name, collection.path, replace(collection.settings, **settings))


def beginnings(tasks: TaskSet, cut: Callable[[str], str]) -> TaskSet:
    """Give a set whose documents are cut to what fits a window, to measure what a search is for."""
    return replace(
        tasks, name=f"{tasks.name}-cut", documents={name: cut(text) for name, text in tasks.documents.items()}
    )


def answers(
    collection: Collection,
    tasks: Sequence[Task],
    *,
    gold: bool,
    way: str = "",
    free: bool = False,
    unanswerable: bool = True,
    known: Outcomes | None = None,
    told: Told | None = None,
) -> QARow:
    """Measure answers, citations and abstention.

    Every question is answered without abstaining, so that one pass gives the scores of reading and, through the
    probability, those at the threshold. To have unanswerable questions, those of the set are taken where it has any;
    otherwise every question is asked again with its own document kept from the search.

    Args:
        collection: holds the tasks' documents.
        tasks: with answers, and a document each where the gold document is to be read.
        gold: read the document that holds the answer, instead of what the search finds.
        way: what is said of the settings in the row.
        free: let the model use its own words.
        unanswerable: ask those too; without them there is no AUROC.
        known: outcomes of another way over the same collection; what is asked in both is asked once. It is added to.
        told: called after each question.
    """
    known = {} if known is None else known
    positive = [task for task in tasks if task.answerable and task.answers]
    negative = [task for task in tasks if unanswerable and not task.answerable]
    if not positive:
        raise UsageError('no question has gold answers: give "answers"')
    if gold and not all(task.document for task in positive):
        raise UsageError('not every question names its document: give "document", or leave out --gold')
    removed = unanswerable and not negative and all(task.document for task in positive)
    jobs = [(task, _only(task) if gold else None) for task in positive + negative]
    jobs += [(task, _without(task)) for task in positive] if removed else []
    outcomes = []
    for number, (task, where) in enumerate(jobs, 1):
        if (task, where) not in known:
            known[task, where] = _outcome(collection, task, where, free)
        outcomes.append(known[task, where])
        if told:
            told(number, len(jobs))
    threshold = collection.settings.abstain_below
    evidence = "gold document" if gold else "own search"
    return _qa_row(f"{evidence}, {way}" if way else evidence, outcomes, len(positive), threshold)


def _only(task: Task) -> str | None:
    return of_document(task.document) if task.document else None


def _without(task: Task) -> str:
    return f"NOT ({of_document(task.document)})"


def _outcome(collection: Collection, task: Task, where: str | None, free: bool) -> _Outcome:
    answer = collection.ask(task.question, free=free, where=where, abstain_below=0.0)
    texts = {name: collection.text(name) for name in {citation.document for citation in answer.citations}}
    cited = 0.0
    if answer.citations:
        first = answer.citations[0]
        held = texts[first.document]
        low, high = _sentence_around(held, first.start, first.end)
        cited = float(
            task.document in ("", first.document)
            and any(normal(gold) in normal(held[low:high]) for gold in task.answers)
        )
    return _Outcome(
        em=max((float(normal(answer.answer) == normal(gold)) for gold in task.answers), default=0.0),
        f1=max((token_f1(answer.answer, gold) for gold in task.answers), default=0.0),
        probability=answer.answerable_probability,
        cited=cited,
        verbatim=[texts[c.document][c.start : c.end] == c.quote for c in answer.citations],
        first_token_ms=answer.timings["first_token_ms"],
        positions=answer.tokens["positions"],
    )


def _sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    low = max((match.end() for match in re.finditer(r"[.!?]\s|\n", text[:start])), default=0)
    stop = re.search(r"[.!?](?:\s|$)|\n", text[end:])
    return low, end + stop.end() if stop else len(text)


def _qa_row(evidence: str, outcomes: Sequence[_Outcome], positive: int, threshold: float) -> QARow:
    right, wrong = outcomes[:positive], outcomes[positive:]
    kept = [one for one in right if one.probability >= threshold]
    quotes = [fits for one in outcomes for fits in one.verbatim]
    columns = {
        "em": [one.em for one in right],
        "f1": [one.f1 for one in right],
        "answered": [float(one.probability >= threshold) for one in right],
        "f1_answered": [one.f1 for one in kept],
        "citation_precision": [one.cited for one in kept],
    }
    labels = [1] * len(right) + [0] * len(wrong)
    probabilities = [one.probability for one in outcomes]
    return QARow(
        evidence=evidence,
        questions=positive,
        auroc=round(auroc(labels, probabilities), 4),
        verbatim=round(sum(quotes) / len(quotes), 4) if quotes else math.nan,
        first_token_ms=round(float(np.median([one.first_token_ms for one in outcomes])), 1),
        positions=round(float(np.mean([one.positions for one in right])), 1),
        half={name: round(half_width(values), 4) for name, values in columns.items()},
        **{name: round(float(np.mean(values)), 4) if values else math.nan for name, values in columns.items()},
    )


# -- the probability that there is an answer ---------------------------------------------------------------------------
def calibrate(sets: Sequence[tuple[Collection, TaskSet]], *, told: Told | None = None) -> dict[str, object]:
    """Fit the weights of the probability that there is an answer: logistic regression over the evidence's features.

    Each question is asked with its document in reach, with it kept from the search, and of the document alone changed
    so that it does not answer it (`l2m_rag.unanswerable`), up to twice; the label is whether a passage that was read
    holds a gold answer and comes from the document. Those of a set that are about their document alone are asked of it,
    answered or not, and not of the others. A question's readings weigh as much together as another's, be they few or
    many. Questions without an answer weigh as much, all together, as those with one, however many were made of each;
    else a probability of one half would say too seldom that there is one.

    Args:
        sets: questions, each with the collection that is asked.
        told: called after each search.

    Returns:
        The weights, and how they were fitted, as `answerability.json` holds them.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtraError("scikit-learn", "eval")
    points: list[dict[str, float]] = []
    labels: list[int] = []
    shares: list[float] = []  # of a reading in the whole
    priors: list[tuple[dict[str, float], int, float]] = []  # the same of passages read by themselves
    jobs: list[tuple[Collection, Reader, Task, str | None]] = []
    for collection, tasks in sets:
        model = load_language_model(collection.settings)
        if not isinstance(model, Reader):
            raise UsageError("the probability is fitted with a model that can quote; leave out --llm-url")
        asked_of = [task for task in tasks.tasks if task.document and task.answers]
        if tasks.alone:
            jobs += [(collection, model, task, _only(task)) for task in tasks.tasks]
        else:
            jobs += [(collection, model, task, where) for task in asked_of for where in (None, _without(task))]
        for task in asked_of:
            passage = collection.text(task.document)
            if len(passage) > _LONG:  # it may answer what was changed, too
                continue
            made = {twisted(task.question, passage, task.answers[0], random.Random(seed)) for seed in range(_TWISTED)}
            for text in sorted(text for text in made if text):
                none = Task(task.id, text, (), task.document, answerable=False)
                jobs.append((collection, model, none, _only(task)))
    answered = sum(_in_reach(task, where) for *_, task, where in jobs)
    for number, (collection, reader, task, where) in enumerate(jobs, 1):
        settings = collection.settings
        read, _ = within(collection.evidence(task.question, settings.passages, where), reader, settings.budget)
        asked = cut_question(task.question, reader, settings.budget)
        sizes = {"budget": settings.budget, "focus": settings.focus}
        share = 1.0 if _in_reach(task, where) else answered / (len(jobs) - answered)
        steps = list(findings(asked, read, reader, **sizes, closeness=collection.closeness, skip=0.0, alone=1.0))
        singly = sum(not found.features.get("together") for found in steps)
        for found in steps:
            points.append(found.features)
            labels.append(int(any(_holds(task, passage) for passage in found.passages)))
            shares.append(share / len(steps))
            if not found.features.get("together"):
                priors.append((found.prior, labels[-1], share / singly))
        if told:
            told(number, len(jobs))
    weights = _fitted(points, labels, shares)
    probabilities = [answerability.probability(weights, point) for point in points]
    return {
        "weights": weights,
        "prior": _fitted(*zip(*priors, strict=True)),
        "fitted": f"{len(points)} readings for {len(jobs)} searches; {sum(labels)} held the answer",
        "auroc": round(auroc(labels, probabilities), 4),
    }


def _fitted(points: Sequence[dict[str, float]], labels: Sequence[int], shares: Sequence[float]) -> dict[str, float]:
    """Fit logistic regression, each point weighed by its share.

    Raises:
        UsageError: all labels are the same.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(labels)) < 2:
        raise UsageError(
            f"{sum(labels)} of {len(labels)} readings held the answer; to fit the probability, take questions of "
            "which some are found and some are not"
        )
    names = list(points[0])
    matrix = np.array([[point[name] for name in names] for point in points])
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(matrix, labels, sample_weight=shares)
    weights = {"bias": float(fitted.intercept_[0]), **dict(zip(names, map(float, fitted.coef_[0]), strict=True))}
    return {name: round(weight, 4) for name, weight in weights.items()}


def _in_reach(task: Task, where: str | None) -> bool:
    """Say whether a search that is so filtered may find what answers a question."""
    return bool(task.answers) and where != _without(task)


def _holds(task: Task, passage: Passage) -> bool:
    text = passage.chunk.text
    return passage.chunk.document == task.document and any(answer in text for answer in task.answers)


# -- measures ----------------------------------------------------------------------------------------------------------
def auroc(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Give the area under the ROC curve: how often a positive scores above a negative, ties counting half."""
    high = np.array([score for score, label in zip(scores, labels, strict=True) if label])
    low = np.array([score for score, label in zip(scores, labels, strict=True) if not label])
    if not len(high) or not len(low):
        return math.nan
    above = (high[:, None] > low[None]).mean() + (high[:, None] == low[None]).mean() / 2
    return float(above)


def half_width(values: Sequence[float], seed: int = 0) -> float:
    """Give half the width of the 95 % bootstrap interval of a mean."""
    if not values:
        return math.nan
    array = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(array), (_RESAMPLES, len(array)))
    low, high = np.percentile(array[rows].mean(axis=1), [2.5, 97.5])
    return float(high - low) / 2
