"""The commands of ``loku``. Each module is one command; its ``add(commands)`` adds the parser."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loku.data import QuestionTemplate


class CommandParser(argparse.ArgumentParser):
    """The parser of one command, which may add options when its command is given.

    ``add_later`` is a function that adds those options, or None. A command whose options need a slow import
    sets it, so that the help of ``loku`` and the other commands do not wait.
    """

    add_later: Callable[[], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Add the later options, then parse as argparse does."""
        if self.add_later is not None:
            add_later, self.add_later = self.add_later, None
            add_later()
        return super().parse_known_args(*args, **kwargs)


def check_local(option: str, name: str) -> None:
    """Refuse the path of a directory that is not there. A name that is no path is left to the hub.

    Args:
        option: The option or argument, for the message.
        name: The path or hub name.

    Raises:
        ValueError: It is a path, and no directory is there.
    """
    path = Path(name)
    in_a_folder = "/" in name and path.parent.is_dir()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or in_a_folder
    if looks_local and not path.is_dir():
        raise ValueError(f"{name}, the {option}, is not a directory")


def accept_underscores(parser: argparse.ArgumentParser) -> None:
    """Let ``--max_length`` stand for ``--max-length``, and so on; the help shows the latter alone."""
    known = parser._option_string_actions
    for text, action in [*known.items()]:
        if text.startswith("--"):
            known.setdefault("--" + text.removeprefix("--").replace("-", "_"), action)


def named_source(text: str) -> tuple[str, str]:
    """Read ``NAME=SOURCE``, the value of an option that names data sets."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SOURCE, such as forget=forget.jsonl")
    return name, source


def json_object(text: str) -> dict[str, Any]:
    """Read the value of an option that is a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def add_template_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the template of questions and answers to a parser."""
    parser.add_argument(
        "--question-template",
        metavar="TEXT",
        help="prompt of rows of question and answer: a text with {question}, or chat for the tokenizer's "
        "chat template (default: TOFU's)",
    )
    parser.add_argument(
        "--answer-template",
        metavar="TEXT",
        help="text of their answers, with {answer}; it belongs to --question-template",
    )


def template_of(options: argparse.Namespace) -> QuestionTemplate:
    """Return the template that the options of ``add_template_options`` name; ``ValueError`` if it is none."""
    from loku.data.question_templates import QuestionTemplate

    return QuestionTemplate(options.question_template, options.answer_template)


Commands = argparse._SubParsersAction  # the argument of ``add``: the commands of the parser of ``loku``
