"""Days behind relative words: right ones, nothing lost, and nothing written where words mean something else."""

from __future__ import annotations

import re
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2m_rag.days import day, written_out

MONDAY = date(2023, 5, 8)
PHRASES = (
    *("yesterday", "today", "tomorrow", "last night", "two days ago", "3 weeks ago", "a month ago", "ten years ago"),
    *("last week", "next month", "this year", "last Friday", "last June", "the day before yesterday"),
    *("half", "May", "["),
)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("I met Rosa yesterday.", "7 May 2023"),
        ("The day before yesterday", "6 May 2023"),
        ("She comes the day after tomorrow", "10 May 2023"),
        ("We dine tonight", "8 May 2023"),
        ("I slept badly last night", "7 May 2023"),
        ("Three days ago", "5 May 2023"),
        ("8 days ago", "30 April 2023"),
        ("a couple of days ago", "6 May 2023"),
        ("two weeks ago", "2 weeks before 8 May 2023"),
        ("a week ago", "the week before 8 May 2023"),
        ("five months ago", "December 2022"),
        ("two years ago today", "2021"),
        ("seventeen or 17 months ago", "December 2021"),
        ("eleven years ago", "2012"),
        ("last week", "the week before 8 May 2023"),
        ("this past weekend", "the weekend before 8 May 2023"),
        ("this week", "the week of 8 May 2023"),
        ("next  weekend", "the weekend after 8 May 2023"),
        ("last month", "April 2023"),
        ("next month", "June 2023"),
        ("this month", "May 2023"),
        ("last year", "2022"),
        ("last Friday", "5 May 2023"),
        ("last Monday", "1 May 2023"),
        ("last May", "May 2022"),
        ("last April", "April 2023"),
        ("last December", "December 2022"),
    ],
)
def test_what_a_phrase_stands_for_is_written_behind_it(said: str, means: str) -> None:
    written = written_out(f"{said}, she said", MONDAY)
    assert re.findall(r"\[(.*?)\]", written) == [means]
    assert written.startswith(said.rstrip(".") + " [")
    assert re.sub(r" \[.*?\]", "", written) == f"{said}, she said"


@pytest.mark.parametrize(
    "said",
    [
        *("Today's world", "yesterday\u2019s news", "at last May came", "the last week of July", "over the last year"),
        *("twenty two years ago", "twenty-two years ago", "1.5 years ago", "1,200 years ago", "over a year ago today"),
        *("half a year ago", "next Friday", "last summer", "recently", "the other day", "2000 years ago"),
        *("yesterday (7 May 2023)", "tomorrow [9 May 2023]", "yesterdays", "a year-ago figure", ""),
    ],
)
def test_what_means_something_else_or_is_open_stays_as_it_is(said: str) -> None:
    assert written_out(said, MONDAY) == said


@settings(deadline=None)
@given(st.lists(st.sampled_from(PHRASES) | st.text(max_size=8), max_size=12), st.dates())
def test_nothing_is_lost_and_nothing_is_written_twice(words: list[str], on: date) -> None:
    text = " ".join(words)
    written = written_out(text, on)
    rest = iter(written)
    assert all(letter in rest for letter in text)  # in order, with something between at most
    assert written_out(written, on) == written


def test_a_day_there_is_not_is_not_written() -> None:
    assert written_out("yesterday, 3 years ago, last month", date(1, 1, 1)) == "yesterday, 3 years ago, last month"
    assert written_out("tomorrow and next year", date(9999, 12, 31)) == "tomorrow and next year"
    assert day(date(33, 4, 3)) == "3 April 33"
