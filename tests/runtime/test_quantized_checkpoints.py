"""Checkpoints that are quantized already: those that can be loaded here say what their files say, all others are
refused with a sentence. docs/quantization.md has the table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build import build_runner
from lmserve.runtime.checkpoint_formats import FORMATS, check_parts, format_of
from lmserve.runtime.loader import load_model, read_model_config
from lmserve.runtime.memory_plan import plan_memory
from lmserve.runtime.native import build as native
from lmserve.runtime.prepack import linears_to_prepack
from tests.runtime import tiny_quantized as tiny
from tests.runtime.test_exactness import greedy, prompts, run
from tests.runtime.tiny_models import build_tiny

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's, where it compiles (BitNet)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Written:
    """A checkpoint that is written here, and what becomes of it."""

    write: Callable[[Path], PreTrainedModel]
    error: float = 1e-5
    """Of the logits, in units of their spread, over those of the weights that the files stand for."""
    slack: float = 1e-4
    """In the same units: how far the logit of an answer's token may be from the largest. Above rounding where
    activations are rounded, too: a last bit decides which way."""
    stays: bool = True
    """Whether the weights stay quantized in memory."""


WRITTEN = {
    "fp8": Written(tiny.fp8, stays=False),
    "mxfp8": Written(tiny.mxfp8, stays=False),
    "mxfp4": Written(tiny.mxfp4, stays=False),
    "metal": Written(tiny.metal, stays=False),
    "gemma": Written(tiny.gemma),
    "bitnet": Written(tiny.bitnet, error=0.02, slack=0.2),
    "bitnet, unpacked": Written(partial(tiny.bitnet, linear_class="autobitlinear"), 0.02, 0.2, stays=False),
    "compressed-tensors, 4 bits": Written(tiny.compressed, stays=False),
    "compressed-tensors, 8 bits": Written(partial(tiny.compressed, form="int-quantized"), 0.06, 0.2, stays=False),
    "compressed-tensors, fp8": Written(partial(tiny.compressed, form="float-quantized"), 0.2, 0.5, stays=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """Where a checkpoint lies, and the model with the weights that it stands for."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            folder = tmp_path_factory.mktemp("quantized") / "model"
            made[name] = folder, WRITTEN[name].write(folder)
        return made[name]

    return make


Folders = Callable[[str], tuple[Path, PreTrainedModel]]


def config(folder: Path, **overrides: Any) -> ModelConfig:
    limits: dict[str, Any] = {"kv_cache_memory": 2**22, "max_model_len": 96, "max_num_seqs": 8, "block_size": 4}
    return ModelConfig(model=str(folder), device="cpu", dtype="float32", **limits, **overrides)


def logits(model: PreTrainedModel, ids: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return found


def away(got: PreTrainedModel, wanted: PreTrainedModel) -> float:
    """How far one's logits are from the other's, in units of their spread."""
    expected = logits(wanted, prompts()[0])
    return float((logits(got, prompts()[0]) - expected).abs().mean() / expected.std())


def behind_the_likeliest(folder: Path) -> float:
    """How far the logits of the tokens that several requests in company get are from the largest ones, which the model
    as transformers runs it, each text alone and without a cache, gives there; in units of the logits' spread."""
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24, max_model_len=96)
    requests = prompts()[:6]
    answers = run(EngineCore(build_runner(config(folder)), limits), [(prompt, greedy()) for prompt in requests])
    model, _ = load_model(config(folder))
    farthest = 0.0
    for prompt, answer in zip(requests, answers, strict=True):
        assert len(answer) == greedy().max_tokens
        rows = logits(model, (*prompt, *answer))[len(prompt) - 1 : -1]
        behind = rows.amax(-1) - rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        farthest = max(farthest, float(behind.max() / rows.std()))
    return farthest


@pytest.mark.parametrize("name", WRITTEN)
def test_the_weights_are_what_the_files_say(folders: Folders, name: str) -> None:
    folder, expected = folders(name)
    model, dtype = load_model(config(folder))
    assert dtype == torch.float32
    assert away(model, expected) < WRITTEN[name].error


