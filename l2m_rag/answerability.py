"""The probability that the passages hold an answer: logistic regression, fitted by `l2m eval calibrate`."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from importlib import resources
from pathlib import Path

from l2m_rag.errors import CorruptError

_KEYS = ("weights", "prior")


def probability(weights: dict[str, float], features: dict[str, float]) -> float:
    """Give 1 / (1 + exp(-z)), z the weighted sum of the features and the bias; a feature without weight is left out."""
    z = weights["bias"] + sum(weight * features[name] for name, weight in weights.items() if name != "bias")
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, z))))


@lru_cache(maxsize=1)
def untrained() -> dict[str, float]:
    """Give the weights for a language model that was not trained to say when there is no answer."""
    weights: dict[str, float] = json.loads(
        resources.files("l2m_rag").joinpath("data/answerability.json").read_text(encoding="utf-8")
    )["weights"]
    return weights


def load(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Read weights that `l2m eval calibrate` wrote.

    Returns:
        Those of the probability that a passage holds an answer once it was read, and those of the same before it was.

    Raises:
        CorruptError: they cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        weights, prior = [{str(name): float(weight) for name, weight in found[key].items()} for key in _KEYS]
        return weights, prior
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"{path} cannot be read ({error}); restore it, or delete it and run: l2m eval calibrate {path}"
        ) from error
