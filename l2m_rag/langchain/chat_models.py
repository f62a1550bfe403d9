"""The chat model: replies, tool calls and JSON of the small model, and answers from passages with citations."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Self

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from l2m_rag import qa
from l2m_rag.collection import Collection
from l2m_rag.collection import open as open_collection
from l2m_rag.config import Settings, load_settings
from l2m_rag.constrained import Guide, is_asked, needed
from l2m_rag.errors import ModelError, UsageError
from l2m_rag.generate import Decoder
from l2m_rag.langchain.messages import Asked, asked, citation, documents_of, passages, told, turns, with_cosines
from l2m_rag.langchain.pieces import block, last, pieces_of, until, usage
from l2m_rag.langchain.tool_choice import choose
from l2m_rag.memory_tiers.records import Passage
from l2m_rag.models import closeness, load_language_model

_CALL = "{name}({parameters}): {description}\nFill in the arguments with words copied from the message."
_SHAPE = "Reply with JSON that this schema describes:\n{schema}"
_SHORT = 200  # characters of a tool's text up to which it is the answer as it stands
_COPIED = 256  # tokens of a message that the arguments of a call may be taken from
_RESULTS = 2000  # characters of what tools gave that the arguments of a next call may be taken from


class ChatL2M(BaseChatModel):
    """The model of this library as a chat model, on the CPU and offline.

    With `collection`, what the user said last is answered from its documents; behind a call of a tool, from what the
    tool gave. Such an answer is in the words of the passages, and its citations are the annotations of its text block.
    Everything else is written freely by a model of 135 million parameters: expect little of it.

    Tools are called once for each message of the user, then what they gave is answered from. The texts of a call's
    arguments are words of the conversation; arguments that may be left out are left out.

    Setup:
        pip install 'l2m-rag[langchain]'
        l2m models pull

    Key init args:
        model: as the setting `model`, which it is by default: "default", or the folder or hub id of a causal
            language model.
        collection: name of a collection whose documents answer, or a `Collection`; None for none.
        free: answer in the model's own words rather than in those of the documents.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn. Quotes are never drawn.
        max_tokens: tokens that a reply may have which the model writes by itself.
        stop: texts before which a reply ends.
        timeout: seconds after which a reply is given up.
        seed: of what is drawn.
        settings: as `l2m_rag.Settings`; by default those of the environment and of `l2m.toml`.

    Instantiate:
        .. code-block:: python

            from l2m_rag.langchain import ChatL2M

            chat = ChatL2M(collection="contracts")

    Invoke:
        .. code-block:: python

            message = chat.invoke("When does the lease end?")
            message.text  # "31 May 2027"
            message.content_blocks[0]["annotations"]  # citations: title, cited_text, where it stands

    Stream:
        .. code-block:: python

            for chunk in ChatL2M().stream("Hello"):
                print(chunk.text, end="")

    Tools:
        .. code-block:: python

            chat = ChatL2M().bind_tools(L2MToolkit(collection="contracts").get_tools())
            chat.invoke("When does the lease end?").tool_calls

    Structured output:
        .. code-block:: python

            class Person(BaseModel):
                name: str
                age: int

            ChatL2M().with_structured_output(Person).invoke("Ada is 36 years old.")
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    model_name: str = Field(default="", alias="model")
    collection: str | Collection | None = None
    free: bool = False
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=256, ge=1)
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    timeout: float | None = Field(default=None, gt=0)
    max_retries: int = 0
    """Taken as other chat models take it; what a local model cannot do it cannot do the second time."""
    api_key: SecretStr | None = None
    """Taken as other chat models take it; the setting `llm_key` is the token of an endpoint."""
    seed: int | None = None
    settings: Settings | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _open(self) -> Self:
        self.model_name = self.model_name or self._settings().model
        if isinstance(self.collection, str):
            self.collection = open_collection(self.collection, settings=self._settings())
        return self

    def _resolve_model_profile(self) -> ModelProfile:
        return {
            "text_inputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "tool_calling": True,
            "tool_choice": True,
            "structured_output": True,
        }

    @property
    def _llm_type(self) -> str:
        return "l2m"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        named = self.collection.name if isinstance(self.collection, Collection) else None
        return {"model": self.model_name, "collection": named, "temperature": self.temperature}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "l2m"
        params["ls_model_name"] = kwargs.get("model", self.model_name)
        return params

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Give this model with tools that it may call.

        Args:
            tools: as LangChain and OpenAI describe them.
            tool_choice: "auto", "none", "any" (also "required" or True), or the name of a tool.
            kwargs: bound as well; `strict` and `parallel_tool_calls` change nothing: calls always fit, one at a time.

        Raises:
            UsageError: there is no tool of that name.
        """
        described = [convert_to_openai_tool(tool) for tool in tools]
        choice = _choice(tool_choice)
        names = [tool["function"]["name"] for tool in described]
        if choice not in (None, "auto", "none", "any", *names):
            raise UsageError(f"tool_choice ({choice!r}) must be one of {', '.join(names)}, or auto, none, any")
        return self.bind(tools=described, tool_choice=choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: str = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Give this model with replies that a schema describes; they always do.

        Args:
            schema: a pydantic class, a TypedDict, or JSON schema.
            method: "json_schema" or "json_mode", which are one here, or "function_calling", where the texts are words
                of the conversation.
            include_raw: give the message and what could not be parsed beside what was parsed.
            strict: changes nothing.
            kwargs: bound as well.

        Raises:
            UsageError: there is no such method.
        """
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        if method not in ("json_schema", "json_mode"):
            raise UsageError(f"method ({method!r}) must be json_schema, json_mode or function_calling")
        shape = convert_to_json_schema(schema)
        bound = self.bind(
            response_format={"type": "json_schema", "json_schema": {"name": shape["title"], "schema": shape}},
            ls_structured_output_format={"kwargs": {"method": method}, "schema": shape},
            **kwargs,
        )
        typed = isinstance(schema, type) and is_basemodel_subclass(schema)
        parser: Runnable[Any, Any]
        parser = PydanticOutputParser[Any](pydantic_object=schema) if typed else JsonOutputParser()  # type: ignore[arg-type]
        if not include_raw:
            parsed: Runnable[LanguageModelInput, Any] = bound | parser
            return parsed
        read = RunnablePassthrough.assign(parsed=lambda got: parser.invoke(got["raw"]), parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        whole: Runnable[LanguageModelInput, Any] = RunnableMap(raw=bound) | read.with_fallbacks(
            [failed], exception_key="parsing_error"
        )
        return whole

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        began = time.monotonic()
        for chunk in self._chunks(messages, stop if stop is not None else self.stop or [], kwargs):
            if self.timeout is not None and time.monotonic() - began > self.timeout:
                raise ModelError(f"the reply took longer than timeout ({self.timeout} s); raise it or lower max_tokens")
            made = ChatGenerationChunk(message=chunk)
            if run_manager:
                run_manager.on_llm_new_token(made.text, chunk=made)
            yield made

    def _chunks(
        self, messages: Sequence[BaseMessage], stops: Sequence[str], options: Mapping[str, Any]
    ) -> Iterator[AIMessageChunk]:
        """Decide what a reply is, and give it piece by piece."""
        said = asked(messages)
        if any(not one for one in stops):
            raise UsageError("stop holds an empty text")
        settings = self._settings(options.get("model"))
        tool = self._wanted(said, messages, options, settings)
        schema = _schema(options.get("response_format"))
        if tool is not None:
            yield self._call(tool, said, settings)
        elif schema is not None:
            writer = self._writer(settings)
            guide = writer.grammars.json(schema, 3 * self.max_tokens)
            shape = ("system", _SHAPE.format(schema=json.dumps(schema)))
            yield from self._written(
                writer, writer.chat([shape, *turns(messages)], most=self.max_tokens), [], settings, guide
            )
        elif said.results:
            yield from self._told(said, stops, settings)
        elif isinstance(self.collection, Collection):
            also = partial(_ranked, settings, found=said.remembered)
            ask = partial(self.collection.ask, said.question, free=self.free, history=said.history, also=also)
            yield from self._answered(ask, stops, settings)
        elif said.remembered and said.question.rstrip().endswith("?"):
            yield from self._answered(self._reading(said.question, said.remembered, settings), stops, settings)
        else:
            writer = self._writer(settings)
            yield from self._written(writer, writer.chat(turns(messages), most=self.max_tokens), stops, settings)

    def _wanted(
        self, said: Asked, messages: Sequence[BaseMessage], options: Mapping[str, Any], settings: Settings
    ) -> Mapping[str, Any] | None:
        """Give the tool to call; behind a call another one only when there must be one."""
        tools = [tool["function"] for tool in options.get("tools") or ()]
        choice = _choice(options.get("tool_choice"))
        if said.results:
            if choice in (None, "auto"):
                return None
            done = {result.name for result in said.results}
            tools = [tool for tool in tools if tool["name"] not in done or tool["name"] == choice] or tools
        return choose(said.question, tools, choice, partial(closeness, settings))

    def _call(self, tool: Mapping[str, Any], said: Asked, settings: Settings) -> AIMessageChunk:
        """Write a call of a tool; the model is not asked where the message itself is all that the call needs."""
        parameters = tool.get("parameters") or {}
        text = " ".join("\n".join([said.question, *(one.text[:_RESULTS] for one in said.results)]).split())
        prompt: list[int] = []
        pieces: list[str] = []
        if is_asked(parameters) and text:
            arguments = json.dumps(dict.fromkeys(needed(parameters), text), ensure_ascii=False)
        else:
            writer = self._writer(settings)
            text = writer.cut(text, _COPIED)
            names = ", ".join(parameters.get("properties", {}))
            system = _CALL.format(name=tool["name"], parameters=names, description=tool.get("description", ""))
            opening = f'{{"name": {json.dumps(tool["name"])}, "arguments": '
            most = self.max_tokens + _COPIED
            prompt = writer.chat([("system", system), ("user", text)], most=most, opening=opening)
            pieces = list(writer.write(prompt, most=most, guide=writer.grammars.call(parameters, text)))
            arguments = _stripped("".join(pieces))
        made = tool_call_chunk(name=tool["name"], args=arguments, id=f"call_{uuid.uuid4().hex[:24]}", index=0)
        return AIMessageChunk(
            content="",
            tool_call_chunks=[made],
            usage_metadata=usage(len(prompt), len(pieces)),
            response_metadata={"model_name": settings.model, "finish_reason": "tool_calls"},
            chunk_position="last",
        )

    def _told(self, said: Asked, stops: Sequence[str], settings: Settings) -> Iterator[AIMessageChunk]:
        """Answer from what tools gave: a question from what is read in it, anything else with it as it stands."""
        failed = [result for result in said.results if result.status == "error"]
        given = [result for result in said.results if result.status != "error"]
        short = sum(len(result.text) for result in given) <= _SHORT and not any(map(documents_of, given))
        answered = any(isinstance(result.artifact, dict) for result in given)
        if not given or short or answered or not said.question.rstrip().endswith("?"):
            shown, cited = zip(*map(told, given or failed), strict=True)
            yield block("".join(until(["\n".join(shown)], stops)))
            yield block(
                "", [one for each in cited for one in each], usage_metadata=usage(0, 0), **last(settings.model, "stop")
            )
            return
        yield from self._answered(self._reading(said.question, passages(given), settings), stops, settings)

    def _reading(self, question: str, found: Sequence[Passage], settings: Settings) -> Callable[..., qa.Answer]:
        """Give the function that answers from passages."""
        read = _ranked(settings, question, found)
        return partial(
            qa.answer,
            question,
            lambda text, k: read[:k],
            load_language_model(settings),
            passages=settings.passages,
            budget=settings.budget,
            focus=settings.focus,
            enough=settings.enough,
            closeness=partial(closeness, settings),
            abstain_below=settings.abstain_below,
            free=self.free,
        )

    def _answered(
        self, ask: Callable[..., qa.Answer], stops: Sequence[str], settings: Settings
    ) -> Iterator[AIMessageChunk]:
        """Give an answer from passages, with its citations."""
        found: list[qa.Answer] = []
        pieces = pieces_of(ask, found)
        text = ""
        for piece in until(pieces, stops):
            text += piece
            yield block(piece)
        for _ in pieces:  # the answer is there at its end, wherever a stop cut what is shown of it
            pass
        answer = found[0]
        if answer.abstained:
            yield block(("\n\n" if text else "") + qa.abstention(answer))
        verbatim = answer.answer_type == "span"  # of a free answer it is not known what rests on which passage
        where = (0, len(text)) if verbatim else (None, None)
        cited = [citation(asdict(one), *where) for one in answer.citations]
        more = {"abstained": answer.abstained, "answerable_probability": answer.answerable_probability}
        used = usage(answer.tokens["prompt"], answer.tokens["generated"])
        yield block("", cited, usage_metadata=used, **last(settings.model, "stop", **more))

    def _written(
        self, writer: Decoder, prompt: list[int], stops: Sequence[str], settings: Settings, guide: Guide | None = None
    ) -> Iterator[AIMessageChunk]:
        """Write a reply."""
        text = ""
        written = writer.write(prompt, most=self.max_tokens, guide=guide, temperature=self.temperature, seed=self.seed)
        for piece in until(written, stops):
            text += piece
            yield AIMessageChunk(content=piece)
        count = writer.count(text)
        ended = "length" if count >= self.max_tokens else "stop"
        yield AIMessageChunk(content="", usage_metadata=usage(len(prompt), count), **last(settings.model, ended))

    def _settings(self, model: str | None = None) -> Settings:
        """Give the settings with the model of this one, or of a call."""
        if self.settings is None:
            self.settings = load_settings()[0]
        named = model or self.model_name or self.settings.model
        return self.settings if named == self.settings.model else replace(self.settings, model=named)

    def _writer(self, settings: Settings) -> Decoder:
        """Give what writes freely."""
        from l2m_rag.reader import MemoryReader  # it brings torch, which those who only import this need not wait for

        model = load_language_model(settings)
        writer = model.writer if isinstance(model, MemoryReader) else model
        if not isinstance(writer, Decoder):
            raise UsageError(
                f"{model.name} lies behind llm_url, which answers from a collection only; "
                f"use LangChain's own class for such an address, or unset llm_url"
            )
        return writer


def _choice(choice: str | dict[str, Any] | bool | None) -> str | None:
    if isinstance(choice, dict):
        return str(choice.get("function", choice).get("name", choice.get("type")))
    if isinstance(choice, bool):
        return "any" if choice else None
    return "any" if choice == "required" else choice


def _schema(response_format: Any) -> Mapping[str, Any] | None:
    """Give the JSON schema that a reply must have, of what OpenAI's `response_format` says."""
    if not response_format:
        return None
    if response_format.get("type") == "json_object":
        return {"type": "object"}
    if response_format.get("type") == "json_schema":
        schema: Mapping[str, Any] = response_format["json_schema"]["schema"]
        return schema
    raise UsageError(f"response_format ({response_format.get('type')!r}) must be json_schema or json_object")


def _ranked(settings: Settings, question: str, found: Sequence[Passage]) -> list[Passage]:
    """Give passages with their cosines as scores, best first."""
    return sorted(with_cosines(settings, question, found), key=lambda one: -one.score)


def _stripped(arguments: str) -> str:
    """Give arguments without the spaces around what was copied; those that were cut short as they are."""
    try:
        read = json.loads(arguments)
    except ValueError:
        return arguments
    stripped = {name: value.strip() if isinstance(value, str) else value for name, value in read.items()}
    return json.dumps(stripped, ensure_ascii=False)
