"""Training: what is learned, and that a run that was cut goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import tiny_folder
from safetensors.torch import load_file
from torch.testing import assert_close

from l2m_rag.checkpoint import learnt_of, load_model
from l2m_rag.episodes import Batches, TaskRecipe
from l2m_rag.errors import ConfigError, CorruptError, IncompatibleError, L2MError
from l2m_rag.losses import LossWeights
from l2m_rag.memory_eval import recall
from l2m_rag.model_config import L2MConfig
from l2m_rag.reading_data import Material, Question
from l2m_rag.train import BackboneRecipe, Masters, Recipe, TrainRecipe, build, load_recipe, metrics, train

ROOT = Path(__file__).parent.parent
SIZES: dict[str, Any] = {
    "depth": 1, "segment_length": 8, "record_length": 4, "window": 2, "slots": 4, "slot_heads": 2, "slot_layers": (1,),
    "slots_written": 2, "key_dim": 16, "records": 9, "recall": 2, "hops": 1, "budget": 16, "ratios": (1, 4),
}  # fmt: skip


def small(**changes: Any) -> Recipe:
    plan: dict[str, Any] = {
        "steps": 6, "batch": 4, "what": "all", "segments": (2, 3), "hops": 2, "log_every": 1, "warmup": 2,
    }  # fmt: skip
    return Recipe(
        backbone=BackboneRecipe(dim=32, n_layers=2),
        model=L2MConfig(**SIZES),
        task=TaskRecipe(pairs=4, keys=8, values=8),
        losses=LossWeights(reconstruction=0.1, resolution=0.1, language=0.1, distance=0.1, lookup=0.01),
        train=TrainRecipe(**{**plan, **changes}),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in load_model(folder / "model").named_parameters()}


@pytest.mark.timeout(900)  # 80 s alone on two slow cores, several times that beside other work
def test_the_tiny_recipe_learns_to_recall_and_the_same_model_without_memory_does_not(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "tiny.toml")
    assert recipe.train.segments == (8,)
    fresh = Batches(recipe.task, 64, recipe.model.segment_length, seed=99)
    train(recipe, tmp_path / "with")
    found, router = recall(load_model(tmp_path / "with" / "model"), (fresh(step, 8) for step in range(4)))
    assert found.share >= 0.95
    assert router["sources"] == {"working": 256}
    without = replace(recipe, train=replace(recipe.train, memory=False))
    train(without, tmp_path / "without")
    blind, _ = recall(load_model(tmp_path / "without" / "model"), (fresh(step, 8) for step in range(4)), memory=False)
    assert blind.share <= 1 / 32 + 4 * (1 / 32 * 31 / 32 / 256) ** 0.5


@pytest.mark.parametrize("what", ["all", "memory", "upper", "lora"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, what: str) -> None:
    recipe = small(what=what)
    whole = train(recipe, tmp_path / "whole")

    def stop(figures: dict[str, Any]) -> None:
        if figures["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    part = train(recipe, tmp_path / "cut", told=stop)
    assert (part["done"], part["step"]) == (False, 3)
    assert not (tmp_path / "cut" / "model").exists()
    rest = train(recipe, tmp_path / "cut")
    assert rest["done"]
    assert_close(rest["total"], whole["total"])
    assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "cut" / "metrics.png").stat().st_size > 1000


def test_only_what_is_named_is_trained(tmp_path: Path) -> None:
    for what in ("memory", "upper", "lora"):
        recipe = small(what=what)
        before = {name: weight.detach().clone() for name, weight in build(recipe)[0].named_parameters()}
        train(recipe, tmp_path / what)
        after = weights(tmp_path / what)
        moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
        lower = {name for name in before if "layers.0." in name or "embed_tokens" in name or "lm_head" in name}
        assert not moved & lower
        in_upper = any(".layers.1." in name for name in moved)
        assert in_upper == (what != "memory")
        assert any("lora" in name for name in moved) == (what == "lora")
        assert any(name.startswith("router.") for name in moved)


def test_every_loss_can_be_switched_off(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("retrieval", "router", "lookup", "keep", "language", "reconstruction", "resolution"), 0.0)
    recipe = replace(small(steps=1), losses=LossWeights(**nothing))
    assert set(train(recipe, tmp_path)) >= {"answer", "total"}
    line = metrics(tmp_path)[0]
    assert_close(line["total"], line["answer"], rtol=1e-3, atol=1e-3)
    assert "language" not in line


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    plain = train(small(steps=2), tmp_path / "plain")
    saved = train(small(steps=2, checkpointing=True), tmp_path / "saved")
    assert_close(saved["total"], plain["total"], rtol=1e-4, atol=1e-4)


def test_two_processes_give_the_loss_of_one(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    sizes = "\n".join(f"{name} = {json.dumps(value)}" for name, value in SIZES.items())
    recipe.write_text(
        f"""
