"""How far two answers share their words, and the answer that is to be expected to share most with the right one."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normal(text: str) -> str:
    """Normalise an answer as SQuAD's evaluation does: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def token_f1(answer: str, gold: str) -> float:
    """Give the F1 of the words of two answers, after SQuAD's normalisation."""
    one, other = normal(answer).split(), normal(gold).split()
    if not one or not other:
        return float(one == other)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other))


def by_expected_f1(scores: Mapping[str, float]) -> list[str]:
    """Order answers by the F1 that is to be expected of each, highest first.

    This is minimum Bayes risk decoding over a list of the best (Kumar and Byrne, 2004): each answer is compared with
    all of them, weighed by how likely they are. Several that nearly agree win over one that is a little likelier alone.

    Args:
        scores: log-probability of each answer, natural logarithm, not normalised.
    """
    top = max(scores.values(), default=0.0)
    weights = {text: math.exp(score - top) for text, score in scores.items()}
    expected = {text: sum(weight * token_f1(text, other) for other, weight in weights.items()) for text in scores}
    return sorted(scores, key=lambda text: (-expected[text], -scores[text]))