@pytest.mark.parametrize("name", WRITTEN)
def test_answers_in_company_are_the_model_s_own(folders: Folders, name: str) -> None:
    assert behind_the_likeliest(folders(name)[0]) <= WRITTEN[name].slack


@pytest.mark.parametrize("name", WRITTEN)
def test_its_memory_is_counted_as_it_will_be(folders: Folders, name: str) -> None:
    folder, expected = folders(name)
    plan, info = plan_memory(config(folder)), build_runner(config(folder, self_check=False)).info
    dense = sum(parameter.numel() * 4 for parameter in expected.parameters())
    if WRITTEN[name].stays:
        assert info.weight_bytes < 0.6 * dense
    else:
        assert info.weight_bytes == pytest.approx(dense, rel=0.01)
    assert 0.8 * info.weight_bytes < plan.weight_bytes < 1.6 * info.weight_bytes


@pytest.mark.parametrize("name", ["gemma", "compressed-tensors, 4 bits"])
def test_torch_runs_what_stays_quantized(folders: Folders, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is native code, too: a program has no weights in the files' format."""
    monkeypatch.setattr(native, "check_available", lambda: None)
    told: list[str] = []
    build_runner(config(folders(name)[0], self_check=False), lambda stage, _: told.append(stage))
    method = name.partition(",")[0]
    reason = f"torch runs each operation of a step: its weights stay quantized as its files have them ({method})"
    assert reason in told


def test_layers_that_do_more_than_a_product_are_left_alone(folders: Folders) -> None:
    """compressed-tensors' are ``nn.Linear`` by their class, and round their inputs in a forward of their own."""
    model, _ = load_model(config(folders("compressed-tensors, 8 bits")[0]))
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
    assert [name for _, name, _ in linears_to_prepack(model, CPU, torch.float32, [torch.float32])] == ["lm_head"]


TORCHAO = """
import sys
from pathlib import Path
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
from lmserve.runtime.build import build_runner
from lmserve.runtime.loader import load_model
from tests.runtime.test_quantized_checkpoints import away, behind_the_likeliest, build_tiny, config, tiny

folder = Path(sys.argv[1])
plain = build_tiny("llama", **tiny.SIZES)
plain.save_pretrained(folder / "plain")
dense = sum(parameter.numel() * 4 for parameter in plain.parameters())
for kind in (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig):
    said = TorchAoConfig(kind(version=2))
    its = folder / kind.__name__
    AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=said).save_pretrained(its)
    model, _ = load_model(config(its))
    size = build_runner(config(its)).info.weight_bytes / dense
    print(type(model.model.layers[0].mlp.up_proj.weight).__name__, away(model, plain), behind_the_likeliest(its), size)
"""


def test_what_torchao_has_saved(tmp_path: Path) -> None:
    """Weights in 8 bits, and activations as well: those are another last bit away from another rounding.

    scripts/setup.sh puts torchao beside the environment, where transformers does not find it.
    """
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(sys.prefix) / "torchao")])
    done = subprocess.run(
        [sys.executable, "-c", TORCHAO, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for line, most, slack in zip(done.stdout.splitlines()[-2:], (0.05, 0.1), (1e-4, 0.5), strict=True):
        kind, *figures = line.split()
        error, behind, size = map(float, figures)
        assert kind == "Int8Tensor"
        assert 1e-4 < error < most
        assert behind < slack
        assert size < 0.5


def named(folder: Path, said: dict[str, Any]) -> Path:
    """A plain checkpoint whose configuration says that it is quantized."""
    model = build_tiny("llama", **tiny.SIZES)
    tiny.write(folder, model, dict(model.state_dict()), said)
    return folder


def refusal(folder: Path, act: Callable[[ModelConfig], object]) -> str:
    with pytest.raises(ModelLoadFailed) as refused:
        act(config(folder))
    words = str(refused.value)
    assert "\n" not in words
    return words


LOADED = {"bitnet", "compressed-tensors", "fp8", "gemma", "metal", "mxfp4", "mxfp8"}
"""That ``WRITTEN`` has examples of."""


def test_each_format_of_transformers_has_been_decided_on() -> None:
    """A new one in a new version: try it, then say in ``FORMATS`` and in docs/quantization.md what it needs."""
    assert set(FORMATS) == set(AUTO_QUANTIZER_MAPPING)
    assert {name.partition(",")[0] for name in WRITTEN} == LOADED


@pytest.mark.parametrize("act", [plan_memory, build_runner])
@pytest.mark.parametrize("method", sorted(AUTO_QUANTIZER_MAPPING.keys() - LOADED))
def test_what_cannot_be_loaded_is_refused_by_name(
    tmp_path: Path, method: str, act: Callable[[ModelConfig], object]
) -> None:
    known = FORMATS[method]
    if known.packages and all(importlib.util.find_spec(package.replace("-", "_")) for package in known.packages):
        pytest.skip(f"{known.packages} is installed")
    said = {"quant_method": method}
    if method.startswith("bitsandbytes"):
        said = {"quant_method": "bitsandbytes", f"load_in_{method[-4:]}": True}  # type: ignore[dict-item]
    words = refusal(named(tmp_path / "model", said), act)
    assert f"its weights are quantized already ({method})" in words
    if known.refusal:
        assert f"and transformers {transformers.__version__} {known.refusal}" in words
    elif known.devices:
        assert "runs on NVIDIA GPUs only; the device is cpu" in words
    else:
        assert f"needs a further package: pip install {' '.join(known.packages)}" in words


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "modelopt"}, r"\(modelopt\), in a format that transformers .* cannot load"),
        ({"bits": 4}, "and its configuration does not say how"),
        ({"load_in_4bit": True}, r"\(bitsandbytes_4bit\), which needs"),
    ],
)
def test_a_format_that_nobody_knows_is_refused(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    """transformers would go on as if the weights were not quantized."""
    folder = named(tmp_path / "model", said)
    for act in (plan_memory, build_runner):
        with pytest.raises(ModelLoadFailed, match=words):
            act(config(folder))


def test_what_the_language_model_inside_says_counts(tmp_path: Path) -> None:
    known = read_model_config(config(named(tmp_path / "model", {}))).config
    known.get_text_config = lambda: LlamaConfig.from_dict({"quantization_config": {"quant_method": "awq"}})
    assert format_of(known) == "awq"


@pytest.mark.parametrize("act", [plan_memory, build_runner])
def test_blocks_that_transformers_takes_apart_wrongly_are_refused(
    tmp_path: Path, act: Callable[[ModelConfig], object]
) -> None:
    """Of 48 rows the second block of 32 is half a block; it would take 24 and 24."""
    folder = tmp_path / "model"
    tiny.fp8(folder, hidden_size=48)
    assert "(fp8) in blocks of 32, of which 48 is no multiple" in refusal(folder, act)


def test_a_weight_whose_scale_has_another_name_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder, expected = folders("fp8")
    tensors = load_file(folder / "model.safetensors")
    names = {name: name.removesuffix("_inv") if "up_proj" in name else name for name in tensors}
    tiny.write(
        tmp_path / "model",
        expected,
        {names[name]: tensor for name, tensor in tensors.items()},
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"],
    )
    assert "does not read: model.layers.0.mlp.up_proj.weight_scale" in refusal(tmp_path / "model", load_model)
    left_out = set(names.values()) - set(tensors)
    with pytest.raises(ModelLoadFailed, match="does not read: model.layers.0.mlp.up_proj.weight_scale"):
        check_parts(expected, left_out)


def test_what_belongs_to_no_weight_may_be_left_out(folders: Folders) -> None:
    _, model = folders("fp8")
    check_parts(
        model,
        ["model.layers.9.mlp.up_proj.weight_scale", "model.layers.0.self_attn.k_scale"]
        + ["model.layers.0.mlp.up_proj.input_scale", "model.rotary_emb.inv_freq"],
    )
