"""How often ChatL2M calls the tool that a message wants, and how often with the arguments that it should.

pip install -e '.[langchain]'
python benchmarks/tool_choice.py

The messages were written before the first run, and nothing was changed after it.
"""

from __future__ import annotations

from typing import Any

from langchain_core.tools import BaseTool, tool

import l2m_rag
from l2m_rag.config import load_settings
from l2m_rag.langchain import ChatL2M, L2MToolkit

Case = tuple[str, str | None, dict[str, Any] | None]
CASES: list[Case] = [
    ("Who pays for repairs of the roof?", "ask_documents", None),
    ("What notice period does the contract name?", "ask_documents", None),
    ("Is smoking allowed according to the documents?", "ask_documents", None),
    ("Which passages mention the deposit?", "search_documents", None),
    ("Search for clauses on insurance.", "search_documents", None),
    ("Find the passages that speak of parking.", "search_documents", None),
    ("Read the document house-rules.pdf.", "read_document", {"document": "house-rules.pdf"}),
    ("Show me the text of annex.docx", "read_document", {"document": "annex.docx"}),
    ("Remember that I moved to Lyon in June.", "remember", {"fact": "I moved to Lyon in June"}),
    ("Remember: my dog is called Bruno.", "remember", {"fact": "my dog is called Bruno"}),
    ("Keep in mind that I work at night.", "remember", {"fact": "I work at night"}),
    ("What is my dog called?", "recall", None),
    ("Do you recall where I moved?", "recall", None),
    ("What did I tell you about my job?", "recall", None),
    ("Forget what I said about my dog.", "forget", None),
    ("Delete everything you know about my job.", "forget", None),
    ("What is the weather in Lyon?", "get_weather", {"city": "Lyon"}),
    ("Do I need an umbrella in Oslo today?", "get_weather", {"city": "Oslo"}),
    ("Weather forecast for Cape Town, please", "get_weather", {"city": "Cape Town"}),
    ("Multiply 17 by 23.", "multiply", {"a": 17, "b": 23}),
    ("What is 6 times 7?", "multiply", {"a": 6, "b": 7}),
    ("How much is 12 x 12?", "multiply", {"a": 12, "b": 12}),
    ("Send an e-mail to Rosa: dinner is at eight.", "send_email", {"to": "Rosa", "text": "dinner is at eight"}),
    ("Write an email to bob@example.org saying thanks", "send_email", {"to": "bob@example.org", "text": "thanks"}),
    ("Convert 30 dollars to euros.", "convert_currency", {"amount": 30}),
    ("How many yen are 50 pounds?", "convert_currency", {"amount": 50}),
    ("Hello there!", None, None),
    ("Good evening.", None, None),
    ("Thank you, that was helpful.", None, None),
    ("Goodbye.", None, None),
]


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return city


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


@tool
def send_email(to: str, text: str) -> str:
    """Send an e-mail to someone."""
    return f"{to}: {text}"


@tool
def convert_currency(amount: int) -> int:
    """Convert an amount of money from one currency to another."""
    return amount


def main() -> None:
    settings = load_settings()[0]
    kit = L2MToolkit(collection=l2m_rag.open("none", settings=settings))
    tools: list[BaseTool] = [*kit.get_tools(), get_weather, multiply, send_email, convert_currency]
    chat = ChatL2M(settings=settings, max_tokens=16).bind_tools(tools)
    right = filled = asked = 0
    for message, name, arguments in CASES:
        calls = chat.invoke(message).tool_calls
        called = calls[0]["name"] if calls else None
        right += called == name
        if called == name and arguments is not None:
            asked += 1
            filled += calls[0]["args"] == arguments
            if calls[0]["args"] != arguments:
                print(f"  {message!r}: {calls[0]['args']}, not {arguments}")
        elif called != name:
            print(f"  {message!r}: {called}, not {name}")
    print(f"the tool of {len(tools)}: {right} of {len(CASES)}; its arguments, where it was right: {filled} of {asked}")


if __name__ == "__main__":
    main()
