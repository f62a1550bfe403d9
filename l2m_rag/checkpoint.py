"""Memory models and their states on disk: safetensors beside a JSON that says what they are.

A checkpoint holds what was trained: memory, and LoRA, upper layers or a whole tiny backbone. The rest is the backbone
that it names, whose fingerprint must fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from l2m_rag.backbone import Backbone, fingerprint, load_backbone, tiny_backbone
from l2m_rag.errors import CorruptError, IncompatibleError, L2MError, MissingExtraError
from l2m_rag.memory_tiers.router import Plan
from l2m_rag.memory_tiers.working import Records
from l2m_rag.model import L2M
from l2m_rag.model_config import L2MConfig
from l2m_rag.state import State

FORMAT = 1
_SHARD_BYTES = 15_000_000


def add_lora(backbone: Backbone, rank: int) -> None:
    """Put LoRA adapters (arXiv 2106.09685) into the linear layers of the upper half, in place.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    numbers = "|".join(map(str, range(backbone.depth, backbone.n_layers)))
    layers = rf"model\.layers\.({numbers})\..*_proj"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), backbone.causal_lm)


@contextmanager
def without_lora(backbone: Backbone) -> Iterator[None]:
    """Run a backbone as it was before `add_lora`; no gradient may be asked for until it is over."""
    layers: list[Any] = [part for part in backbone.causal_lm.modules() if hasattr(part, "lora_A")]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Learnt(NamedTuple):
    """What a reader has learnt.

    Args:
        together: most passages that it reads at once.
        free: whether it answers in its own words.
        again: whether questions are put twice.
    """

    together: int = 1
    free: bool = False
    again: bool = False


def save_model(
    model: L2M, folder: Path, *, backbone: dict[str, Any], lora: int = 0, learnt: Learnt | None = None
) -> None:
    """Write the trained part of a model, so that a folder of that name is whole or not there.

    Args:
        model: whose trainable weights are written.
        folder: is replaced.
        backbone: how it is made: `{"source": ...}` for `load_backbone`, or `{"tiny": {...}}` for `tiny_backbone`.
        lora: rank of the adapters; 0 for none.
        learnt: what it has learnt, when it is a reader.
    """
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    trained = {
        name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters() if weight.requires_grad
    }
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, weight in trained.items():
        taken = sum(part.numel() * part.element_size() for part in shards[-1].values())
        if shards[-1] and taken + weight.numel() * weight.element_size() > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = weight
    for number, shard in enumerate(shards):
        save_file(shard, scratch / f"weights-{number:02}.safetensors")
    described = {
        "format": FORMAT,
        "config": asdict(model.config),
        "backbone": backbone,
        "fingerprint": fingerprint(model.backbone),
        "lora": lora,
        **(learnt or Learnt())._asdict(),
        "shards": len(shards),
        "parameters": len(trained),
    }
    (scratch / "config.json").write_text(json.dumps(described, indent=1))
    old = scratch.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    if old.exists():
        import shutil

        shutil.rmtree(old)


def reader_at(name: str | Path) -> Path:
    """Give the folder of a checkpoint: "default" is the reader that ships."""
    return Path(str(resources.files("l2m_rag"))) / "data" / "reader" if name == "default" else Path(name)


def source_of(folder: Path) -> str:
    """Give the name of the backbone that a checkpoint was trained on, for `load_backbone`.

    Raises:
        L2MError: it was trained on one that has no tokenizer, or there is no checkpoint.
    """
    source = _described(folder)["backbone"].get("source")
    if not source:
        raise L2MError(f"{folder} was trained on a backbone made from nothing; it has no tokenizer to read text with")
    return str(source)


def learnt_of(folder: Path) -> Learnt:
    """Give what the reader of a checkpoint has learnt; what it does not say it has not."""
    described = _described(folder)
    return Learnt(**{name: described[name] for name in Learnt._fields if name in described})


def _described(folder: Path) -> dict[str, Any]:
    try:
        described: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise L2MError(f"{folder} holds no checkpoint (config.json is missing)") from None
    except ValueError as error:
        raise CorruptError(f"{folder / 'config.json'} cannot be read ({error}); train again or restore it") from error
    if described.get("format") != FORMAT:
        raise IncompatibleError(
            f"checkpoint {folder} has format {described.get('format')}; this version reads {FORMAT}"
        )
    return described


def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, merged: bool = False, source: str | Path | None = None
) -> L2M:
    """Load a model that `save_model` wrote.

    Args:
        folder: of the checkpoint.
        dtype: of the backbone.
        merged: LoRA adapters are added into the weights they stand beside, which makes them quicker, needs no peft, and
            leaves nothing to train; else they stay apart.
        source: where the backbone lies; by default where the checkpoint says.

    Raises:
        L2MError: there is none.
        IncompatibleError: it is of another format, or its backbone or its sizes do not fit.
        CorruptError: a file cannot be read.
    """
    described = _described(folder)
    try:
        sizes: Any = described["config"]
        given: Any = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
        config = L2MConfig(**given)
        made = described["backbone"]
        tiny = "tiny" in made
        backbone = (
            tiny_backbone(**made["tiny"])
            if tiny
            else load_backbone(source or made["source"], config.depth, dtype=dtype)
        )
        lora, marked = described["lora"], described["fingerprint"]
        if lora and not merged:
            add_lora(backbone, lora)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what was not trained is the same each time
            model = L2M(backbone, config)
    except (KeyError, TypeError) as error:
        raise IncompatibleError(f"{folder / 'config.json'} does not describe a memory model: {error}") from error
    weights = _weights(folder, described)
    if lora and merged:
        weights = _merge(weights, model, folder)
    _put(weights, model, folder)
    if fingerprint(backbone) != marked:
        raise IncompatibleError(
            f"{folder} was trained on backbone {marked}, this one is {fingerprint(backbone)}; give it the same weights"
        )
    return model.eval()


def put_weights(folder: Path, model: L2M) -> None:
    """Put what a checkpoint holds into a model of the same sizes that is to be trained on.

    Raises:
        L2MError: there is no checkpoint.
        IncompatibleError: a weight does not fit.
        CorruptError: a file cannot be read.
    """
    _put(_weights(folder, _described(folder)), model, folder)


def _weights(folder: Path, described: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    try:
        for number in range(described["shards"]):
            weights |= load_file(folder / f"weights-{number:02}.safetensors")
        told = described["parameters"]
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"the weights in {folder} cannot be read ({error})") from error
    except (KeyError, TypeError) as error:
        raise IncompatibleError(f"{folder / 'config.json'} does not describe a memory model: {error}") from error
    if len(weights) != told:
        raise CorruptError(f"{folder} holds {len(weights)} weights, its config.json says {told}")
    return weights


@torch.no_grad()
def _merge(weights: dict[str, torch.Tensor], model: L2M, folder: Path) -> dict[str, torch.Tensor]:
    """Add adapters into the layers they stand beside: W + 2 B A, as `add_lora` scales them; give the other weights."""
    own = dict(model.named_parameters())
    rest = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name in weights:
        if ".lora_A." not in name:
            continue
        base, down, up = name.split(".lora_A.")[0] + ".weight", weights[name], weights.get(name.replace("_A.", "_B."))
        if base not in own or up is None or own[base].shape != (up.shape[0], down.shape[1]):
            raise IncompatibleError(f"{folder}: adapter {name} fits no layer of the model")
        own[base].copy_(own[base].float() + 2 * up.float() @ down.float())
    return rest


@torch.no_grad()
def _put(weights: dict[str, torch.Tensor], model: L2M, folder: Path) -> None:
    own = dict(model.named_parameters())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            here = tuple(own[name].shape) if name in own else "none"
            raise IncompatibleError(f"{folder}: weight {name} is {tuple(weight.shape)}, the model takes {here}")
    for name, weight in weights.items():
        own[name].copy_(weight)


# -- states ------------------------------------------------------------------------------------------------------------
_FIELDS = ("slots", "window", "gist", "position", "step")


def save_state(state: State, model: L2M, path: Path) -> None:
    """Write the state of streams, so that a text is read once and can be asked at any time.

    Raises:
        CorruptError: the state holds numbers that are none.
    """
    _check_finite(state, "the state")
    tensors = {name: getattr(state, name) for name in _FIELDS}
    tensors |= {f"records.{name}": part for name, part in zip(Records._fields, state.records, strict=True)}
    if state.window_real is not None:
        tensors["window_real"] = state.window_real
    told = {"format": FORMAT, "streams": state.streams, "model": _model_mark(model)}
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        whole = {name: part.detach().cpu().contiguous() for name, part in tensors.items()}
        save_file(whole, scratch, metadata={"state": json.dumps(told)})
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_state(path: Path, model: L2M) -> State:
    """Load the state of streams onto a model's device.

    Raises:
        L2MError: there is no such file.
        IncompatibleError: another model made it.
        CorruptError: it cannot be read, or holds numbers that are none.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device=str(model.backbone.device)) as stored:
            told = json.loads((stored.metadata() or {})["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no mapping
    except FileNotFoundError:
        raise L2MError(f"there is no state {path}") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CorruptError(f"the state {path} cannot be read ({error}); read the text again") from error
    if told.get("format") != FORMAT or told.get("model") != _model_mark(model):
        raise IncompatibleError(f"the state {path} was made by another model; read the text again with this one")
    records = Records(*(tensors[f"records.{name}"] for name in Records._fields))
    with torch.no_grad():
        plan: Plan = model.router(
            tensors["gist"], tensors["slots"], records.occupancy, torch.zeros_like(tensors["gist"]), 0
        )
    state = State(
        tensors["slots"], records, tensors["window"], tensors.get("window_real"), tensors["gist"], tensors["position"],
        plan, tensors["step"], tuple(told["streams"]),
    )  # fmt: skip
    _check_finite(state, f"the state {path}")
    return state


def _check_finite(state: State, name: str) -> None:
    for part in (state.slots, state.window, state.gist, state.records.values, state.records.keys):
        if not bool(torch.isfinite(part).all()):
            raise CorruptError(f"{name} holds entries that are not numbers; go back to one from before, or read again")


def _model_mark(model: L2M) -> str:
    """Give a hash of everything that a state depends on: the sizes, the encoder half, key head and slots."""
    import hashlib

    digest = hashlib.sha256(json.dumps([asdict(model.config), fingerprint(model.backbone)]).encode())
    for weight in (model.router.key.weight, model.slots.initial, model.slots.value.weight):
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:24]
