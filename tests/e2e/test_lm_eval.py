"""lm-eval's client of completions scores a small task as its own transformers model does."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Server

CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
"""After its answer the model ends: the harness asks for one more token, which it drops, and gets the end."""
QUESTIONS = [
    (CHAT, ["The capital of France is Paris.", "London.", "."], 0),
    ("The capital of France is", [" Paris", " London", " Rome", " a banana"], 0),
    ("Water freezes at a temperature of", [" zero degrees", " ninety degrees", " blue"], 0),
    ("A dog is a kind of", [" fish", " animal", " bridge", " number"], 1),
    ("Two plus two is", [" four", " five", " seven hundred"], 0),
    ("The opposite of hot is", [" loud", " cold", " green"], 1),
    ("In the morning the sun", [" rises in the east.", " sings a song.", " eats bread."], 0),
    ("Caf\u00e9 is the French word for", [" coffee", " caf\u00e9 \u2615", " \u732b"], 0),
    ("She opened the door with a", [" key", " cloud", " Tuesday"], 0),
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
TEXTS = [
    "Once upon a time there was a little house at the edge of a great forest, and nobody knew who lived in it.",
    "The committee met on Thursday. It agreed on nothing; lange W\u00f6rter and \u65e5\u672c\u8a9e were said.",
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's manager of the two tasks, with a cache of its own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    for name, task, lines in (("choice", TASK, rows), ("rolling", ROLLING, [{"text": text} for text in TEXTS])):
        data = tmp_path / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / f"{name}.yaml").write_text(task.replace("FILE", str(data)))
    tasks: Any = importlib.import_module("lm_eval.tasks")  # it takes seconds, and reads the environment
    return tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what lm-eval and datasets do is theirs
def test_the_same_figures(starter_server: Server, starter_folder: Path, tasks: Any) -> None:
    lm_eval: Any = importlib.import_module("lm_eval")

    def evaluate(model: str, arguments: dict[str, Any]) -> Any:
        names = ["tiny_choice", "tiny_rolling"]
        return lm_eval.simple_evaluate(
            model, model_args=arguments, tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True
        )

    theirs = evaluate("hf", {"pretrained": str(starter_folder), "dtype": "float32", "device": "cpu"})
    url = f"{starter_server.url}/v1/completions"
    served = {"base_url": url, "model": "smollm2-135m-instruct", "tokenizer": str(starter_folder)}
    ours = evaluate("local-completions", {**served, "tokenizer_backend": "huggingface", "num_concurrent": 4})
    assert ours["results"]["tiny_choice"]["acc,none"] == theirs["results"]["tiny_choice"]["acc,none"]
    assert ours["results"]["tiny_choice"]["acc_norm,none"] == theirs["results"]["tiny_choice"]["acc_norm,none"]
    assert theirs["results"]["tiny_choice"]["acc,none"] > 0.5, "the model knows something, so the figure says something"
    rolling, expected = ours["results"]["tiny_rolling"], theirs["results"]["tiny_rolling"]
    assert rolling["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte,none"], rel=1e-5)
    assert len(ours["samples"]["tiny_choice"]) == len(QUESTIONS)
    for mine, other in zip(ours["samples"]["tiny_choice"], theirs["samples"]["tiny_choice"], strict=True):
        for scored, reference in zip(mine["resps"], other["resps"], strict=True):
            (loglikelihood, is_greedy), (reference_loglikelihood, reference_is_greedy) = scored[0], reference[0]
            assert float(loglikelihood) == pytest.approx(float(reference_loglikelihood), abs=1e-3)
            assert str(is_greedy) == str(reference_is_greedy)
