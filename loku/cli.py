"""The ``loku`` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, TextIO

from loku.commands import (
    CommandParser,
    alternates,
    benchmark,
    demo,
    evaluate,
    export,
    forget,
    info,
    record,
    unlearn,
)
from loku.commands.settings import suggestion
from loku.cpu_threads import wait_passively
from loku.interrupts import uninterrupted_context

EPILOG = """\
exit codes:
  0    done
  1    the run failed, the rows of a request are not forgotten, or a record does not verify
  2    something is wrong with the options, the data or the model that was given
  130  interrupted
  141  the reader of the output went away

LOKU_DEBUG=1 in the environment shows where in the code an error came from."""


INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The arguments after ``loku``; None (default) takes them from the command line.

    Returns:
        The exit code; see ``EPILOG``.

    Raises:
        SystemExit: argparse has shown help, or an option is wrong.
    """
    with _interrupts_are_a_line(ends_process=arguments is None):
        return _main(arguments)
    return INTERRUPTED


@uninterrupted_context
def _interrupts_are_a_line(ends_process: bool) -> Iterator[None]:
    """A context that ends at an interrupt with one line. Further ones have no effect if the process ends."""
    try:
        yield
    except KeyboardInterrupt:
        if _debugging():
            raise
        if ends_process:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"{_prefix()}interrupted", file=sys.stderr)


def _debugging() -> bool:
    return os.environ.get("LOKU_DEBUG", "") not in ("", "0")


def _main(arguments: Sequence[str] | None) -> int:
    wait_passively()
    parser = argparse.ArgumentParser(
        prog="loku",
        description="Unlearning for causal language models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="show the version, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for module in (demo, unlearn, forget, evaluate, benchmark, alternates, export, record, info):
        added = module.add(commands)
        added.allow_abbrev = False
        added.set_defaults(parser=added)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known, name = options.parser._option_string_actions, unknown[0].partition("=")[0]
        options.parser.error(f"there is no option {name}{suggestion(name, known)}")
    debug = _debugging()
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = _show_warning
        try:
            code = options.run(options) or 0
            sys.stdout.flush()
        except BrokenPipeError:  # of a reader such as head, which wants no more
            _close_stdout()
            return BROKEN_PIPE
        except Exception as error:
            if debug:
                raise
            code, text = _explain(error)
            print(f"{_prefix()}{text}", file=sys.stderr)
    return code


class _Version(argparse.Action):
    """Print the version. The packages' metadata have it, which are read without torch."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        try:
            version = metadata.version("loku-kernels")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            from loku_kernels import __version__ as version
        print(f"loku-kernels {version}")
        parser.exit()


def _close_stdout() -> None:
    """Let nothing else be written to a broken pipe, at the interpreter's exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> tuple[int, str]:
    """Return the exit code of an error, and a message for a person."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    # transformers raises an OSError without a number for a model that it cannot load.
    of_files = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    if isinstance(error, (ValueError, ImportError, IndexError, *of_files)) or (
        isinstance(error, OSError) and error.errno is None
    ):
        return 2, f"error: {text}"
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return 1, f"the run failed: {kind}{text}\n(LOKU_DEBUG=1 shows where)"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"{_prefix()}warning: {message}", file=sys.stderr)


def _prefix() -> str:
    rank = os.environ.get("RANK")
    return "loku: " if rank is None else f"loku, process {rank}: "


if __name__ == "__main__":
    sys.exit(main())
