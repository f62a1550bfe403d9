"""`l2m train`, `l2m eval memory`, `l2m bench memory`: the memory model itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from l2m_rag.cli import output
from l2m_rag.cli.evaluation import DataOption, bench_app, eval_app, remarks
from l2m_rag.cli.options import Command, Json, existing, settings_of
from l2m_rag.errors import UsageError

INTERRUPTED = 130

RunOption = Annotated[
    str | None,
    typer.Option("--run", metavar="DIR", help="A finished run of `l2m train`; default the untrained memory."),
]


def train(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.toml", help="What is trained, on what, and how.")],
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Folder of the run; default runs/NAME in the home.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a memory model; run again, it goes on where it was.

    Examples:
      l2m train recipes/tiny.toml
      l2m train recipes/tiny.toml --run runs/first
      accelerate launch --num_processes 2 -m l2m_rag.cli train recipes/tiny.toml

    The run's folder gets metrics.jsonl, metrics.png, what is needed to go on, and at the end the model.
    """
    from l2m_rag.train import load_recipe, train

    path = Path(existing(recipe))
    plan = load_recipe(path)
    folder = run or settings_of(ctx).data / "runs" / path.stem
    told = remarks(ctx)
    found = train(plan, folder, told=lambda figures: told(_line(figures)))
    folder.mkdir(parents=True, exist_ok=True)
    if path.resolve() != (folder / "recipe.toml").resolve():
        shutil.copyfile(path, folder / "recipe.toml")
    if as_json:
        output.say_json({**found, "run": str(folder)})
    if not found["done"]:
        output.remark(f"stopped after step {found['step']}; run the same command again to go on")
        raise typer.Exit(INTERRUPTED)
    if not as_json:
        output.say(f"{folder / 'model'}: {found['step']} steps, loss {found.get('total', 0.0):.4g}")


@eval_app.command(cls=Command)
def memory(
    ctx: typer.Context,
    run: RunOption = None,
    suite: Annotated[
        str, typer.Option(metavar="NAMES", help="Of: recall, needle, eviction, perplexity; separated by commas.")
    ] = "recall,needle,eviction,perplexity",
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Needle: lengths of the texts in tokens.")
    ] = "1000,4000",
    depths: Annotated[str, typer.Option(metavar="D,D,...", help="Needle: depths, from 0 to 1.")] = "0,0.5,1",
    trials: Annotated[int, typer.Option(min=1, metavar="N", help="Trials of each kind.")] = 20,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write memory.json and plots there.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what the memory is worth: recall, needles, eviction policies, perplexity, what the router does.

    Examples:
      l2m eval memory --run runs/tiny --suite recall,eviction
      l2m eval memory --suite needle,perplexity --lengths 1000,8000 --trials 10 --out report/

    Recall and needle go the whole way: the text is read into memory, the router decides what is recalled, the answer
    is written. Books are looked for in the data folder.
    """
    from l2m_rag import memory_eval

    wanted = [name.strip() for name in suite.split(",")]
    unknown = sorted(set(wanted) - set(memory_eval.SUITES))
    if unknown:
        raise UsageError(f"--suite has {unknown[0]!r}, which is none of: {', '.join(memory_eval.SUITES)}")
    found = memory_eval.report(
        wanted,
        run=Path(existing(run)) if run is not None else None,
        books=data,
        lengths=_numbers(lengths, int, "--lengths"),
        depths=_numbers(depths, float, "--depths"),
        trials=trials,
        told=remarks(ctx),
    )
    if out is not None:
        memory_eval.write(found, out)
    if as_json:
        output.say_json(found)
        return
    for name, rows in found.items():
        output.say(f"{name}:")
        output.say_table([key.upper() for key in rows[0]], [list(row.values()) for row in rows])


@bench_app.command("memory", cls=Command)
def bench(
    ctx: typer.Context,
    run: RunOption = None,
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Texts to read, in tokens.")] = "1000,10000,100000",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A random model of 4 layers, 64 wide, in place of a real one.")
    ] = False,
    attention: Annotated[str, typer.Option(metavar="N,N,...", help="Texts for full attention.")] = "1000,4000,8000",
    as_json: Json = False,
) -> None:
    """Measure what the memory costs: a step, reading on and on, and full attention beside it.

    Examples:
      l2m bench memory
      l2m bench memory --tiny --lengths 1000,1000000
    """
    from l2m_rag import bench_memory
    from l2m_rag.backbone import tiny_backbone
    from l2m_rag.checkpoint import load_model
    from l2m_rag.model import L2M
    from l2m_rag.model_config import L2MConfig

    told, texts = remarks(ctx), tuple(_numbers(lengths, int, "--lengths"))
    if tiny:
        model = L2M(tiny_backbone(vocab_size=512, dim=64), L2MConfig(depth=2, slot_heads=4, slot_layers=(2, 3))).eval()
    else:
        model = load_model(Path(existing(run)) / "model") if run is not None else L2M.from_pretrained().eval()
    found = {
        "step": [bench_memory.steps(model)],
        "reading": bench_memory.reading(model, texts, told=told),
        "reading_with_tier": bench_memory.reading(model, texts, with_tier=True, told=told),
        "attention": bench_memory.against_attention(model, tuple(_numbers(attention, int, "--attention")), told=told),
    }
    if as_json:
        output.say_json(found)
        return
    output.say_table(("FIGURE", "VALUE"), list(found["step"][0].items()))
    for name in ("reading", "reading_with_tier", "attention"):
        output.say_table([key.upper() for key in found[name][0]], [list(row.values()) for row in found[name]])


def _numbers(text: str, kind: Any, option: str) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} must be numbers separated by commas") from None
    if min(found) < 0:
        raise UsageError(f"{option} {text!r} must not be negative")
    return found


def _line(figures: dict[str, Any]) -> str:
    told = ("total", "answer", "retrieval", "right", "retrieved", "abstained")
    shown = ", ".join(f"{name} {figures[name]:.3f}" for name in told if name in figures)
    return f"step {figures['step']} ({figures['seconds']:.0f} s): {shown}"
