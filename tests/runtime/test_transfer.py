"""Copies between host and device: what they hold, and that they are copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmserve.runtime.transfer import Moment, SideStream, fetch, send, send_list

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", DEVICES)
def test_there_and_back(name: str) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device(name)
    numbers = np.arange(12, dtype=np.int64).reshape(3, 4)
    there = send(numbers, device)
    assert there.device.type == name
    back = fetch(there * 2)
    moment = Moment(device)
    moment.wait()
    assert back.tolist() == (np.arange(12).reshape(3, 4) * 2).tolist()
    assert send_list([1.5, -2.0], torch.float32, device).tolist() == [1.5, -2.0]
    assert SideStream(device).send(numbers.astype(np.int32)).sum().item() == 66


def test_what_was_fetched_stays_when_the_device_goes_on() -> None:
    x = torch.arange(3)
    back = fetch(x)
    x.add_(5)
    assert back.tolist() == [0, 1, 2]


def test_an_empty_list_keeps_its_type() -> None:
    assert send_list([], torch.int64, torch.device("cpu")).dtype == torch.int64
