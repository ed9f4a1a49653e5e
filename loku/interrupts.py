"""Signals wait while something is changed, registered or put back.

Python calls the handler of a signal between two instructions of the main thread, wherever that is. So a
second Ctrl-C can end a ``finally`` halfway, and a first one can fall between a change and its ``try``. The
contexts of this module close both windows. A handler of their own is in place while one of them is entered.
It looks at the stack. A signal that falls into the beginning or the end of a context waits until that is
done. Any other signal goes to the handler that the process had.

A signal that waits for the beginning of a context is raised in its block, so that the context undoes what it
did. Signals reach the main thread alone; other threads have nothing to wait for.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import _GeneratorContextManager
from functools import wraps
from types import CodeType, FrameType
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # those that end a process, if it has a handler for them
_codes: set[CodeType] = set()  # of the functions that no signal interrupts
_handlers: dict[int, Any] = {}  # those of the process, by the number of the signal
_waiting: list[int] = []
_entered = 0  # the contexts of the main thread that are entered


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_inside(frame: FrameType | None) -> bool:
    """Whether a frame, or one that called it, is that of a function that no signal interrupts."""
    while frame is not None:
        if frame.f_code in _codes:
            return True
        frame = frame.f_back
    return False


def _handle(number: int, frame: FrameType | None) -> None:
    if not _is_inside(frame):
        _handlers[number](number, frame)
    elif number not in _waiting:
        _waiting.append(number)


def _deliver(caller: FrameType | None) -> None:
    """Call the handlers of the signals that waited, unless the calling function is to end undisturbed too."""
    while _waiting and _in_main_thread() and not _is_inside(caller):
        _call_handler(_waiting.pop(0), caller)


def _call_handler(number: int, frame: FrameType | None) -> None:
    if signal.getsignal(number) is not signal.SIG_IGN:  # by now
        _handlers[number](number, frame)


def raise_waiting() -> None:
    """Call the handlers of the signals that waited until now, at the end of an ``uninterrupted_context``.

    The end of a context that takes long calls this before it lets its changes stand, while it can undo them.
    """
    caller = sys._getframe(1)
    while _waiting and _in_main_thread():
        _call_handler(_waiting.pop(0), caller)


def _install() -> bool:
    """Put the handler in place, and return whether this is the main thread, which alone can."""
    global _entered
    if not _in_main_thread():
        return False
    if _entered == 0:
        _waiting.clear()
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not _handle:  # not the default action, and not ignored
            _handlers[number] = handler
            signal.signal(number, _handle)
    _entered += 1
    return True


def _uninstall() -> None:
    global _entered
    _entered -= 1
    if _entered == 0 and _in_main_thread():
        for number in reversed(_SIGNALS):  # after the first is back, it may raise
            if signal.getsignal(number) is _handle:
                signal.signal(number, _handlers[number])


class _Uninterrupted(_GeneratorContextManager[_T]):
    """A context manager of a generator whose beginning and end no signal interrupts."""

    def __enter__(self) -> _T:
        entered, installed, caller = False, _install(), sys._getframe(1)
        try:
            value = super().__enter__()
            entered = True
            _deliver(caller)
        except BaseException as error:
            try:
                if entered:
                    super().__exit__(type(error), error, error.__traceback__)
            finally:
                if installed:
                    _uninstall()
            raise
        self._installed = installed
        return value

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> bool | None:
        caller = sys._getframe(1)
        try:
            if kind is None:
                _deliver(caller)  # the last moment at which the block can still fail
        except BaseException as error:
            super().__exit__(type(error), error, error.__traceback__)
            raise
        else:
            return super().__exit__(kind, value, traceback)
        finally:
            if self._installed:
                _uninstall()
            _deliver(caller)


def uninterrupted_context(
    function: Callable[_P, Iterator[_T]],
) -> Callable[_P, _GeneratorContextManager[_T]]:
    """A ``contextlib.contextmanager`` whose parts before and after the ``yield`` no signal interrupts.

    A signal that comes meanwhile is handled after that part. If the handler raises, as that of Ctrl-C does,
    the context is undone like one whose block raised. Work that takes long belongs into the block.

    Args:
        function: The generator function.

    Returns:
        The function that makes the context, which is a decorator, too.
    """

    @wraps(function)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> _GeneratorContextManager[_T]:
        return _Uninterrupted(function, args, kwargs)  # type: ignore[arg-type]

    return made


def uninterrupted(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function, and let signals wait until it has returned.

    This has an effect inside an ``uninterrupted_context``.

    Args:
        function: The function, which should not take long.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        The result of the function.
    """
    caller = sys._getframe(1)
    try:
        return function(*args, **kwargs)
    finally:
        _deliver(caller)


_codes |= {
    _Uninterrupted.__enter__.__code__,
    _Uninterrupted.__exit__.__code__,
    uninterrupted.__code__,
}
