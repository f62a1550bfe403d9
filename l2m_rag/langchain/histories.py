"""Conversations of the long-term tier as LangChain's message histories."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, message_to_dict, messages_from_dict

from l2m_rag.collection import Collection
from l2m_rag.collection import open as open_collection
from l2m_rag.config import Settings
from l2m_rag.conversation import COLLECTION, WHOLE, Conversation, Said
from l2m_rag.errors import UsageError
from l2m_rag.langchain.documents import given


class L2MChatMessageHistory(BaseChatMessageHistory):
    """The messages of one conversation, kept in a collection of the long-term tier.

    Every message is a text of its own, so that `recall` finds it by meaning and words among all that were ever said,
    and several programs can write to one conversation. What one conversation holds is never seen from another.

    Setup:
        pip install 'l2m-rag[langchain]'

    Key init args:
        session: name of the conversation, any text that is not empty.
        collection: name of the collection that holds conversations, or a `Collection`.
        last: how many messages `messages` gives at most, the newest; None for all.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import L2MChatMessageHistory

            history = L2MChatMessageHistory("ada", last=20)

    Write:
        .. code-block:: python

            history.add_user_message("My sister Rosa has moved to Porto.")
            history.add_ai_message("I will keep that in mind.")

    Read:
        .. code-block:: python

            history.messages  # the last 20, oldest first

    Recall:
        .. code-block:: python

            history.recall("Where does Rosa live?", k=3)  # documents with `said_at` in their metadata
            history.recall("Where does Rosa live?", k=3, around=1)  # what was said before and behind it, too

    Forget:
        .. code-block:: python

            history.forget([document.id])
            history.clear()
    """

    def __init__(
        self,
        session: str,
        collection: str | Collection = COLLECTION,
        *,
        last: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        if last is not None and last < 1:
            raise UsageError(f"last ({last}) must be at least 1")
        self.session = session
        self.last = last
        self.collection = open_collection(collection, settings=settings) if isinstance(collection, str) else collection
        self._conversation = Conversation(session, self.collection)

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # a plain attribute there, read only here
        """The messages as they were added, oldest first."""
        texts = self._conversation.texts()
        kept = texts if self.last is None else texts[-self.last :]
        return messages_from_dict([text.metadata[WHOLE] for text in kept])

    def add_messages(self, messages: Sequence[BaseMessage], at: float | None = None) -> None:
        """Add messages behind those that are there, on the disk when this is over.

        Args:
            messages: who speaks is found with what is said: the name of a message, or its type where it has none.
            at: when they were said, in seconds since 1970, for a conversation of another time; None for now. Messages
                stand in the order of time, and those of one time in the order in which they were added.

        Raises:
            UsageError: a message holds what JSON cannot, or there is no such time; none was added.
            LockedError: another process is writing to the collection, and went on for half a minute.
        """
        said = [Said(one.type, str(one.text), one.name or "", message_to_dict(one)) for one in messages]
        self._conversation.add(said, at)

    def recall(self, query: str, k: int = 4, around: int = 0) -> list[Document]:
        """Give the messages of this conversation that fit a text best, best first, with when they were said.

        Args:
            query: what to look for.
            k: most messages that are found.
            around: messages before and behind each that are given with it, a line each that begins with its day, and
                with the days that "yesterday" and its like stand for; for them the whole conversation is read.
        """
        found = [given(text) for text in self._conversation.recall(query, k, around)]
        for document in found:
            document.metadata.pop(WHOLE, None)
        return found

    def forget(self, ids: Sequence[str]) -> list[str]:
        """Delete messages of this conversation by id; give the ids of those that were there."""
        return [text.id for text in self._conversation.forget(ids)]

    def clear(self) -> None:
        """Delete all messages of this conversation."""
        self._conversation.clear()
