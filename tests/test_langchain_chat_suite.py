"""The standard suites of langchain-tests over ChatL2M with the default weights."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from l2m_rag.config import load_settings
from l2m_rag.langchain import ChatL2M
from l2m_rag.weights import DEFAULT_DECODER


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatL2M

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "default"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"L2M_MODEL": "/models/ours"}, {}, {"model_name": "/models/ours"}


@pytest.mark.usefixtures("default_weights")
class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatL2M

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"settings": load_settings({"threads": 1})[0], "max_tokens": 64}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return DEFAULT_DECODER
