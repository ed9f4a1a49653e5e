"""``loku demo``."""

from __future__ import annotations

import argparse

from loku.commands import CommandParser, Commands


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "demo",
        help="unlearn two authors from a small model that ships with the package",
        description="Make the embedded model forget two of its 40 authors, and compare it with a twin that "
        "never saw them. Needs no network; about a minute on two cores.",
    )
    parser.add_argument("--output", default="loku-demo", help="directory to write to (default: loku-demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the retain rows' order (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the command with its parsed options."""
    from loku.demo import format_report, next_commands, run_demo

    report = run_demo(options.output, options.seed, progress=not options.quiet)
    print(format_report(report))
    files = "adapter/, probabilities.png, report.json, forget.jsonl, retain.jsonl"
    print(
        f"\nwritten to {options.output}: {files}\nnext, with settings of your own, or to measure the adapter:"
    )
    print("\n".join(f"    {command}" for command in next_commands(options.output)))
