"""What bfloat16 and 8 bits cost, on the starter model; docs/embeddings.md has the figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lmserve.errors import ModelLoadFailed
from lmserve.models.starter import STARTERS, find_source
from lmserve.runtime.quantization import Int8Linear
from tests.runtime.encoder.tiny_encoders import encode_texts, load, make_texts, vectors, write_encoder

LEAST_COSINE = {"bfloat16": 0.999, "int8": 0.98}
LEAST_MEAN = {"bfloat16": 0.9998, "int8": 0.995}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def english(count: int) -> list[str]:
    """Pieces of our own pages, of 1 to 60 words."""
    root = Path(__file__).parents[3]
    words = "\n".join((root / name).read_text() for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")).split()
    return [" ".join(words[7 * i % 900 :][: 1 + i % 60]) for i in range(count)]


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_what_less_precision_costs(precision: str) -> None:
    folder = find_source(STARTERS["all-minilm-l6-v2"])
    inputs = encode_texts(folder, english(100))
    exact = vectors(load(folder), inputs)
    options = {"quantization": "int8"} if precision == "int8" else {"dtype": "bfloat16"}
    runner = load(folder, **options)
    got = vectors(runner, inputs)
    cosines = (exact * got).sum(axis=1) / np.linalg.norm(got, axis=1)
    assert cosines.min() >= LEAST_COSINE[precision]
    assert cosines.mean() >= LEAST_MEAN[precision]
    assert np.abs(exact - got).max() > 1e-5, "it is not the same after all"


def test_company_does_not_change_a_vector_in_8_bits(tmp_path: Path) -> None:
    """Each row has a scale of its own. What is left is float32's rounding, now and then across a step of the scale."""
    folder = write_encoder(tmp_path / "m", "bert")
    runner = load(folder, quantization="int8")
    inputs = encode_texts(folder, make_texts(20))
    together = vectors(runner, inputs)
    alone = np.concatenate([vectors(runner, [each]) for each in inputs])
    cosines = (together * alone).sum(axis=1) / np.linalg.norm(together, axis=1) / np.linalg.norm(alone, axis=1)
    assert cosines.min() > 0.9999


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_8_bits_is_the_rounded_product(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    layer = Int8Linear(linear)
    x = torch.randn(rows, 40)
    scale_x = x.abs().amax(dim=1, keepdim=True) / 127
    scale_w = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = ((x / scale_x).round() * scale_x).double() @ ((linear.weight / scale_w).round() * scale_w).double().t()
    expected = rounded + (linear.bias.double() if linear.bias is not None else 0)
    with torch.inference_mode():
        assert torch.allclose(layer(x).double(), expected, atol=1e-5)
        assert torch.allclose(layer(x[None])[0], layer(x))
        assert torch.equal(layer(torch.zeros(2, 40)), layer(torch.zeros(2, 40)))
        assert torch.isfinite(layer(torch.zeros(2, 40))).all()
    assert torch.allclose(layer.weight, linear.weight, atol=float(scale_w.max()))


def test_8_bits_are_for_encoders_on_a_cpu(tmp_path: Path) -> None:
    runner = load(write_encoder(tmp_path / "m", "bert"), quantization="int8")
    assert runner.info.dtype == "int8 and float32"
    with pytest.raises(ModelLoadFailed, match="device cuda"):
        load(tmp_path / "m", quantization="int8", device="cuda")
