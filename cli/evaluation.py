"""`l2m eval` and `l2m bench`: quality and speed, measured on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import (
    Command,
    InCollection,
    Json,
    ModelOption,
    UrlOption,
    existing,
    fetch,
    opened,
    settings_of,
    shows_progress,
)
from l2m_rag.errors import CollectionNotFound, UsageError

if TYPE_CHECKING:
    from l2m_rag.collection import Collection
    from l2m_rag.config import Settings
    from l2m_rag.tasks import TaskSet

eval_app = typer.Typer(
    rich_markup_mode=None,
    help="Measure retrieval and answers, on question sets or on your own questions.\n\n"
    "Example: l2m eval qa --questions my-questions.jsonl -c contracts",
)
bench_app = typer.Typer(
    rich_markup_mode=None,
    help="Measure speed, beside its limit in the same run.\n\nExample: l2m bench ingest --folder contracts/",
)

_SUITE = 500  # questions of a set in a suite

SetOption = Annotated[
    str, typer.Option("--set", metavar="NAME", help="Question set: xquad, squad2, squad-train, nq, clapnq, ...")
]
QuestionsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE.jsonl", help='Your own: lines of {"question", "answers", "document" or "context"}.'),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder of the question sets [env: L2M_DATA].")
]
Number = Annotated[int | None, typer.Option("-n", min=1, metavar="N", help="Take N questions by chance; default all.")]


@eval_app.command(cls=Command)
def retrieval(
    ctx: typer.Context,
    name: SetOption = "xquad",
    questions: QuestionsOption = None,
    collection: InCollection = None,
    data: DataOption = None,
    n: Number = None,
    as_json: Json = False,
) -> None:
    """Measure how often search finds the document that holds the answer.

    Examples:
      l2m eval retrieval --set xquad
      l2m eval retrieval --questions my-questions.jsonl -c contracts

    Recall, mean reciprocal rank and nDCG of dense, full-text and hybrid search, by document where a question
    names one, else by passages that hold an answer.
    """
    from l2m_rag import evaluate

    settings = settings_of(ctx, collection=collection)
    fetch(ctx, settings, as_json=as_json, decoder=False)
    with _told(shows_progress(ctx, as_json)) as told:
        searched, tasks = _asked(settings, name, questions, collection, data)
        rows = evaluate.retrieval(searched, evaluate.sample(tasks.tasks, n), told=told)
    _say_rows([asdict(row) for row in rows], tasks.name, as_json)


@eval_app.command(cls=Command)
def qa(
    ctx: typer.Context,
    name: SetOption = "xquad",
    suite: Annotated[
        str | None, typer.Option("--suite", metavar="NAME", help="Several sets: default, or long (long documents).")
    ] = None,
    questions: QuestionsOption = None,
    collection: InCollection = None,
    data: DataOption = None,
    n: Number = None,
    gold: Annotated[bool, typer.Option("--gold", help="Also measure reading of the document with the answer.")] = False,
    gold_only: Annotated[bool, typer.Option("--gold-only", help="Measure that alone, without own search.")] = False,
    answerable: Annotated[bool, typer.Option("--answerable", help="Ask only what has an answer; no AUROC.")] = False,
    beside: Annotated[
        bool, typer.Option("--beside", help="Also measure every passage, the first alone, a beginning.")
    ] = False,
    free: Annotated[bool, typer.Option("--free", help="Let the model use its own words.")] = False,
    model: ModelOption = None,
    llm_url: UrlOption = None,
    as_json: Json = False,
) -> None:
    """Measure answers: exact match, F1, abstention, citations, time to the first token.

    Examples:
      l2m eval qa --set xquad -n 200 --gold
      l2m eval qa --suite default
      l2m eval qa --suite long -n 100
      l2m eval qa --questions my-questions.jsonl -c contracts

    A suite takes 500 questions of each set unless -n says otherwise; in the long one each document is searched by
    itself. Shares carry the half-width of their 95 % interval (`half`). Unanswerable questions are those of the set, or
    each question again with its document kept from the search.
    """
    from l2m_rag import evaluate
    from l2m_rag.models import load_language_model

    settings = settings_of(ctx, collection=collection, model=model, llm_url=llm_url)
    fetch(ctx, settings, as_json=as_json, decoder=True)
    if suite is not None:
        from l2m_rag.tasks import SUITES

        if suite not in SUITES:
            raise UsageError(f"no suite named {suite!r}; known: {', '.join(SUITES)}")
        if questions is not None or collection is not None:
            raise UsageError("--suite brings its own questions; leave out --questions and --collection")
    names = SUITES[suite] if suite is not None else (name,)
    ways = (True,) if gold_only or suite == "long" else (True, False) if gold or suite else (False,)
    for one in names:
        with _told(shows_progress(ctx, as_json)) as told:
            asked, tasks = _asked(settings, one, questions, collection, data)
            chosen = evaluate.sample(tasks.tasks, _SUITE if suite is not None and n is None else n)
            known: evaluate.Outcomes = {}
            over = (True,) if tasks.alone else ways
            rows = [
                evaluate.answers(
                    asked, chosen, gold=way, free=free, unanswerable=not answerable, known=known, told=told
                )
                for way in over
            ]
            if beside:
                asking: dict[str, Any] = {"unanswerable": not answerable, "free": free, "told": told}
                for way, changes in evaluate.BESIDE.items():
                    other = evaluate.changed(asked, changes)
                    rows.append(evaluate.answers(other, chosen, gold=over[-1], way=way, **asking))
                if suite == "long":
                    cut = partial(load_language_model(settings).cut, tokens=settings.budget)
                    short = evaluate.beginnings(tasks, cut)
                    other = evaluate.collection_of(short, settings)
                    rows.append(evaluate.answers(other, chosen, gold=True, way="cut to the window", **asking))
        if suite is not None and not as_json:
            output.say(one)
        _say_rows([asdict(row) for row in rows], tasks.name, as_json)


@eval_app.command(cls=Command)
def language(
    ctx: typer.Context,
    data: DataOption = None,
    n: Number = None,
    books: Annotated[int, typer.Option(min=1, metavar="N", help="Texts of books, 512 tokens each.")] = 64,
    model: ModelOption = None,
    as_json: Json = False,
) -> None:
    """Measure what a trained reader's weights still know of language, beside its backbone.

    Example:
      l2m eval language -n 500

    LAMBADA (last words), PIQA (which of two ways works), and the perplexity of books.
    """
    from transformers import AutoTokenizer

    from l2m_rag import checkpoint, language_eval, tasks
    from l2m_rag.backbone import load_backbone
    from l2m_rag.models import backbone_of, reader_folder
    from l2m_rag.reading import paragraphs

    settings = settings_of(ctx, model=model)
    fetch(ctx, settings, as_json=as_json, embedder=False, decoder=True)
    folder = reader_folder(settings.model)
    if folder is None:
        raise UsageError(f"{settings.model!r} is no trained reader; name the folder of a checkpoint with --model")
    source, place = backbone_of(folder, settings), tasks.data_folder(data)
    reader = checkpoint.load_model(folder, merged=True, source=source)
    models = {"backbone": load_backbone(source, reader.config.depth), "reader": reader.backbone}
    with _told(shows_progress(ctx, as_json)) as told:
        found = language_eval.language(
            {name: one.float() for name, one in models.items()},
            AutoTokenizer.from_pretrained(source),
            place,
            paragraphs(place / "books", 0, words=450, most=books),
            n=n,
            told=told,
        )
    rows = [asdict(row) for row in found]
    output.say_json({"rows": rows}) if as_json else output.say_table(
        [key.upper() for key in rows[0]], [list(row.values()) for row in rows]
    )


@eval_app.command(cls=Command)
def calibrate(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the weights (JSON).")],
    names: Annotated[
        str, typer.Option("--set", metavar="NAME,...", help="Question sets, of those that may be trained on.")
    ] = "multispanqa,timeqa-valid,selqa,notices-valid",
    data: DataOption = None,
    n: Annotated[
        int,
        typer.Option(
            "-n", min=1, metavar="N", help="Take N questions of each, by chance; of notices and contracts 3 N."
        ),
    ] = 60,
    model: ModelOption = None,
    as_json: Json = False,
) -> None:
    """Fit the probability that there is an answer, on sets that may be trained on but were not.

    Example:
      l2m eval calibrate l2m_rag/data/reader/answerability.json
    """
    from l2m_rag import evaluate
    from l2m_rag.tasks import SETS

    chosen = names.split(",")
    for name in chosen:
        if name in SETS and not SETS[name].train:
            raise UsageError(f"{name} is for measuring; fit on one of: {', '.join(s for s in SETS if SETS[s].train)}")
    settings = settings_of(ctx, model=model)
    fetch(ctx, settings, as_json=as_json, decoder=True)
    with _told(shows_progress(ctx, as_json)) as told:
        sets = []
        for name in chosen:
            asked, tasks = _asked(settings, name, None, None, data)
            usable = [task for task in tasks.tasks if tasks.alone or (task.answerable and task.answers)]
            # a question is searched for three times or so, one of a document alone once
            sets.append((asked, replace(tasks, tasks=evaluate.sample(usable, 3 * n if tasks.alone else n))))
        found = evaluate.calibrate(sets, told=told)
    file.write_text(json.dumps(found, indent=1) + "\n")
    output.say_json(found) if as_json else output.say(f"{file}: {found['fitted']}; AUROC {found['auroc']}")


@bench_app.command(cls=Command)
def ingest(
    ctx: typer.Context,
    folder: Annotated[
        str | None, typer.Option("--folder", metavar="DIR", help="Documents to ingest; default made-up texts.")
    ] = None,
    documents: Annotated[int, typer.Option(min=10, metavar="N", help="Number of made-up texts.")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds; the median is given.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure ingest beside the embedder's own fp32 `encode` of the same chunks, and a second ingest.

    Examples:
      l2m bench ingest
      l2m bench ingest --folder contracts/ --rounds 5 --json
    """
    import tempfile

    from l2m_rag import bench

    settings = settings_of(ctx)
    fetch(ctx, settings, as_json=as_json, decoder=False)
    with tempfile.TemporaryDirectory(prefix="l2m-bench-") as scratch:
        if folder is None:
            bench.write_corpus(Path(scratch), bench.made_texts(documents))
        place = Path(existing(folder)) if folder is not None else Path(scratch)
        found = bench.ingest(place, settings, rounds=rounds, told=remarks(ctx))
    _say_figures(found, as_json)


