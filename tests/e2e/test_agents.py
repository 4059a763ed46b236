"""Libraries that build on calls and formats: Instructor, Pydantic AI, LangChain. What they ask for is forced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import instructor
import openai
import pytest
from instructor.core import IncompleteOutputException
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.e2e.conftest import STARTER
from tests.e2e.serving import Server

QUESTION = "Paris is the capital of which country?"
CHAT: list[Any] = [{"role": "user", "content": QUESTION}]


class Answer(BaseModel):
    """The answer to a question."""

    country: Literal["France", "Spain", "Italy"]
    certainty: int = Field(ge=1, le=5)


@pytest.fixture
def client(starter_server: Server) -> OpenAI:
    return starter_server.client()


# Instructor


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_instructor(client: OpenAI, mode: instructor.Mode) -> None:
    """Without a retry: what the server enforces needs none."""
    asking: Any = instructor.from_openai(client, mode=mode)
    answer, completion = asking.create_with_completion(
        model=STARTER, messages=CHAT, response_model=Answer, temperature=0, max_tokens=64, max_retries=0
    )
    assert isinstance(answer, Answer)
    assert completion.choices[0].finish_reason in ("stop", "tool_calls")


def test_instructor_lists(client: OpenAI) -> None:
    """Its wrapper of a list, and the objects of it as they come.

    As a call: in its JSON Schema the wrapper's only property is not required, so that an empty object is an answer.
    """
    asking: Any = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    options = {"model": STARTER, "messages": CHAT, "temperature": 1, "seed": 3, "max_tokens": 64}
    answers = list(asking.create_iterable(response_model=Answer, **options))
    assert answers
    assert all(isinstance(answer, Answer) for answer in answers)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_instructor_partials(client: OpenAI, mode: instructor.Mode) -> None:
    asking: Any = instructor.from_openai(client, mode=mode)
    options = {"model": STARTER, "messages": CHAT, "temperature": 0, "max_tokens": 64}
    partials = list(asking.create_partial(response_model=Answer, **options))
    assert len(partials) > 1
    assert Answer.model_validate(partials[-1].model_dump())


def test_instructor_json_mode(client: OpenAI) -> None:
    """The schema is in the prompt alone: of this model no more than JSON is to be had, and the cut is understood."""
    asking: Any = instructor.from_openai(client, mode=instructor.Mode.JSON)
    with pytest.raises(IncompleteOutputException) as caught:
        asking.create(model=STARTER, messages=CHAT, response_model=Answer, temperature=0, max_tokens=8, max_retries=0)
    cut: Any = caught.value.last_completion
    assert cut.choices[0].message.content.startswith("{")


# Pydantic AI


@pytest.fixture
def settings() -> ModelSettings:
    return ModelSettings(temperature=0, max_tokens=64, parallel_tool_calls=False)


@pytest.fixture
async def model(starter_server: Server) -> Any:
    async with AsyncOpenAI(base_url=f"{starter_server.url}/v1", api_key="any", max_retries=0) as asking:
        yield OpenAIChatModel(STARTER, provider=OpenAIProvider(openai_client=asking))


@pytest.mark.parametrize("output", [Answer, ToolOutput(Answer), NativeOutput(Answer)], ids=["model", "tool", "native"])
async def test_pydantic_ai_output(model: OpenAIChatModel, settings: ModelSettings, output: Any) -> None:
    agent: Agent[None, Any] = Agent(model, output_type=output, retries=0, model_settings=settings)
    result = await agent.run(QUESTION)
    assert isinstance(result.output, Answer)


async def test_pydantic_ai_streams_its_output(model: OpenAIChatModel, settings: ModelSettings) -> None:
    agent: Agent[None, Any] = Agent(model, output_type=Answer, retries=0, model_settings=settings)
    async with agent.run_stream(QUESTION) as result:
        answers = [answer async for answer in result.stream_output(debounce_by=None)]
    assert isinstance(answers[-1], Answer)


async def test_pydantic_ai_calls_a_tool(model: OpenAIChatModel, settings: ModelSettings) -> None:
    """Either the tool or the answer is called each time, as the model likes: whatever it does is well-formed."""
    asked: list[str] = []
    agent: Agent[None, Any] = Agent(model, output_type=[Answer, str], retries=3, model_settings=settings)

    @agent.tool_plain
    def look_up(city: Literal["Paris", "Rome"]) -> str:
        """The country of a city."""
        asked.append(city)
        return "France" if city == "Paris" else "Italy"

    result = await agent.run(QUESTION)
    assert isinstance(result.output, Answer | str)
    assert set(asked) <= {"Paris", "Rome"}


# LangChain


@pytest.fixture
def chat(starter_server: Server) -> Iterator[ChatOpenAI]:
    with openai.DefaultHttpxClient() as http:
        yield ChatOpenAI(
            base_url=f"{starter_server.url}/v1",
            api_key="any",  # type: ignore[arg-type]  # a string becomes a secret
            http_client=http,
            model=STARTER,
            temperature=0,
            max_tokens=64,  # type: ignore[call-arg]  # its alias, which people write
            max_retries=0,
        )


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # langchain-openai dumps parsed models
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(chat: ChatOpenAI, method: Any) -> None:
    asking = chat.with_structured_output(Answer, method=method)
    assert isinstance(asking.invoke(QUESTION), Answer)
    *_, last = asking.stream(QUESTION)
    assert isinstance(last, Answer)


def test_langchain_strict_structured_output(chat: ChatOpenAI) -> None:
    asking = chat.with_structured_output(Answer, method="function_calling", strict=True, include_raw=True)
    found: Any = asking.invoke(QUESTION)
    assert isinstance(found["parsed"], Answer)
    assert found["parsing_error"] is None
    assert found["raw"].tool_calls[0]["name"] == "Answer"


def test_langchain_json_mode(chat: ChatOpenAI) -> None:
    """JSON without a schema: the text of the raw message is an object, or the beginning of one."""
    asking = chat.bind(response_format={"type": "json_object"}, max_tokens=24)
    message = asking.invoke(f"{QUESTION} Answer in JSON.")
    assert isinstance(message, AIMessage)
    assert str(message.content).startswith("{")


def look_up(city: Literal["Paris", "Rome"]) -> str:
    """The country of a city."""
    return city


def look_away() -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    "choice", ["any", "required", True, "look_up", {"type": "function", "function": {"name": "look_up"}}]
)
def test_langchain_bound_tools(chat: ChatOpenAI, choice: Any) -> None:
    tools: list[Any] = [look_up] if choice is True else [look_up, look_away]
    message = chat.bind_tools(tools, tool_choice=choice, parallel_tool_calls=False).invoke(QUESTION)
    assert isinstance(message, AIMessage)
    (call,) = message.tool_calls
    assert call["name"] in {tool.__name__ for tool in tools}
    if choice not in ("any", "required"):
        assert call["name"] == "look_up"
    if call["name"] == "look_up":
        assert call["args"]["city"] in ("Paris", "Rome")
    assert message.response_metadata["finish_reason"] == "tool_calls"


def test_langchain_streams_a_call(chat: ChatOpenAI) -> None:
    asking = chat.bind_tools([look_up], tool_choice="look_up")
    chunks: list[Any] = list(asking.stream(QUESTION))
    folded = chunks[0]
    for chunk in chunks[1:]:
        folded += chunk
    whole: Any = asking.invoke(QUESTION)
    assert [(call["name"], call["args"]) for call in folded.tool_calls] == [
        (call["name"], call["args"]) for call in whole.tool_calls
    ]
    assert len(folded.tool_calls) == 1
