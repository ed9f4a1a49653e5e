"""Streams and pinned buffers whose copies run as late as a device may run them, for tests without one."""

from contextlib import contextmanager
from typing import ClassVar

import torch


class LateBuffer(torch.Tensor):
    """A buffer that is filled only when somebody waits for the event after the copy."""

    queued: ClassVar[list] = []  # shared by all views and buffers; the next event takes them

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and isinstance(args[0], cls) and (kwargs or {}).get("non_blocking"):
            target, source = (x.as_subclass(torch.Tensor) for x in args)
            cls.queued.append((target, source))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


class Event:
    def __init__(self, copies):
        self.copies = copies

    def synchronize(self):
        for target, source in self.copies:
            target.copy_(source)
        self.copies = []


class Stream:
    def __init__(self, log, device):
        self.log, self.device = log, device

    def wait_stream(self, other):
        self.log.append(("wait", self.device, other))

    def record_event(self):
        event = Event(list(LateBuffer.queued))
        self.log.append(("copy", self.device, sum(target.nbytes for target, _ in event.copies)))
        LateBuffer.queued.clear()
        return event


class LateCuda:
    """Stands for ``torch.cuda``; ``log`` has what happened to its streams, in order."""

    def __init__(self):
        self.log, self.allocated = [], []

    def Stream(self, device):
        return Stream(self.log, device)

    @contextmanager
    def stream(self, stream):
        yield stream

    def current_stream(self, device):
        return f"current stream of {device}"

    def allocate(self, size):
        self.allocated.append(size)
        return torch.full((size,), 255, dtype=torch.uint8).as_subclass(LateBuffer)