@bench_app.command(cls=Command)
def search(
    ctx: typer.Context,
    rows: Annotated[int, typer.Option(min=1000, metavar="N", help="Chunks in the store.")] = 100_000,
    as_json: Json = False,
) -> None:
    """Measure searches over a store of made-up chunks, by meaning and by words.

    Examples:
      l2m bench search
      l2m bench search --rows 10000 --json
    """
    from l2m_rag import bench

    settings = settings_of(ctx)
    fetch(ctx, settings, as_json=as_json, decoder=False)
    _say_figures(bench.search(rows, settings, told=remarks(ctx)), as_json)


@bench_app.command(cls=Command)
def tier(
    ctx: typer.Context,
    rows: Annotated[
        list[int] | None, typer.Option(min=1000, metavar="N", help="Rows to search; can be given more than once.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, metavar="N", help="Questions to each.")] = 400,
    commits: Annotated[int, typer.Option(min=1, metavar="N", help="Commits of 1,000 rows.")] = 20,
    as_json: Json = False,
) -> None:
    """Measure the long-term tier beside raw FAISS and LanceDB on the same vectors.

    Searches are over 10,000, 50,000 and 500,000 rows by default, which takes some minutes and 4 GB of memory.

    Examples:
      l2m bench tier --json
      l2m bench tier --rows 1000000
    """
    from l2m_rag import bench_tier

    measured = bench_tier.tier(rows or bench_tier.ROWS, questions=questions, commits=commits, told=remarks(ctx))
    if as_json:
        output.say_json(measured)
        return
    for name, figures in measured.items():
        if isinstance(figures, dict):
            output.say(f"{name}: {', '.join(f'{key} {value}' for key, value in figures.items() if value is not None)}")
        else:
            output.say(f"{name}: {figures}")


@bench_app.command(cls=Command)
def faults(
    ctx: typer.Context,
    points: Annotated[int, typer.Option(min=1, metavar="N", help="Times that the process is killed.")] = 200,
    failures: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Writes that fail, each in two ways; default every one.")
    ] = None,
    flips: Annotated[int, typer.Option(min=1, metavar="N", help="Bits flipped, and as many files cut short.")] = 500,
    races: Annotated[int, typer.Option(min=1, metavar="N", help="Races of two writers.")] = 200,
    as_json: Json = False,
) -> None:
    """Count what the long-term tier loses when it is killed, the disk fails, bits flip or two write at once.

    Needs Linux and a C compiler; takes about half an hour.

    Examples:
      l2m bench faults
      l2m bench faults --points 20 --failures 20 --flips 50 --races 10 --json
    """
    from l2m_rag import bench_faults

    told = remarks(ctx)
    _say_figures(bench_faults.faults(points=points, failures=failures, flips=flips, races=races, told=told), as_json)


@bench_app.command(cls=Command)
def ask(
    ctx: typer.Context,
    collection: InCollection = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help="Questions to ask; default those of `l2m demo`.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1000, metavar="N", help="Ask the demo's documents among N made-up chunks.")
    ] = None,
    model: ModelOption = None,
    llm_url: UrlOption = None,
    as_json: Json = False,
) -> None:
    """Measure the time to the first token of answers, models loaded.

    Examples:
      l2m bench ask -c demo
      l2m bench ask --rows 100000
    """
    import tempfile
    from importlib import resources

    from l2m_rag import bench
    from l2m_rag.cli.demo import COLLECTION, QUESTIONS
    from l2m_rag.cli.options import read_questions
    from l2m_rag.collection import Collection

    settings = settings_of(ctx, collection=collection or COLLECTION, model=model, llm_url=llm_url)
    asked = [one.text for one in read_questions(questions)] if questions else [*QUESTIONS] * 5
    fetch(ctx, settings, as_json=as_json, decoder=True)
    if rows is None:
        _say_figures(bench.ask(opened(settings), asked, told=remarks(ctx)), as_json)
        return
    if collection is not None:
        raise UsageError("--rows makes a collection of its own; leave out --collection")
    with (
        tempfile.TemporaryDirectory(prefix="l2m-bench-") as scratch,
        resources.as_file(resources.files("l2m_rag") / "data" / "demo") as folder,
    ):
        made = Collection("bench", Path(scratch) / "bench", settings)
        bench.filled(made, folder, rows, told=remarks(ctx))
        _say_figures(bench.ask(made, asked, told=remarks(ctx)), as_json)


