"""What it would save to keep a conversation's turns as states, compressed, beside their text.

pip install -e '.[eval,langchain,train]'
python benchmarks/turn_states.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversation_sets import line, locomo

from l2m_rag.config import load_settings
from l2m_rag.memory_tiers.compressor import quantise, restore
from l2m_rag.memory_tiers.state_table import StateFormat, StateRows
from l2m_rag.memory_tiers.states import StateTier
from l2m_rag.models import load_language_model
from l2m_rag.reader import MemoryReader

KEY = 8  # width of keys; nothing is searched here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    reader = load_language_model(load_settings({"threads": options.threads})[0])
    assert isinstance(reader, MemoryReader)
    talk = next(iter(locomo(options.data)))
    lines = [line(turn) for turn in talk.turns]
    tokens = [reader.ids(one) for one in lines]

    @torch.inference_mode()
    def made(ids: list[int]) -> torch.Tensor:
        return reader.model.backbone.lower(torch.tensor([ids]))[0]

    made(tokens[0])
    states, encoding = timed(made, tokens)
    longest = max(len(one) for one in tokens)
    width = states[0].shape[1]
    form = StateFormat(
        key_dim=KEY, dim=width, vectors=longest, ratio=1, dtype="int8", backbone="-", depth=10, key_version="-"
    )
    with tempfile.TemporaryDirectory() as folder:
        with StateTier(form, Path(folder)) as tier:
            rows = [int(tier.add(record(number, one, form))[0]) for number, one in enumerate(states)]
            tier.flush()
            on_disk = tier.nbytes
        with StateTier(form, Path(folder), hot_bytes=0) as tier:

            def read(row: int) -> torch.Tensor:
                found = tier.fetch(np.array([row]))
                return restore(torch.from_numpy(found.values[0]), torch.from_numpy(found.scales[0]), states[0].dtype)

            read(rows[0])
            back, reading = timed(read, rows)
    off = [float((one - two[: len(one)]).norm() / one.norm()) for one, two in zip(states, back, strict=True)]
    question = talk.questions[0].text
    asking = []
    for first in range(0, 80, 8):
        eight = lines[first : first + 8]
        reader.forget()
        for wanted in ("made", "kept"):
            begun = time.perf_counter()
            for one in eight:
                reader.quote(question, [one])
            asking.append((wanted, time.perf_counter() - begun))
    print(f"{len(lines)} turns of {statistics.mean(map(len, tokens)):.0f} tokens (median of times):")
    print(f"states made again from the text   {encoding:6.2f} ms a turn")
    size = on_disk / len(lines) / 1024
    print(f"states read from the disk, int8   {reading:6.2f} ms a turn, {size:.1f} KB, off by {np.mean(off):.4f}")
    for wanted in ("made", "kept"):
        middle = statistics.median(seconds for name, seconds in asking if name == wanted)
        print(f"a question over eight turns, states {wanted}: {1000 * middle:.0f} ms")
    print(f"text of a turn: {statistics.mean(len(one.encode()) for one in lines):.0f} bytes")


def timed(work: Callable[[Any], torch.Tensor], over: Iterable[Any]) -> tuple[list[torch.Tensor], float]:
    """Give what work makes of each, and the median of its milliseconds."""
    made, times = [], []
    for one in over:
        begun = time.perf_counter()
        made.append(work(one))
        times.append(1000 * (time.perf_counter() - begun))
    return made, statistics.median(times)


def record(number: int, states: torch.Tensor, form: StateFormat) -> StateRows:
    """Give a turn's states as a record of the tier, in int8."""
    values, scales = quantise(states)
    length = len(states)
    key = np.zeros((1, KEY), dtype=np.float16)
    key[0, number % KEY] = 1
    filled = np.zeros((1, form.vectors, form.dim), dtype=np.int8)
    filled[0, :length] = values.numpy()
    scaled = np.zeros((1, form.vectors), dtype=np.float32)
    scaled[0, :length] = scales.numpy()
    where = np.array([number], dtype=np.int64)
    return StateRows(("talk",), where, where * 1000, np.array([length], dtype=np.int32), key, filled, scaled, ())


if __name__ == "__main__":
    main()
