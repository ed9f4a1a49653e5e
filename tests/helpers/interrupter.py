"""Ctrl-C between two instructions that Python would handle it between, and again during the unwinding.

Python calls the handler of a signal at the beginning of a function, after a call and at the end of a loop's
body, and nowhere else. A trace function stops at these places of the chosen files.
"""

import dis
import random
import signal
import sys

_CALLS = {code for name, code in dis.opmap.items() if name.startswith("CALL")}
_LOOPS = {code for name, code in dis.opmap.items() if name.startswith("JUMP_BACKWARD")}
_HANDLED_AFTER = _CALLS | _LOOPS


class Interrupter:
    """Count the places in a call, and raise SIGINT at one of them.

    ``first`` has the numbers of the places that are different instructions, if none is interrupted.

    Args:
        files: The parts of the names of the files whose places count.
        at: The number of the place, from 0; None counts only.
        again: The probability of a further SIGINT at each beginning and end of a function after the first.
    """

    def __init__(self, files, at=None, again=0.0):
        self.files, self.at, self.again = files, at, again
        self.places = self.signals = 0
        self.where, self.first = None, {}
        self._random, self._codes, self._own = random.Random(at), {}, __file__

    def error_of(self, function):
        """Call a function, and return what it raised, or None."""
        hook, sys.unraisablehook = (
            sys.unraisablehook,
            lambda unraisable: None,
        )  # of a generator that is closed
        sys.settrace(self._trace)
        try:
            function()
        except BaseException as raised:
            return raised
        finally:
            sys.setprofile(None)
            sys.settrace(None)
            sys.unraisablehook = hook

    def _trace(self, frame, event, arg):
        code = frame.f_code
        if code not in self._codes:
            chosen = any(part in code.co_filename for part in self.files) and code.co_filename != self._own
            self._codes[code] = code.co_code if chosen else None
        instructions = self._codes[code]
        if instructions is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        previous = None

        def local(frame, event, arg):
            nonlocal previous
            if event == "opcode":
                if previous in _HANDLED_AFTER:
                    self._place(frame)
                previous = instructions[frame.f_lasti]
            elif event == "exception":
                previous = None  # a call that raises is not followed by the handler
            return local

        self._place(frame)
        return local

    def _place(self, frame):
        if self.at is None:
            self.first.setdefault((frame.f_code, frame.f_lasti), self.places)
        self.places += 1
        if self.places - 1 == self.at:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
            sys.settrace(None)
            if self.again:
                sys.setprofile(self._profile)
            self._signal()

    def _profile(self, frame, event, arg):
        if event in ("call", "c_return") and self._random.random() < self.again:
            self._signal()

    def _signal(self):
        self.signals += 1
        signal.raise_signal(signal.SIGINT)
