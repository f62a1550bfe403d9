"""`l2m demo`: a first answer from documents that come with the package."""

from __future__ import annotations

from importlib import resources

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import Json, ModelOption, UrlOption, opened, ready, settings_of, shows_progress

COLLECTION = "demo"
QUESTIONS = (
    "How much is the deposit for the lighthouse flat?",
    "Which error code of the espresso machine means that the water tank is empty?",
    "When does the lease of the lighthouse flat end?",
    "What is the name of the landlord's cat?",  # no document says
)


def demo(ctx: typer.Context, model: ModelOption = None, llm_url: UrlOption = None, as_json: Json = False) -> None:
    """Get a first answer from documents that come with l2m.

    Examples:
      l2m demo
      l2m search "water hardness" -c demo
      l2m collections delete demo --yes

    Six small documents go into the collection `demo` and are asked four questions; the last has no answer.
    """
    settings = settings_of(ctx, collection=COLLECTION, model=model, llm_url=llm_url)
    ready(ctx, settings, as_json=as_json, decoder=True, new=True)
    collection = opened(settings)
    with (
        resources.as_file(resources.files("l2m_rag") / "data" / "demo") as folder,
        output.ingest_bar(shows_progress(ctx, as_json)) as progress,
    ):
        report = collection.ingest(folder, progress=progress)
    if as_json:
        output.say_json(output.report_json(report))
    else:
        output.say_report(report, [str(folder)])
    for question in QUESTIONS:
        if as_json:
            output.say_json({"id": None, **collection.ask(question).to_json()})
            continue
        output.say(f"\n> {question}")
        stream = output.AnswerStream()
        answer = collection.ask(question, on_text=stream.write)
        stream.end(answer)
        output.say_citations(answer)
    if not as_json:
        output.say(f'\nAsk it yourself: l2m ask "..." -c {COLLECTION}')
