from __future__ import annotations

import pytest

from lmserve.config import ModelConfig
from lmserve.errors import InvalidRequest, ModelNotFound
from lmserve.models.entry import ModelEntry, State
from lmserve.models.names import find_entry
from lmserve.models.registry import KnownModel
from lmserve.runtime.interface import Task


def entry(model_id: str, state: State = "loaded", location: str = "/models/x", task: str = "auto") -> ModelEntry:
    known = KnownModel(model_id=model_id, location=location, source="configured", facts=None, problem=None)
    made = ModelEntry(known, ModelConfig(model=location, model_id=model_id, task=task), {})
    made.state = state
    return made


def find(entries: list[ModelEntry], name: str | None, *, strict: bool = False, task: Task | None = None) -> str:
    return find_entry(entries, name, strict=strict, task=task).model_id


def test_one_loaded_model_answers_to_any_name_unless_names_are_strict() -> None:
    one = [entry("org/one"), entry("known", "not-loaded")]
    for name in ("org/one", "ORG/One", "one", "gpt-4o", None):
        assert find(one, name) == "org/one"
    assert find(one, "known") == "known", "a model that is known is meant by its name"
    with pytest.raises(ModelNotFound, match=r"'gpt-4o' is not known. Your models: org/one. Known, .*: known."):
        find(one, "gpt-4o", strict=True)


def test_the_end_of_a_name_and_the_place_it_comes_from() -> None:
    two = [entry("a/x"), entry("b/x"), entry("b/y"), entry("z", location="Qwen/Qwen3-0.6B")]
    assert find(two, "y") == "b/y"
    assert find(two, "qwen/qwen3-0.6b") == "z"
    for ambiguous in ("x", "nobody", None):
        with pytest.raises(ModelNotFound):
            find(two, ambiguous)


def test_of_two_alike_the_loaded_one_is_meant() -> None:
    assert find([entry("a/x"), entry("b/x", "not-loaded"), entry("c")], "x") == "a/x"
    assert find([entry("a/x", "not-loaded"), entry("b/x", "loading"), entry("c")], "x") == "b/x"


def test_the_only_known_model_needs_no_name() -> None:
    assert find([entry("a", "not-loaded")], None) == "a"
    with pytest.raises(ModelNotFound, match="none is loaded"):
        find([entry("a", "not-loaded")], "b")
    with pytest.raises(ModelNotFound, match="No model was named"):
        find([entry("a", "not-loaded"), entry("b", "not-loaded")], None)


def test_a_name_that_is_nobodys_means_the_one_model_for_the_task() -> None:
    chat, vectors = entry("chat", task="generate"), entry("vectors", "not-loaded", task="embed")
    assert find([chat, vectors], "gpt-4o", task="generate") == "chat"
    assert find([chat, vectors], "text-embedding-3-small", task="embed") == "vectors"
    assert find([chat, vectors], "chat", task="embed") == "chat", "a model that is named is meant: it is refused"
    vectors.state = "loaded"
    assert find([chat, vectors], "gpt-4o", task="generate") == "chat"
    assert find([chat, vectors], None, task="embed") == "vectors"
    with pytest.raises(ModelNotFound):
        find([chat, vectors], "text-embedding-3-small", task="embed", strict=True)
    with pytest.raises(ModelNotFound):
        find([chat, vectors], "reranker", task="score")
    others = [entry("v2", "not-loaded", task="embed"), entry("v3", "not-loaded", task="embed")]
    assert find([chat, vectors, *others], "text-embedding-3-small", task="embed") == "vectors"
    assert find([chat, *others], "text-embedding-3-small", task="embed") == "chat", "the one that is loaded"
    with pytest.raises(ModelNotFound):
        find(others, "text-embedding-3-small", task="embed")


def test_a_model_is_for_its_task_alone() -> None:
    for task in ("generate", "embed", "score"):
        made = entry("m", task=task)
        made.check_servable()
        for wanted in ("generate", "embed", "score"):
            if wanted == task:
                made.check_servable(wanted)
            else:
                with pytest.raises(InvalidRequest, match="Model m "):
                    made.check_servable(wanted)


def test_a_long_list_of_names_is_cut() -> None:
    many = [entry(f"m{i}", "not-loaded") for i in range(30)]
    with pytest.raises(ModelNotFound, match=r"m19 and 10 more"):
        find(many, "x" * 1000)
