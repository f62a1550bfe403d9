"""Memory for LangChain agents (extra `langgraph`): what was said before is told to the model, what is said is kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.runnables import run_in_executor

from l2m_rag.collection import Collection
from l2m_rag.collection import open as open_collection
from l2m_rag.config import Settings
from l2m_rag.conversation import COLLECTION, Conversation, Said
from l2m_rag.errors import MissingExtraError, UsageError
from l2m_rag.langchain.messages import remembering, said

try:
    from langchain.agents import AgentState
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
    from langgraph.runtime import Runtime
except ImportError:
    raise MissingExtraError("langchain", "langgraph") from None


class L2MMemoryMiddleware(AgentMiddleware[AgentState[Any], Any, Any]):
    """Lets an agent remember a user from one conversation to the next.

    Before the model is called, what was ever said that fits the user's message best is told to it in the message of the
    system, each with its day. When the agent is done, what the user said and the answer are kept. What one user said is
    never told to another.

    Setup:
        pip install 'l2m-rag[langchain,langgraph]'

    Key init args:
        user: whose conversations; or a function that gives it for a run, as `lambda runtime: runtime.context["user"]`.
        collection: name of the collection that conversations lie in, or a `Collection`.
        k: how much is told at most.

    Instantiate:
        .. code-block:: python

            from langchain.agents import create_agent
            from l2m_rag.langchain import ChatL2M, L2MMemoryMiddleware

            agent = create_agent(ChatL2M(), middleware=[L2MMemoryMiddleware("ada")])

    Use:
        .. code-block:: python

            agent.invoke({"messages": [("user", "My sister Rosa lives in Porto.")]})
            agent.invoke({"messages": [("user", "In which city does Rosa live?")]})  # months later, in a new thread
    """

    def __init__(
        self,
        user: str | Callable[[Any], str],
        collection: str | Collection = COLLECTION,
        *,
        k: int = 4,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        if not callable(user) and (not isinstance(user, str) or not user):
            raise UsageError(f"user ({user!r}) must be a string that is not empty, or a function that gives one")
        if k < 1:
            raise UsageError(f"k ({k}) must be at least 1")
        self._user = user
        self._k = k
        self.collection = open_collection(collection, settings=settings) if isinstance(collection, str) else collection

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Tell the model what was said before."""
        return handler(self._told(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Tell the model what was said before."""
        return await handler(await run_in_executor(None, self._told, request))

    def after_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> None:
        """Keep what the user said last, and the answer."""
        messages = state["messages"]
        asked = next((one for one in reversed(messages) if isinstance(one, HumanMessage)), None)
        answer = next((one for one in reversed(messages) if isinstance(one, AIMessage)), None)
        turn = [Said("human", said(asked))] if asked is not None else []
        turn += [Said("ai", said(answer))] if answer is not None and said(answer) else []
        if turn:
            self._conversation(runtime).add(turn)

    async def aafter_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> None:
        """Keep what the user said last, and the answer."""
        await run_in_executor(None, self.after_agent, state, runtime)

    def _told(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        asked = next((said(one) for one in reversed(request.messages) if isinstance(one, HumanMessage)), "")
        if not any(letter.isalnum() for letter in asked):
            return request
        found = self._conversation(request.runtime).recall(asked, self._k)
        if not found:
            return request
        before = [] if request.system_message is None else request.system_message.content_blocks
        told = {"type": "text", "text": remembering(sorted(found, key=lambda text: text.id))}
        blocks: list[Any] = [*before, told]
        return request.override(system_message=SystemMessage(content=blocks))

    def _conversation(self, runtime: Any) -> Conversation:
        return Conversation(self._user(runtime) if callable(self._user) else self._user, self.collection)
