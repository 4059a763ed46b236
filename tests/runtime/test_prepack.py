from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lmserve.runtime.prepack import PrepackedLinear, leave_the_files, prepack
from tests.runtime.tiny_models import build_tiny, in_dtype

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 kernels"
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), [(48, 96), (160, 48), (33, 17)])
def test_the_same_bits_as_the_plain_layer(out_features: int, in_features: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16)
    packed = PrepackedLinear(plain)
    with torch.inference_mode():
        for rows in (1, 2, 4, 7, 8, 33, 128):
            x = torch.randn(rows, in_features).to(torch.bfloat16)
            assert torch.equal(packed(x), linear(x, plain.weight, plain.bias))
        assert torch.equal(packed.weight, plain.weight)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    torch.manual_seed(0)
    packed = PrepackedLinear(nn.Linear(96, 64, dtype=torch.bfloat16))
    x = torch.randn(300, 96).to(torch.bfloat16)
    with torch.inference_mode():
        whole = packed(x)
        for rows in (4, 5, 8, 17, 64, 299):
            assert torch.equal(packed(x[:rows]), whole[:rows])


def test_a_models_logits_do_not_change_and_tied_embeddings_stay() -> None:
    model = in_dtype(build_tiny("llama", tie_word_embeddings=True), torch.bfloat16)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        assert prepack(model, CPU, torch.bfloat16) == 4 * 7 + 1
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_other_formats_are_left_alone() -> None:
    model = build_tiny("llama")
    assert prepack(model, CPU, torch.float32) == 0
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())


def test_float32_is_prepacked_for_those_who_ask_for_it() -> None:
    model = build_tiny("llama")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        assert prepack(model, CPU, torch.float32, (torch.float32,)) == 4 * 7 + 1
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, rtol=0, atol=1e-5)


def test_leaving_the_files_copies_every_weight_once() -> None:
    """Tied ones stay one."""
    model = build_tiny("llama", tie_word_embeddings=True)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    leave_the_files((*model.parameters(), *model.buffers()))
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() != before[name]
        assert torch.equal(parameter, values[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight
