"""The embedder in bf16 through torch, beside its int8 ONNX export through onnxruntime.

    pip install 'l2m-rag[onnx,eval]'
    python benchmarks/onnx_int8.py --texts 2000

Speed is that of whole passages, sorted by length, in turn and several rounds; cosines are against fp32, re-normalised;
recall is that of a question's own paragraph among the passages of the set `xquad`, by exact search. The result decided
which of the two the library uses (docs/decisions/0002-embedder-precision.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from sentence_transformers import SentenceTransformer

from l2m_rag import weights
from l2m_rag.config import load_settings
from l2m_rag.evaluate import sample
from l2m_rag.indexers.embedding import Embedder
from l2m_rag.tasks import data_folder, load_set

Encode = Callable[[Sequence[str]], np.ndarray[Any, Any]]
BATCH = 32


def export(model: SentenceTransformer, folder: Path) -> Path:
    """Write the transformer (without pooling) as an ONNX file and quantise its weights to int8."""
    transformer = model[0].auto_model.eval().float()
    example = model.tokenizer(["an example", "another, longer example"], padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    whole, small = folder / "fp32.onnx", folder / "int8.onnx"

    class Hidden(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            found = transformer(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            return found.last_hidden_state

    batch, length = torch.export.Dim("batch", min=1, max=512), torch.export.Dim("length", min=2, max=512)
    torch.onnx.export(
        Hidden(),
        tuple(example[name] for name in names),
        str(whole),
        input_names=names,
        dynamo=True,
        dynamic_shapes=[{0: batch, 1: length}] * 3,
        external_data=False,
    )
    quantize_dynamic(str(whole), str(small), weight_type=QuantType.QInt8, per_channel=True)
    return small


def onnx_encoder(file: Path, model: SentenceTransformer, threads: int) -> Encode:
    """Give a function that embeds with the ONNX file: the same tokenizer, mean pooling, unit length."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    tokenizer, longest = model.tokenizer, int(model.max_seq_length or 256)

    def encode(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        vectors = np.zeros((len(texts), 384), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            tokens = tokenizer(
                [texts[row] for row in part], padding=True, truncation=True, max_length=longest, return_tensors="np"
            )
            (hidden,) = session.run(None, {name: value.astype(np.int64) for name, value in tokens.items()})
            mask = tokens["attention_mask"][..., None].astype(np.float32)
            vectors[part] = (hidden * mask).sum(1) / mask.sum(1)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    return encode


def recall(passages: np.ndarray[Any, Any], questions: np.ndarray[Any, Any], gold: Sequence[int], k: int) -> float:
    """Give the share of questions whose passage is among the k nearest."""
    best = np.argsort(-(questions @ passages.T), axis=1)[:, :k]
    return float(np.mean([right in row for right, row in zip(gold, best, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000, help="passages that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recall", action="store_true", help="embed all passages and questions for the recall too")
    args = parser.parse_args()
    settings = load_settings()[0]
    source = str(weights.find(weights.DEFAULT_EMBEDDER, settings))
    tasks = load_set("xquad", data_folder())
    texts = list(tasks.documents.values())
    fp32 = SentenceTransformer(source, device="cpu")
    ours = Embedder(source, name="ours")
    with tempfile.TemporaryDirectory() as scratch:
        int8 = onnx_encoder(
            export(SentenceTransformer(source, device="cpu"), Path(scratch)), fp32, torch.get_num_threads()
        )
        ways: dict[str, Encode] = {
            "fp32 (sentence-transformers)": lambda some: fp32.encode(list(some), normalize_embeddings=True),
            f"{ours.dtype} (l2m-rag)": ours.encode,
            "int8 (onnxruntime)": int8,
        }
        timed = list(np.random.default_rng(0).permutation(texts)[: args.texts])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        vectors = {}
        for _ in range(args.rounds):
            for name, encode in ways.items():
                encode(timed[:8])
                began = time.perf_counter()
                vectors[name] = encode(timed)
                seconds[name].append(time.perf_counter() - began)
        base = vectors["fp32 (sentence-transformers)"]
        for name, spent in seconds.items():
            cosine = (vectors[name] * base).sum(1)
            row = {
                "embedder": name,
                "passages_per_s": round(args.texts / statistics.median(spent), 1),
                "mean_cosine": round(float(cosine.mean()), 5),
                "lowest_cosine": round(float(cosine.min()), 5),
            }
            if args.recall:
                ids = list(tasks.documents)
                chosen = sample(tasks.tasks, None)
                gold = [ids.index(task.document) for task in chosen]
                all_passages, asked = ways[name](texts), ways[name]([task.question for task in chosen])
                row["recall_1"] = round(recall(all_passages, asked, gold, 1), 4)
                row["recall_5"] = round(recall(all_passages, asked, gold, 5), 4)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
