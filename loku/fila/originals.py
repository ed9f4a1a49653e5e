"""The original weights in host memory, copied while the device computes.

A copy from a GPU straight into ordinary (pageable) memory stops the host and runs at a fraction of the bus's
speed. So a thread copies on a stream of its own into two pinned buffers in turn, and from there into ordinary
memory. Pinned copies of all weights would be as much memory that the system cannot swap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

STAGING_BYTES = 64 << 20  # bytes of a pinned buffer; the bus needs no larger ones to be busy
_BUFFERS = 2  # the device fills one while the host empties the other


def pinned_memory(size: int) -> Tensor:
    """Allocate pinned memory, uint8, or ordinary memory where the system refuses to pin any."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)  # the copies are then slower, and as right


def _host_memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class _Piece(NamedTuple):
    """A part of a tensor on its way through a buffer.

    Args:
        event: The event at which the buffer holds the part.
        buffer: The buffer.
        target: The part of the copy, flat.
        ends: The name of the tensor if this is its last part, else None.
        copy: The whole copy.
    """

    event: Any
    buffer: Tensor
    target: Tensor
    ends: str | None
    copy: Tensor


class HostCopies:
    """Bitwise copies of tensors in ordinary host memory.

    Tensors on a CUDA device are copied by a thread, in their order. Such a tensor may be overwritten once
    ``wait_for`` has returned. The other tensors are copied at once.

    Args:
        tensors: The tensors by their names, of any dtype and shape. The current stream of their device may
            still be writing them.
        staged: A function that says of a tensor whether the thread copies it. By default it does on CUDA.
        cuda: The module with ``Stream``, ``stream`` and ``current_stream``; ``torch.cuda`` by default.
        allocate: A function that allocates a buffer of a number of bytes; ``pinned_memory`` by default.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        staged: Callable[[Tensor], bool] = lambda tensor: tensor.is_cuda,
        cuda: Any = torch.cuda,
        allocate: Callable[[int], Tensor] = pinned_memory,
    ) -> None:
        self._cuda, self._allocate = cuda, allocate
        self._copies: dict[str, Future[Tensor]] = {name: Future() for name in tensors}
        self._staged: dict[str, Tensor] = {}
        self._streams: dict[torch.device, Any] = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            if not staged(tensor):
                self._copies[name].set_result(tensor.to("cpu", copy=True))
                continue
            self._staged[name] = tensor
            if tensor.device not in self._streams:
                stream = self._streams[tensor.device] = cuda.Stream(tensor.device)
                stream.wait_stream(cuda.current_stream(tensor.device))
        Thread(target=self._run, name="host copies", daemon=True).start()

    def wait_for(self, name: str) -> Tensor:
        """Return the copy of a tensor as soon as it is made. Any error of the thread is raised here."""
        return self._copies[name].result()

    def finished(self) -> dict[str, Tensor]:
        """Wait until the thread has made all copies or failed, and return those that are made, by name."""
        return {name: copy.result() for name, copy in self._copies.items() if copy.exception() is None}

    def _run(self) -> None:
        error: BaseException = RuntimeError("the copying ended before all copies were made")
        try:
            self._copy_all()
        except BaseException as raised:  # it belongs to the thread that waits
            error = raised
        for copy in self._copies.values():
            if not copy.done():
                copy.set_exception(error)

    def _copy_all(self) -> None:
        if not self._staged:
            return
        buffers = deque(self._allocate(STAGING_BYTES) for _ in range(_BUFFERS))
        pieces: deque[_Piece] = deque()
        for name, tensor in self._staged.items():
            stream = self._streams[tensor.device]
            copy = _host_memory(tensor.shape, tensor.dtype)
            with self._cuda.stream(stream):
                source, target = tensor.reshape(-1), copy.view(-1)
                step = STAGING_BYTES // tensor.element_size()
                for start in range(0, max(1, len(source)), step):
                    if not buffers:
                        buffers.append(self._empty(pieces.popleft()))
                    buffer, part = buffers.popleft(), slice(start, start + step)
                    filled = _like(buffer, target[part])
                    filled.copy_(source[part], non_blocking=True)
                    ends = name if start + step >= len(source) else None
                    pieces.append(_Piece(stream.record_event(), buffer, target[part], ends, copy))
        while pieces:
            self._empty(pieces.popleft())

    def _empty(self, piece: _Piece) -> Tensor:
        """Copy a piece to its place in ordinary memory, and return its buffer."""
        piece.event.synchronize()
        piece.target.copy_(_like(piece.buffer, piece.target))
        if piece.ends is not None:
            self._copies[piece.ends].set_result(piece.copy)
        return piece.buffer


def _like(buffer: Tensor, target: Tensor) -> Tensor:
    """The begin of a buffer, seen with the dtype and size of a flat tensor."""
    return buffer[: target.nbytes].view(target.dtype)
