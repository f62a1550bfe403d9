"""Days that words like "yesterday" stand for, written behind them: what is read alone keeps its time.

English only. What a phrase leaves open stays open: "last week" becomes a week before a day, not a range of days, and
phrases that people use in two ways ("next Friday", "last summer") are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, timedelta
from functools import partial

_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_COUNT = rf"(?P<count>[0-9]{{1,3}}|a|a couple of|{'|'.join(_NUMBERS)})"
_BEYOND = {"last": (-1, "before"), "this past": (-1, "before"), "next": (1, "after")}
_FROM_HERE = {"day before yesterday": -2, "yesterday": -1, "last night": -1, "tomorrow": 1, "day after tomorrow": 2}


def written_out(text: str, on: date) -> str:
    """Write the days that relative words stand for behind them, in square brackets, as editors do.

    Args:
        text: what was said, or written before.
        on: the day on which it was said.

    Returns:
        The text with every word of its own; "I met Rosa yesterday." of 8 May 2023 becomes "I met Rosa yesterday
        [7 May 2023].". A phrase that has a day in brackets behind it stays as it is.
    """
    for pattern, meaning in _PHRASES:
        text = pattern.sub(partial(_behind, meaning=meaning, on=on), text)
    return text


def day(on: date) -> str:
    """Write a day as "8 May 2023"."""
    return f"{on.day} {_month(on, 0)}"


def _behind(match: re.Match[str], meaning: Callable[[re.Match[str], date], str], on: date) -> str:
    try:
        return f"{match[0]} [{meaning(match, on)}]"
    except (OverflowError, ValueError):  # before the year 1 or after 9999
        return match[0]


# -- what phrases stand for --------------------------------------------------------------------------------------------
def _near(match: re.Match[str], on: date) -> str:
    return day(on + timedelta(_FROM_HERE.get(_plain(match[0]), 0)))


def _ago(match: re.Match[str], on: date) -> str:
    word, unit = _plain(match["count"]), match["unit"].lower()
    count = {"a": 1, "a couple of": 2}.get(word) or _number(word)
    if unit == "day":
        return day(on - timedelta(count))
    if unit == "month":
        return _month(on, -count)
    if unit == "year":
        return str(_year(on.year - count))
    return f"{count} {unit}s before {day(on)}" if count > 1 else f"the {unit} before {day(on)}"


def _beyond(match: re.Match[str], on: date) -> str:
    unit = match["unit"].lower()
    step, where = _BEYOND.get(_plain(match["which"]), (0, "of"))
    if unit == "month":
        return _month(on, step)
    if unit == "year":
        return str(_year(on.year + step))
    return f"the {unit} {where} {day(on)}"


def _last_day(match: re.Match[str], on: date) -> str:
    back = (on.weekday() - _DAYS.index(match["name"].lower())) % 7
    return day(on - timedelta(back or 7))


def _last_month(match: re.Match[str], on: date) -> str:
    back = (on.month - 1 - _MONTHS.index(match["name"].lower())) % 12
    return _month(on, -(back or 12))


def _month(on: date, step: int) -> str:
    years, month = divmod(on.month - 1 + step, 12)
    return f"{_MONTHS[month].capitalize()} {_year(on.year + years)}"


def _year(year: int) -> int:
    return date(year, 1, 1).year  # raises ValueError for one that there is not


def _number(word: str) -> int:
    return int(word) if word.isdigit() else _NUMBERS.index(word) + 1


def _plain(words: str) -> str:
    return " ".join(words.lower().split())


def _phrase(pattern: str, but_not_after: str = "") -> re.Pattern[str]:
    """Compile words of a phrase: whole ones, with no day in brackets, possessive or hyphen behind them.

    Args:
        pattern: for it.
        but_not_after: what makes another phrase of it when it stands before; "_" is a space.
    """
    before = "".join(f"(?<!{re.escape(one.replace('_', ' '))})" for one in but_not_after.split())
    words = pattern.replace(" ", r"\s+")
    dated = r"\s*[\[(](?:[0-9]|the |\w+ [0-9])"
    return re.compile(rf"\b{before}{words}\b(?!{dated}|['\u2019]s?\b|-)", re.IGNORECASE)


_NOT_ALONE = "the_ my_ our_ your_ his_ her_ its_ their_ every_ at_"
"""Before "last week" and its like: "the last week of July", "at last May came"."""
_NOT_COUNTED = ". , - / ty_ hundred_and_ half_ over_ than_ about_ around_ almost_ nearly_ least_"
"""Before "two years ago": "1.5 years", "twenty two", "over two"."""
_PHRASES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], date], str]], ...] = (
    (_phrase(rf"{_COUNT} (?P<unit>day|week|weekend|month|year)s? ago(?: today)?+", _NOT_COUNTED), _ago),
    (_phrase("(?:day before yesterday|day after tomorrow)"), _near),
    (_phrase("(?:yesterday|tomorrow)"), _near),
    (_phrase("(?:last night|tonight|today|this (?:morning|afternoon|evening))", "ago_ the_"), _near),
    (_phrase("(?P<which>last|this past|this|next) (?P<unit>week|weekend|month|year)", _NOT_ALONE), _beyond),
    (_phrase(rf"last (?P<name>{'|'.join(_DAYS)})", _NOT_ALONE), _last_day),
    (_phrase(rf"last (?P<name>{'|'.join(_MONTHS)})", _NOT_ALONE), _last_month),
)
