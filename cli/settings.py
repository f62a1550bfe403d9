"""`l2m config`: the settings in force and the files they come from."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

import typer

from l2m_rag.cli import output
from l2m_rag.cli.options import Command, Json
from l2m_rag.config import PROJECT_FILE, SECRET, Settings, load_settings, project_file, user_file

app = typer.Typer(
    rich_markup_mode=None,
    help="Show settings and where they come from.\n\n"
    "An option wins over an L2M_* variable, that over the nearest l2m.toml, that over your own file, "
    "that over the default.\n\nExample: l2m config show --origin",
)


@app.command(cls=Command)
def show(
    ctx: typer.Context,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: Json = False,
) -> None:
    """Show the settings in force.

    Examples:
      l2m config show
      l2m config show --origin --json
    """
    settings, origins = load_settings({"home": ctx.find_root().params["home"]})
    values = {setting.name: _shown(settings, setting.name) for setting in fields(settings)}
    if as_json:
        pairs = {name: {"value": value, "origin": origins[name]} for name, value in values.items()}
        output.say_json(pairs if origin else values)
        return
    # TOML's notation, so that a line can be copied into a file of settings.
    lines = [(name, output.toml(value), origins[name]) for name, value in values.items() if value is not None]
    width = max(len(f"{name} = {value}") for name, value, _ in lines) if origin else 0
    for name, value, source in lines:
        output.say(f"{name + ' = ' + value:<{width}}" + (f"  # {source}" if origin else ""))


@app.command(cls=Command)
def path(ctx: typer.Context, as_json: Json = False) -> None:
    """Show the home folder and the settings files that are read.

    Example:
      l2m config path
    """
    settings, _ = load_settings({"home": ctx.find_root().params["home"]})
    project = project_file()
    values = {
        "home": str(settings.home),
        "user": str(user_file()),
        "project": str(project) if project else None,
    }
    if as_json:
        output.say_json(values)
        return
    output.say(f"home     {values['home']}")
    output.say(f"user     {values['user']}" + ("" if user_file().is_file() else " (not there)"))
    output.say(f"project  {values['project'] or f'no {PROJECT_FILE} from here upward'}")


def _shown(settings: Settings, name: str) -> str | int | float | None:
    value = getattr(settings, name)
    if name == "llm_key" and value:
        return SECRET
    return value if value is None or isinstance(value, str | int | float) else str(value)
