"""Between the host and the device without waiting: what crosses lies in pinned memory.

torch keeps pinned memory that is given back until the copies that use it are done, so that nobody has to hold it.
Devices other than CUDA have no such memory; there a copy to the host is done when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.int64] | NDArray[np.int32]


def send(numbers: Numbers | Tensor, device: torch.device) -> Tensor:
    """What lies on the host, on the device as soon as this stream gets there. It must not change on a CPU."""
    host = numbers if isinstance(numbers, Tensor) else torch.from_numpy(numbers)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def send_list(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``send`` of a row of Python numbers."""
    return send(torch.tensor(values, dtype=dtype), device)


def fetch(tensor: Tensor) -> Tensor:
    """A copy on the host, to be read once a ``Moment`` that was made behind it has been waited for."""
    is_cuda = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)
    return host.copy_(tensor, non_blocking=is_cuda)


class Moment:
    """When the device has done all that this stream has been given so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not annotate it
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Returns when it has come; what was given to the stream later may still run."""
        if self._event is not None:
            self._event.synchronize()


class SideStream:
    """Copies to the device beside what its stream is busy with."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, numbers: Numbers) -> Tensor:
        """For what this stream is given from now on."""
        if self._stream is None:
            return send(numbers, self._device)
        main = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copy = send(numbers, self._device)
        main.wait_stream(self._stream)
        copy.record_stream(main)
        return copy
