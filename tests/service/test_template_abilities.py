from __future__ import annotations

import threading
from typing import Any

import pytest

from lmserve.service.chat_template import ChatTemplate
from lmserve.service.model_text import ModelText
from lmserve.service.template_abilities import TemplateAbilities, find_abilities, switches_read
from tests.service import tokenizers_for_tests as made


def abilities(source: str, *, with_tools: bool = True) -> TemplateAbilities:
    return ChatTemplate(ModelText(made.byte_level(source))).abilities(with_tools=with_tools)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "hermes",
            TemplateAbilities(
                takes_system=True,
                shows_tools=True,
                call_arguments="object",
                shows_results=True,
                reasoning_key="reasoning_content",
            ),
        ),
        (
            "llama3",
            TemplateAbilities(
                takes_system=True, shows_tools=True, call_arguments="object", max_calls=1, shows_results=True
            ),
        ),
        (
            "mistral",
            TemplateAbilities(shows_tools=True, call_arguments="object", shows_results=True, wants_short_ids=True),
        ),
        ("deepseek", TemplateAbilities(takes_system=True, call_arguments="string", shows_results=True)),
        ("gemma2", TemplateAbilities()),
        (
            "gemma4",
            TemplateAbilities(
                takes_system=True,
                shows_tools=True,
                call_arguments="object",
                shows_results=True,
                reasoning_key="reasoning",
            ),
        ),
        (
            "gpt_oss",
            TemplateAbilities(
                takes_system=True,
                shows_tools=True,
                call_arguments="object",
                max_calls=1,
                shows_results=True,
                reasoning_key="thinking",
                reasoning_excludes_content=True,
            ),
        ),
        ("plain", TemplateAbilities(takes_system=True)),
    ],
)
def test_what_the_families_templates_can(name: str, expected: TemplateAbilities) -> None:
    assert abilities(made.chat_template(name)) == expected


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("{{ c.name }} {{ c.arguments }}", "string"),  # an object comes out in Python's notation
        ("{{ c.name }} {{ c.arguments | tojson }}", "object"),  # a string comes out quoted once more
        ("{{ c.name }} {{ c.arguments | string | tojson }}", None),
        ("{{ c.arguments | tojson }}", None),
        ("{{ c.name }}", None),
    ],
)
def test_in_which_shape_arguments_are_shown(source: str, arguments: str | None) -> None:
    begin = "{% for m in messages %}{% for call in m.tool_calls or [] %}{% set c = call.function %}"
    assert abilities(f"{begin}{source}{{% endfor %}}{{% endfor %}}").call_arguments == arguments


def test_tools_whose_descriptions_are_left_out_are_not_shown() -> None:
    begin, end = "{% for t in tools or [] %}{{ t.function.name }}", "{% endfor %}"
    assert abilities(begin + "{{ t.function.description }}" + end).shows_tools
    assert not abilities(begin + end).shows_tools


def test_a_template_that_always_fails_can_nothing() -> None:
    assert abilities("{{ nothing.at.all }}") == TemplateAbilities()


def test_a_model_may_have_a_template_of_its_own_for_tools() -> None:
    tokenizer = made.byte_level()
    tokenizer.chat_template = {"default": made.chat_template("plain"), "tool_use": made.chat_template("hermes")}
    template = ChatTemplate(ModelText(tokenizer))
    assert template.abilities(with_tools=True).call_arguments == "object"
    assert template.abilities(with_tools=False) == TemplateAbilities(takes_system=True)


def test_contents_are_probed_in_the_templates_style() -> None:
    tokenizer = made.byte_level("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}")

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))

    assert find_abilities(render, "parts", with_tools=False).takes_system
    assert not find_abilities(render, "text", with_tools=False).takes_system


def test_few_renderings_are_made_and_only_once() -> None:
    text = ModelText(made.byte_level(made.chat_template("hermes")))
    apply, num_calls = text.tokenizer.apply_chat_template, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        num_calls[0] += 1
        return apply(*args, **kwargs)

    text.tokenizer.apply_chat_template = counted
    template = ChatTemplate(text)
    threads = [threading.Thread(target=template.abilities, kwargs={"with_tools": True}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < num_calls[0] <= 12


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("hermes", {"enable_thinking"}),  # with the tag that transformers adds to Jinja
        ("deepseek", {"thinking"}),  # given a default by the template itself
        ("gpt_oss", {"reasoning_effort"}),  # within a macro
        ("gemma4", set()),
    ],
)
def test_by_which_variables_reasoning_is_controlled(name: str, switches: set[str]) -> None:
    assert switches_read([made.chat_template(name)]) == switches


def test_what_a_template_sets_itself_is_no_switch() -> None:
    assert switches_read(["{% set thinking = messages[0].thinking %}{{ thinking }}"]) == set()
    assert switches_read(["{% broken", "{{ thinking }}"]) == {"thinking"}
