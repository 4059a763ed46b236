"""langchain-openai's chat model against a real server: LangChain's own standard tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.e2e.serving import Server


class TestChatOpenAI(ChatModelIntegrationTests):
    """What is refused by name so far is declared as not had: tools, structured output, images."""

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
            "temperature": 0,
            "max_tokens": 64,
            "max_retries": 0,
            "stream_usage": True,
        }

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False
