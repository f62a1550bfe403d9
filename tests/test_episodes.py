"""Batches: repeatable, and with the evidence where they say it is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from l2m_rag.episodes import Batches, TaskRecipe
from l2m_rag.losses import IGNORED, Episode


class Letters:
    """A tokenizer of one id a character."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def spelled(ids: Any) -> str:
    return "".join(chr(one) for one in ids if one > 1)


def test_the_same_step_gives_the_same_batch() -> None:
    for task, tokenizer in ((TaskRecipe(), None), (TaskRecipe(kind="stories"), Letters())):
        one, other = (Batches(task, 4, 64, 7, tokenizer) for _ in range(2))
        assert all(map(torch.equal, one(3, 2), other(3, 2)))
        assert not torch.equal(one(3, 2).segments[:, 0], one(4, 2).segments[:, 0])


def test_associative_recall_holds_the_answer_behind_its_key() -> None:
    episode = Batches(TaskRecipe(pairs=6), 16, 8, 0)(0, 4)
    flat = episode.segments.flatten(1)
    for row in range(16):
        at = int((flat[row] == episode.question[row, 1]).nonzero())
        assert flat[row, at + 1] == episode.answer_out[row, 0]
        assert at // 8 == int(episode.gold[row, 0]) // 8
    assert torch.equal(episode.answer_in, episode.question[:, 1:])


@pytest.mark.parametrize("renamed", [0.0, 1.0])
def test_stories_are_laid_out_whole_with_their_support(renamed: float) -> None:
    episode = Batches(TaskRecipe(kind="stories", renamed=renamed, stories=("qa1", "qa2")), 8, 120, 3, Letters())(0, 9)
    assert episode.real.max() <= 120
    for row in range(8):
        text = spelled(
            token
            for segment, real in zip(episode.segments[row], episode.real[row], strict=True)
            for token in segment[:real]
        )
        assert text.endswith(".")
        for position in episode.gold[row].tolist():
            assert position < 0 or (text[position] == " " and text[position + 1].isupper())
        answer = [token for token in episode.answer_out[row].tolist() if token != IGNORED]
        assert answer[-1] == 1
        fed = episode.answer_in[row].tolist()
        first = next(at for at, token in enumerate(episode.answer_out[row].tolist()) if token != IGNORED)
        assert spelled(fed[: first + 1]) == "\nAnswer:"
        assert fed[first + 1 : first + len(answer)] == answer[:-1]
        assert spelled(episode.question[row][: episode.question_real[row]]).startswith("\nQuestion: Where")


def test_a_needle_stands_where_the_gold_says(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(
        "\n\n".join(
            f"Sentence number {at} of a book that is as long as it has to be, and no longer." for at in range(1500)
        )
    )
    task = TaskRecipe(kind="needle", noise=str(tmp_path), decoys=2)
    episode = Batches(task, 6, 200, 0, Letters())(0, 3)
    for row in range(6):
        text = spelled(
            token
            for segment, real in zip(episode.segments[row], episode.real[row], strict=True)
            for token in segment[:real]
        )
        at = int(episode.gold[row, 0])
        name = spelled(episode.question[row][: episode.question_real[row]]).removesuffix("?").split()[-1]
        answer = spelled(token for token in episode.answer_out[row].tolist() if token != IGNORED)
        assert text[at:].startswith(f" The pass key of {name} is{answer}.")


def test_episodes_move_whole() -> None:
    episode = Batches(TaskRecipe(), 2, 8, 0)(0, 2)
    assert isinstance(episode.to(torch.device("cpu")), Episode)
