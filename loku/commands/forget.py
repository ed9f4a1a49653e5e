"""``loku forget``."""

from __future__ import annotations

import argparse

from loku.commands import CommandParser, Commands, accept_underscores


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "forget",
        help="do a deletion request: unlearn, attack the result, and record what was done",
        usage="loku forget REQUEST.yaml [--output DIR] [--sign-key FILE] ... | loku forget --init DIR",
        description="Do a deletion request from its file to a sealed record and a model that can be served. "
        "It checks that the model knows the rows, unlearns them to the limits of the request, attacks what "
        "came out, and writes record.json, record.md and record.html beside the adapter or the model. A run "
        "that was stopped goes on if it is started again.",
        epilog="The exit code is 0 if nothing of the request is left to do, and 1 if its rows or those of an "
        "earlier request of the ledger are not forgotten. loku record verify DIR checks the folder.",
    )
    parser.add_argument("request", nargs="?", metavar="REQUEST.yaml", help="the request")
    parser.add_argument("--init", metavar="DIR", help="write a commented example of a request, and exit")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the record (default: NAME-record for NAME.yaml, in the request's ledger or here)",
    )
    parser.add_argument(
        "--include-near-duplicates",
        action="store_true",
        help="forget the near duplicates of the rows, too, as include: true in the request",
    )
    parser.add_argument(
        "--export-rank",
        type=int,
        metavar="R",
        help="compress the adapter to this rank, as rank: R in the request (default: exact)",
    )
    parser.add_argument("--sign-key", metavar="FILE", help="Ed25519 private key (PEM) that signs the record")
    parser.add_argument("--quiet", action="store_true", help="no stages and no progress bars")
    parser.set_defaults(run=run)
    accept_underscores(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command with its parsed options, and return the exit code."""
    if (options.request is None) == (options.init is None):
        raise ValueError("give a request, or --init DIR for an example of one: loku forget REQUEST.yaml")
    from loku.deletion.request import read_request, write_template

    if options.init is not None:
        for file in write_template(options.init):
            print(file)
        return 0

    import dataclasses
    import warnings

    import transformers

    from loku.deletion.procedure import forget

    request = read_request(options.request)
    if options.include_near_duplicates:
        request = dataclasses.replace(request, include_near_duplicates=True)
    if options.export_rank is not None:
        request = dataclasses.replace(request, rank=options.export_rank)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if options.quiet:
        transformers.logging.disable_progress_bar()
    result = forget(request, options.output, key=options.sign_key, progress=not options.quiet)
    print(result.summary)
    return 0 if result.done else 1
