"""langchain-openai's chat model against a real server: LangChain's own standard tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.e2e.serving import Server


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # langchain-openai dumps parsed models
@pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema:UserWarning")  # a test gives it one
class TestChatOpenAI(ChatModelIntegrationTests):
    """Declared as not had is what needs a better model: calls of its own accord, keys that only the prompt names."""

    @pytest.fixture(autouse=True)
    async def _connections(self, starter_server: Server) -> AsyncIterator[None]:
        """Clients of one test, closed with it: LangChain would keep its own beyond the test's event loop."""
        self.url = starter_server.url
        self.http = openai.DefaultHttpxClient()
        async with openai.DefaultAsyncHttpxClient() as self.async_http:
            yield
        self.http.close()

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "base_url": f"{self.url}/v1",
            "http_client": self.http,
            "http_async_client": self.async_http,
            "api_key": "any",
            "model": "smollm2-135m-instruct",
            "temperature": 0.7,  # greedy, so small a model goes round in circles where a schema bounds no text
            "seed": 2,
            "max_tokens": 64,
            "max_retries": 0,
            "stream_usage": True,
            "model_kwargs": {"parallel_tool_calls": False},  # the model would call until it is cut
        }

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        """Room for a joke, and a seed with which they all end."""
        return {"seed": 9, "max_tokens": 200}

    @property
    def supports_json_mode(self) -> bool:
        """JSON it is, but the test wants the prompt's keys in it, which no schema enforces."""
        return False

    @pytest.mark.xfail(reason="Here the model has to call a tool by itself, which 135M parameters do not.")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)
