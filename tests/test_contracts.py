"""Questions about contracts: what is asked of a passage stands in it, or nowhere near it."""

from typing import Any

from l2m_rag.contracts import contracts, plain

TEXT = (
    "SUPPLY AGREEMENT. This agreement is made on the 3rd day of May, 2011, between Mill Ltd. and Bakers Inc. "
    "The Bakers may stop the renewal upon sixty (60) days notice. It is governed by the laws of Ontario."
)
LAW = "It is governed by the laws of Ontario."


class Sentences:
    """A tokenizer for which a sentence has a hundred tokens, so that a chunk has two of them."""

    def spans(self, texts: Any) -> list[list[tuple[int, int]]]:
        return [[(at * len(text) // 100, (at + 1) * len(text) // 100) for at in range(100)] for text in texts]


def clause(category: str, question: str, answer: str, short: str) -> dict[str, Any]:
    there = [answer] if answer else []
    return {
        "id": category, "doc_id": "d", "category": category, "question": question,
        "answers": there, "answer_starts": [TEXT.index(one) for one in there], "short_answer": short,
    }  # fmt: skip


CLAUSES = [
    clause(*rest)
    for rest in (
        ("Document Name", "The name of the contract", "SUPPLY AGREEMENT", "Supply"),
        ("Agreement Date", "The date of the contract", "3rd day of May, 2011", "5/3/11"),
        (
            "Notice Period To Terminate Renewal", "What is the notice period?",
            "The Bakers may stop the renewal upon sixty (60) days notice.", "60 days",
        ),
        ("Governing Law", "Which state's law governs?", LAW, "Ontario, Canada"),
        ("Insurance", "Is there a requirement for insurance?", "", "No"),
        ("Warranty Duration", "What is the duration of any warranty?", "", "No"),
    )
]  # fmt: skip


def asked() -> list[tuple[str, str, str]]:
    return list(contracts([{"doc_id": "d", "context": TEXT}], CLAUSES, Sentences()))


def test_a_passage_is_asked_for_what_stands_in_it_and_for_what_does_not() -> None:
    made = asked()
    assert made
    assert all(passage in TEXT and answer in passage for passage, _, answer in made)
    found = {(question, answer) for _, question, answer in made}
    assert ("The name of the contract", "SUPPLY AGREEMENT") in found
    assert ("Which state's law governs?", LAW) in found
    assert ("Is there a requirement for insurance?", "") in found
    for passage, question, answer in made:
        assert question != "Which state's law governs?" or (answer != "") == (LAW in passage)
        # what may be read of any passage is never said not to be there
        assert answer or question not in ("The name of the contract", "The date of the contract"), passage


def test_plain_questions_ask_for_what_the_lawyers_wrote_down() -> None:
    found = {(question, answer) for _, question, answer in asked()}
    assert ("Which law governs the contract?", "Ontario") in found
    assert ("How much notice is needed to stop the renewal?", "sixty (60) days") in found
    assert ("When was the agreement signed?", "3rd day of May, 2011") in found
    assert found >= {pair for row in CLAUSES for pair in plain(row)}
    assert ("How long is the warranty?", "") in found


def test_nothing_plain_is_asked_where_the_words_of_the_answer_are_not_known() -> None:
    assert list(plain(clause("Governing Law", "Which state's law governs?", LAW, "Canada"))) == []
    assert list(plain(clause("Document Name", "The name of the contract", "", ""))) == []