@bench_app.command("first-token", cls=Command)
def first_token(
    ctx: typer.Context,
    tokens: Annotated[int, typer.Option(min=100, max=6000, metavar="N", help="Tokens of evidence.")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds; medians are given.")] = 5,
    model: ModelOption = None,
    as_json: Json = False,
) -> None:
    """Measure how soon an answer begins when its evidence is text, and when it is states at 1:1, 4:1 and 16:1.

    Example:
      l2m bench first-token
    """
    from l2m_rag import bench

    settings = settings_of(ctx, model=model)
    fetch(ctx, settings, as_json=as_json, embedder=False, decoder=True)
    _say_figures(bench.first_token(settings, tokens=tokens, rounds=rounds, told=remarks(ctx)), as_json)


def _asked(
    settings: Settings, name: str, questions: str | None, collection: str | None, data: Path | None
) -> tuple[Collection, TaskSet]:
    """Give the collection and the questions: a set's, or the user's over a collection or over their own contexts."""
    from l2m_rag import evaluate, tasks

    if questions is None:
        if collection is not None:
            raise UsageError("--collection needs --questions FILE.jsonl: a set brings its own documents")
        loaded = tasks.load_set(name, data)
    else:
        loaded = tasks.load_file(Path(existing(questions)))
    if loaded.documents:
        return evaluate.collection_of(loaded, settings), loaded
    found = opened(settings)
    if not found.exists():
        raise CollectionNotFound(f"there is no collection {found.name!r} to ask; name one with -c")
    return found, loaded


@contextmanager
def _told(show: bool) -> Iterator[Callable[[int, int], object] | None]:
    with output.count_bar(show, "questions") as told:
        yield told


def remarks(ctx: typer.Context) -> Callable[[str], object]:
    """Give what tells the user of a measurement's progress; nothing when quiet."""
    return (lambda text: None) if ctx.find_root().params["quiet"] else output.remark


def _say_rows(rows: Sequence[dict[str, Any]], name: str, as_json: bool) -> None:
    if as_json:
        output.say_json({"set": name, "rows": [_finite(row) for row in rows]})
        return
    head = [key for key in rows[0] if key != "half"]
    cells = []
    for row in rows:
        half = row.get("half", {})
        cells.append([f"{row[key]} ±{half[key]}" if key in half else row[key] for key in head])
    output.say_table([key.upper() for key in head], cells)


def _say_figures(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.say_json(_finite(found))
    else:
        output.say_table(("FIGURE", "VALUE"), list(found.items()))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Give a row without NaN, which JSON does not have."""
    return {
        key: _finite(value) if isinstance(value, dict) else None if value != value else value
        for key, value in row.items()
    }