[backbone]
dim = 32
n_layers = 2
[model]
{sizes}
[task]
pairs = 4
[losses]
answer = 1.0
[train]
steps = 1
batch = 8
what = "all"
segments = [2]
exact = true
teacher = [0.0, 0.0]
hops = 1
log_every = 1
"""
    )
    one = train(load_recipe(recipe), tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    command += ["-m", "l2m_rag.cli", "train", str(recipe), "--run", str(tmp_path / "two"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "L2M_HOME": str(tmp_path / "home")}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    two = metrics(tmp_path / "two")[0]
    assert_close(two["answer"], one["answer"], rtol=1e-4, atol=1e-4)
    assert_close(two["total"], one["total"], rtol=1e-3, atol=1e-3)
    before = weights(tmp_path / "one")
    assert_close(weights(tmp_path / "two"), before, rtol=1e-2, atol=2e-3)


def test_training_off_the_main_thread_works(tmp_path: Path) -> None:
    came: list[Any] = []
    thread = threading.Thread(target=lambda: came.append(train(small(steps=1), tmp_path)))
    thread.start()
    thread.join()
    assert came[0]["done"]


# -- what goes wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 5", "train.step, which is none of"),
        ("[train]\nsteps = 'many'", r"train.steps \('many'\) must be of type int"),
        ("[train]\nsteps = 0", r"train.steps \(0\) must be at least 1"),
        ("[train]\nwhat = 'some'", "all, memory, upper or lora"),
        ("[task]\nkind = 'chess'", "task.kind"),
        ("[task]\nkind = 'books'", "task.noise"),
        ("[task]\nkind = 'needle'", "task.noise"),
        ("[model]\nratios = [1, 3, 4]", "multiple"),
        ("model = 5", "must be a table"),
        ("[train", "cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "recipe.toml")


def test_stories_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a backbone with a tokenizer"):
        train(replace(small(), task=TaskRecipe(kind="stories")), tmp_path)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    train(small(steps=1), tmp_path)
    with pytest.raises(L2MError, match="holds a run of another recipe"):
        train(small(steps=2), tmp_path)
    (tmp_path / "resume.pt").write_bytes(b"nothing")
    with pytest.raises(CorruptError, match="remove it to train from the start"):
        train(small(steps=1), tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(L2MError, match=r"lower train\.lr"):
        train(small(steps=30, lr=1e9, clip=1e9, warmup=1), tmp_path)


def _reading(tmp_path: Path, **changes: Any) -> Recipe:
    folder = tmp_path / "backbone"
    if not folder.exists():
        folder.mkdir()
        tiny_folder(folder, ["the cat sat on the mat", "a dog ran"])
    plan: dict[str, Any] = {
        "steps": 6, "batch": 2, "what": "lora", "lora_rank": 4, "segments": (1,), "log_every": 1, "warmup": 1,
        "bf16": True, "lr": 1e-2,
    }  # fmt: skip
    return Recipe(
        backbone=BackboneRecipe(source=str(folder)),
        model=L2MConfig(**{**SIZES, "depth": 2, "slot_layers": (2,)}),
        task=TaskRecipe(kind="reading", data="nowhere", row=400, ratios=(1, 4), rebuild=0.3, cached=10_000_000),
        train=TrainRecipe(**{**plan, **changes}),
    )


def _material(folder: Path) -> None:
    passages = [
        f"the {animal} sat on the {place} " * 10 for animal in ("cat", "dog", "hen") for place in ("mat", "log")
    ]
    questions = [Question(number, "who sat?", passage.split()[1]) for number, passage in enumerate(passages)]
    folder.mkdir()
    near = [[other for other in range(6) if other != number] for number in range(6)]
    Material(passages, ["squad"] * 6, questions, near, [[] for _ in range(6)]).save(folder / "material.json")


def test_reading_trains_adapters_alone_is_resumed_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    recipe = _reading(tmp_path)
    _material(tmp_path / "whole")
    whole = train(recipe, tmp_path / "whole")
    _material(tmp_path / "cut")

    def stop(figures: dict[str, Any]) -> None:
        if figures["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(recipe, tmp_path / "cut", told=stop)["done"]
    assert_close(train(recipe, tmp_path / "cut")["total"], whole["total"])
    made = tmp_path / "whole" / "model"
    assert all("lora_" in name for name in load_file(made / "weights-00.safetensors"))
    assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    told = metrics(tmp_path / "whole")
    assert {name for line in told for name in line} >= {"answer", "right", "reconstruction 4:1"}

    on = replace(recipe, train=replace(recipe.train, start=str(made), steps=1, lr=1e-9))
    _material(tmp_path / "on")
    train(on, tmp_path / "on")
    assert_close(weights(tmp_path / "on"), weights(tmp_path / "whole"))
    half = replace(on, train=replace(recipe.train, start=str(made), steps=2, kept=0.5))
    learnt = replace(half, train=replace(half.train, kept=0.0))
    for name, run in (("half", half), ("learnt", learnt)):
        _material(tmp_path / name)
        train(run, tmp_path / name)
    mean, end, start = (weights(tmp_path / name) for name in ("half", "learnt", "whole"))
    assert_close(mean, {name: (end[name] + start[name]) / 2 for name in end})
    assert any((end[name] - start[name]).abs().max() > 1e-4 for name in end)
    with pytest.raises(ConfigError, match=r"train\.kept"):
        replace(recipe.train, kept=0.5)
    with pytest.raises(IncompatibleError, match="lora"):
        build(replace(on, train=replace(on.train, lora_rank=8)))


def test_small_steps_are_not_lost_to_bfloat16() -> None:
    model = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    masters = Masters(model)
    optimizer = torch.optim.SGD(masters.weights, lr=1e-3)
    for _ in range(10):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        masters.take_gradients()
        optimizer.step()
        masters.give_weights()
    assert_close(masters.weights[0], torch.full((4, 4), 0.99))
    assert bool((model.weight < 1).all())  # each step alone would have been rounded away
    assert model.weight.grad is None


def test_reading_needs_a_folder_and_a_share_for_each_source() -> None:
    with pytest.raises(ConfigError, match=r"task\.data"):
        TaskRecipe(kind="reading")
    with pytest.raises(ConfigError, match=r"task\.shares"):
        TaskRecipe(kind="reading", data="x", sources=("squad", "qed"), shares=(1.0,))


def test_recipes_that_go_on_from_the_default_reader_put_questions_as_it_has_learnt() -> None:
    learnt = learnt_of(ROOT / "l2m_rag" / "data" / "reader")
    recipes = [load_recipe(path) for path in (ROOT / "recipes").glob("*.toml")]
    on = [recipe for recipe in recipes if recipe.train.start == "default" and recipe.task.kind == "reading"]
    assert len(on) > 2
    assert all(recipe.task.again == learnt.again for recipe in on)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_that_ship_can_be_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert not recipe.task.shares or len(recipe.task.shares) == len(recipe.task.sources)
