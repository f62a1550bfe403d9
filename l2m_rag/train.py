"""Training: one recipe, one command, the same on a CPU, a GPU and several.

A run writes to its folder: `metrics.jsonl`, a plot, `resume.pt` (everything that is needed to go on) and at its end
`model/`. Run again, it goes on where it was; batches and chance depend on seed and step alone.
"""

from __future__ import annotations

import json
import math
import random
import signal
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast, get_type_hints

import torch
from torch import nn

from l2m_rag.backbone import Backbone, load_backbone, locate, tiny_backbone
from l2m_rag.checkpoint import Learnt, add_lora, load_model, put_weights, reader_at, save_model
from l2m_rag.clozes import Triple, texts_of
from l2m_rag.episodes import Batches, TaskRecipe
from l2m_rag.errors import ConfigError, CorruptError, L2MError, MissingExtraError
from l2m_rag.indexers.embedding import computes_bf16
from l2m_rag.losses import EpisodeLoss, LossWeights
from l2m_rag.model import L2M
from l2m_rag.model_config import L2MConfig

Told = Callable[[dict[str, Any]], object]
"""Called with the figures of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneRecipe:
    """What the memory is put around.

    Args:
        source: "default", a folder or a hub id; "" makes a tiny random one of the sizes below.
        dim: hidden size of the tiny one.
        n_layers: its layers.
        family: its shape.
        vocab_size: its ids; 0 takes what the task needs.
    """

    source: str = ""
    dim: int = 64
    n_layers: int = 4
    family: str = "llama"
    vocab_size: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRecipe:
    """How it is trained.

    Args:
        start: checkpoint whose weights are trained on; "default" is the one that ships, "" starts anew.
        kept: share of the weights at the start in those that are written in the end, the rest being what was learnt
            (Wortsman et al., 2022, arXiv 2109.01903, with one share for all weights).
        steps: in all.
        batch: texts in a step, over all devices.
        lr: highest learning rate; it rises over `warmup` steps and falls linearly to a tenth.
        warmup: steps.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        seed: of weights, batches and chance.
        what: "all" weights, the "memory" alone, the memory and the "upper" layers, or the memory and "lora" adapters.
        lora_rank: of the adapters.
        segments: curriculum: the longest text, in segments, in equal parts of the run; lengths are drawn from 1 up.
        exact: take texts of just that many segments instead.
        teacher: share of hops in which the evidence is recalled, at the start and at the end.
        hops: most hops.
        memory: False trains the same model without memory.
        bf16: run the model in bfloat16 where the machine has it; the weights that are trained stay float32.
        checkpointing: keep no activations of the layers, compute them again.
        save_seconds: between resumable checkpoints.
        log_every: steps.
    """

    start: str = ""
    kept: float = 0.0
    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    what: Literal["all", "memory", "upper", "lora"] = "lora"
    lora_rank: int = 16
    segments: tuple[int, ...] = (2, 3, 5, 8)
    exact: bool = False
    teacher: tuple[float, float] = (1.0, 0.2)
    hops: int = 2
    memory: bool = True
    bf16: bool = False
    checkpointing: bool = False
    save_seconds: float = 120.0
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "hops", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} ({getattr(self, name)}) must be at least 1")
        if not 0 <= self.kept < 1 or (self.kept and not self.start):
            raise ConfigError(f"train.kept ({self.kept}) must be at least 0 and below 1, and 0 without train.start")
        if self.what not in ("all", "memory", "upper", "lora"):
            raise ConfigError(f"train.what ({self.what}) must be all, memory, upper or lora")
        if not self.segments or min(self.segments) < 1:
            raise ConfigError(f"train.segments ({list(self.segments)}) must be numbers from 1 up")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run; the tables of the TOML file."""

    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    model: L2MConfig = field(default_factory=L2MConfig)
    task: TaskRecipe = field(default_factory=TaskRecipe)
    losses: LossWeights = field(default_factory=LossWeights)
    train: TrainRecipe = field(default_factory=TrainRecipe)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: it cannot be read, or holds a name or a value that does not fit.
    """
    try:
        with path.open("rb") as stream:
            found = tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    return cast(Recipe, _fill(Recipe, found, ""))


def _fill(kind: Any, given: dict[str, Any], table: str) -> Any:
    hints = get_type_hints(kind)
    known = {one.name for one in fields(kind)}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"the recipe has {table}{name}, which is none of: {', '.join(sorted(known))}")
        hint = hints[name]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{table}{name} ({value!r}) must be a table")
            values[name] = _fill(hint, value, f"{table}{name}.")
            continue
        if hint is float and type(value) is int:
            value = float(value)
        if isinstance(value, list):
            value = tuple(value)
        plain = hint if isinstance(hint, type) else (tuple if str(hint).startswith("tuple") else str)
        if type(value) is not plain:
            raise ConfigError(f"{table}{name} ({value!r}) must be of type {plain.__name__}")
        values[name] = value
    return kind(**values)


def build(recipe: Recipe) -> tuple[L2M, dict[str, Any], Any]:
    """Make the model of a recipe; give it, how its backbone is made, and the tokenizer (None for a tiny one)."""
    torch.manual_seed(recipe.train.seed)
    depth, told, plan = recipe.model.depth, recipe.backbone, recipe.train
    tokenizer = None
    if told.source:
        from transformers import AutoTokenizer

        # a CPU that only emulates bfloat16 is six times slower in it
        dtype = torch.bfloat16 if plan.bf16 and computes_bf16() else torch.float32
        backbone = load_backbone(told.source, depth, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(locate(told.source))
        made: dict[str, Any] = {"source": told.source}
    else:
        ids = told.vocab_size or Batches(recipe.task, 1, recipe.model.segment_length, 0).vocab_size
        sizes: dict[str, Any] = {
            "vocab_size": ids, "dim": told.dim, "n_layers": told.n_layers, "depth": depth, "family": told.family,
            "seed": recipe.train.seed,
        }  # fmt: skip
        backbone, made = tiny_backbone(**sizes), {"tiny": sizes}
    _choose(backbone, recipe)
    model = L2M(backbone, recipe.model)
    if recipe.task.kind == "reading":  # which the memory has no part in
        for part in (model.router, model.slots, model.slot_layers):
            part.requires_grad_(False)
    if plan.start:
        put_weights(reader_at(plan.start), model)
    return model, made, tokenizer


def _choose(backbone: Backbone, recipe: Recipe) -> None:
    """Freeze what is not to be trained."""
    what, lm = recipe.train.what, cast(Any, backbone.causal_lm)
    if what != "all":
        backbone.requires_grad_(False)
    if what == "upper":
        for number in range(backbone.depth, backbone.n_layers):
            lm.model.layers[number].requires_grad_(True)
    if what == "lora":
        add_lora(backbone, recipe.train.lora_rank)
    if recipe.train.checkpointing:
        lm.activation_checkpointing_enable()


def train(recipe: Recipe, folder: Path, *, told: Told = lambda figures: None) -> dict[str, Any]:
    """Train a model, or go on with it.

    Args:
        recipe: of the run.
        folder: of the run; a run of another recipe in it is an error.
        told: called with the figures of each logged step.

    Returns:
        Figures of the last step, `done`, and `seconds` of this call.

    Raises:
        L2MError: the folder holds another run.
        MissingExtraError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    accelerator: Any = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    plan = recipe.train
    if plan.batch % world:
        raise ConfigError(f"train.batch ({plan.batch}) must be a multiple of the {world} processes")
    model, made, tokenizer = build(recipe)
    batches, loss = _work(recipe, model, tokenizer, folder)
    loss.train()
    masters = Masters(model)
    optimizer = torch.optim.AdamW(masters.weights, lr=plan.lr, weight_decay=plan.weight_decay)
    step = _resume(folder, recipe, masters, optimizer)
    loss = accelerator.prepare(loss)
    began = saved = time.monotonic()
    figures: dict[str, Any] = {}
    since: list[dict[str, torch.Tensor]] = []
    with _stoppable() as stopped:
        while step < plan.steps and not stopped:
            torch.manual_seed(plan.seed * 1_000_003 + step)  # chance within a step depends on nothing before it
            if isinstance(inner := accelerator.unwrap_model(loss), EpisodeLoss):
                inner.teacher = _between(*plan.teacher, step / plan.steps)
            whole = batches(step, _segments(plan, step))
            part = type(whole)(*(piece[rank::world] for piece in whole)).to(accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * _rate(plan, step)
            outcome = loss(part)
            since.append({name: value.detach() for name, value in {**outcome.losses, **outcome.figures}.items()})
            accelerator.backward(outcome.losses["total"])
            masters.take_gradients()
            norm = torch.nn.utils.clip_grad_norm_(masters.weights, plan.clip)
            optimizer.step()
            masters.give_weights()
            step += 1
            if step % plan.log_every == 0 or step == plan.steps:
                figures = _figures(accelerator, since, step, time.monotonic() - began, norm)
                since.clear()
                if not math.isfinite(figures["total"]):
                    raise L2MError(
                        f"the loss is {figures['total']} at step {step}; go on from {folder} with a lower train.lr"
                    )
                if main:
                    _append(folder / "metrics.jsonl", figures)
                    told(figures)
            if main and time.monotonic() - saved > plan.save_seconds:
                _save(folder, recipe, masters, optimizer, step)
                saved = time.monotonic()
    if main:
        _save(folder, recipe, masters, optimizer, step)
        if step >= plan.steps:
            _write(recipe, model, masters, folder, made)
    accelerator.wait_for_everyone()
    return {**figures, "step": step, "done": step >= plan.steps, "seconds": round(time.monotonic() - began, 1)}


def _work(recipe: Recipe, model: L2M, tokenizer: Any, folder: Path) -> tuple[Any, Any]:
    """Give what makes the batches of a task, and the module that gives their loss."""
    task, plan = recipe.task, recipe.train
    if task.kind == "reading":
        from l2m_rag.asking import LONGEST, to_ask
        from l2m_rag.reading import LONGEST_ANSWER, ReadingBatches, ReadingLoss, load_material, paragraphs, plain_texts
        from l2m_rag.unanswerable import harder

        if recipe.losses.distance and not task.noise:
            raise ConfigError("task.noise must name a folder of books for losses.distance")
        path, data = folder / "material.json", Path(task.data)
        asked = _asked(recipe, model, tokenizer, folder) if task.asker and not path.exists() else []
        material = load_material(path, data, task.sources, task.clozes, plan.seed, asked=asked)
        if task.asks:
            material = to_ask(material)
        if task.twisted:
            material = harder(material, seed=plan.seed)
        batches = ReadingBatches(
            material,
            tokenizer,
            batch=plan.batch,
            longest=task.row,
            answers=LONGEST if task.asks else LONGEST_ANSWER,
            unanswerable=0.0 if task.asks else task.unanswerable,
            together=task.together,
            shares=dict(zip(task.sources, task.shares, strict=False)),
            rebuild=task.rebuild,
            texts=paragraphs(Path(task.noise), plan.seed) if task.noise and task.rebuild else (),
            freely=task.freely,
            again=task.again,
            plain=plain_texts(Path(task.noise), material, plan.seed) if recipe.losses.distance else (),
            seed=plan.seed,
        )
        return batches, ReadingLoss(model, ratios=task.ratios, cached=task.cached, distance=recipe.losses.distance)
    made = Batches(task, plan.batch, recipe.model.segment_length, plan.seed, tokenizer)
    return made, EpisodeLoss(model, recipe.losses, hops=plan.hops, memory=plan.memory)


def _asked(recipe: Recipe, reader: L2M, tokenizer: Any, folder: Path) -> list[Triple]:
    """Give the questions that an asker writes and the reader that is trained on finds answered."""
    from l2m_rag.asking import write

    task, seed = recipe.task, recipe.train.seed
    asker = load_model(Path(task.asker), dtype=reader.backbone.dtype, merged=True)
    passages = texts_of("encyclopedia", Path(task.data), random.Random(seed), task.written)
    return write(asker, reader, tokenizer, passages, folder / "asked.jsonl", seed=seed)


class Masters:
    """The weights that are trained, in float32, of which the model's own may be roundings.

    In bfloat16 a step of less than one part in 256 of a weight would be lost.

    Args:
        model: whose trainable weights they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.by_name = {name: weight.detach().clone().float() for name, weight in self._own.items()}
        self.weights = list(self.by_name.values())

    def take_gradients(self) -> None:
        """Move the gradients from the model to the masters."""
        for own, master in zip(self._own.values(), self.weights, strict=True):
            master.grad = None if own.grad is None else own.grad.float()
            own.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the masters into the model."""
        for own, master in zip(self._own.values(), self.weights, strict=True):
            own.copy_(master)


def _write(recipe: Recipe, model: L2M, masters: Masters, folder: Path, made: dict[str, Any]) -> None:
    """Write the model that came of a run, moved back towards the weights at its start by the share that is kept."""
    plan, task = recipe.train, recipe.task
    if plan.kept:
        put_weights(reader_at(plan.start), model)
        started = Masters(model)
        for name, master in masters.by_name.items():
            master.lerp_(started.by_name[name], plan.kept)
        masters.give_weights()
    learnt = Learnt(task.together, task.freely > 0, task.again) if task.kind == "reading" else None
    lora = plan.lora_rank if plan.what == "lora" else 0
    save_model(model, folder / "model", backbone=made, lora=lora, learnt=learnt)
    plot(folder)


def _segments(plan: TrainRecipe, step: int) -> int:
    """Give how long the texts of a step are: the curriculum's longest, or any shorter."""
    part = min(len(plan.segments) - 1, step * len(plan.segments) // plan.steps)
    longest = plan.segments[part]
    return longest if plan.exact else int(torch.randint(1, longest + 1, ()))


def _rate(plan: TrainRecipe, step: int) -> float:
    return min(1.0, (step + 1) / max(1, plan.warmup)) * _between(1.0, 0.1, step / plan.steps)


def _between(first: float, last: float, share: float) -> float:
    return first + (last - first) * share


def _figures(
    accelerator: Any, since: list[dict[str, torch.Tensor]], step: int, seconds: float, norm: Any
) -> dict[str, Any]:
    """Give means over the steps since the last figures were given."""
    names = dict.fromkeys(name for one in since for name in one)
    found: dict[str, Any] = {"step": step, "seconds": round(seconds, 2), "gradient": round(float(norm), 4)}
    for name in names:
        values = [one[name] for one in since if name in one]
        found[name] = float(accelerator.reduce(torch.stack(values).mean(), "mean"))
    return found


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Turn SIGTERM and SIGINT into a list that fills, so that a step is finished and saved first."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # signals reach the main thread only
        before = {}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- a run's folder ----------------------------------------------------------------------------------------------------
def _mark(recipe: Recipe) -> str:
    """Give the recipe as text, but for what may change between two parts of one run."""
    told = asdict(recipe)
    for name in ("save_seconds", "log_every"):
        told["train"].pop(name)
    return json.dumps(told, sort_keys=True)


def _save(folder: Path, recipe: Recipe, masters: Masters, optimizer: Any, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: weight.cpu() for name, weight in masters.by_name.items()}
    scratch = folder / "resume.part"
    torch.save({"step": step, "weights": kept, "optimizer": optimizer.state_dict(), "recipe": _mark(recipe)}, scratch)
    scratch.replace(folder / "resume.pt")


def _resume(folder: Path, recipe: Recipe, masters: Masters, optimizer: torch.optim.Optimizer) -> int:
    """Bring back what a run had reached; give its step, 0 for none."""
    path = folder / "resume.pt"
    if not path.exists():
        return 0
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        step, weights, state, mark = (found[name] for name in ("step", "weights", "optimizer", "recipe"))
    except Exception as error:  # whatever a damaged archive makes torch throw
        raise CorruptError(f"{path} cannot be read ({error}); remove it to train from the start") from error
    if mark != _mark(recipe):
        raise L2MError(f"{folder} holds a run of another recipe; name another folder, or remove {path}")
    for name, weight in weights.items():
        masters.by_name[name].copy_(weight)
    masters.give_weights()
    optimizer.load_state_dict(state)
    _cut(folder / "metrics.jsonl", step)
    return int(step)


def _append(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps({name: _short(value) for name, value in figures.items()}) + "\n")


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Give the figures that a run has logged, in order."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _cut(path: Path, step: int) -> None:
    """Drop the figures of steps that are done again."""
    kept = [line for line in metrics(path.parent) if line["step"] <= step]
    if path.exists():
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def plot(folder: Path) -> Path:
    """Draw the losses and figures of a run into `metrics.png`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = metrics(folder)
    names = [name for name in found[-1] if name not in ("step", "seconds", "gradient")] if found else []
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in names:
        steps = [line["step"] for line in found if name in line]
        axis = axes[1] if name.split()[0] in ("right", "retrieved", "abstained") else axes[0]
        axis.plot(steps, [line[name] for line in found if name in line], label=name)
    for axis, title in zip(axes, ("losses", "shares"), strict=True):
        axis.set_xlabel("step")
        axis.set_title(title)
        axis.legend()
    axes[0].set_yscale("log")
    path = folder / "metrics.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
