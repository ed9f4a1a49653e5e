"""Options that name an unlearned model and its data, for the experiments that measure one."""

import argparse
from collections.abc import Sequence


def unlearned_model_parser(description: str | None, result: str) -> argparse.ArgumentParser:
    """Return a parser with the options of a model, its adapter, its data, the seed and the result file.

    Args:
        description: The description of the command.
        result: The default of the result file, for the help.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="PATH", help="the original model (default: the embedded one)")
    parser.add_argument("--adapter", metavar="PATH", help="with --model: the adapter that unlearned it")
    parser.add_argument("--forget", metavar="FILE", help="with --model: a data set, as for loku evaluate")
    parser.add_argument("--retain", metavar="FILE", help="with --model: a data set, as for loku evaluate")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", metavar="FILE", help=f"result file (default: {result})")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options, and refuse a model without its adapter or its data."""
    options = parser.parse_args(argv)
    if options.model is not None and None in (options.adapter, options.forget, options.retain):
        parser.error("--model needs --adapter, --forget and --retain")
    return options
