"""``loku record``: check the record of a deletion, or a ledger of records."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from loku.commands import CommandParser, Commands

DESCRIPTION = """\
Check a record of "loku forget" or a ledger, a folder of records: hash all files again, and check record.json,
the signatures and the chain of the ledger. The exit code is 0 if all is well, and 1 if something was changed
or is missing."""


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "record", help="check the record of a deletion, or a ledger of records", description=DESCRIPTION
    )
    parser.add_argument("action", choices=("verify",), help="what to do")
    parser.add_argument("directory", metavar="DIR", help="the folder of the record or of the ledger")
    parser.add_argument(
        "--public-key",
        metavar="FILE",
        help="the Ed25519 public key that you trust, in PEM; each record must be signed by it",
    )
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command with its parsed options, and return its exit code."""
    from loku.deletion.ledger import LEDGER
    from loku.deletion.record import RECORD
    from loku.deletion.seal import SUMS

    directory = Path(options.directory)
    held = set(os.listdir(directory))
    if LEDGER in held:
        problems, lines = _ledger(directory, options.public_key)
    elif held & {RECORD, SUMS}:
        problems, lines = _record(directory, options.public_key)
    else:
        raise ValueError(f"{directory} is neither a record nor a ledger: it has no {RECORD} and no {LEDGER}")
    for problem in problems:
        print(f"wrong: {problem}")
    print("\n".join(lines))
    print(f"{directory}: {'does not verify' if problems else 'verified'}")
    return 1 if problems else 0


def _record(directory: Path, public_key: str | None) -> tuple[list[str], list[str]]:
    from loku.deletion.seal import PUBLIC_KEY, SUMS, verify_record

    found = verify_record(directory, public_key)
    lines = [f"{found.files} files were hashed and compared with {SUMS}"]
    if found.signed_by is None:
        lines.append(
            "no signature holds: a forger can change the files and make new digests of them, and nothing "
            "here would show it"
        )
    elif found.trusted:
        lines.append(f"signed by the key that you trust (SHA-256 {found.signed_by})")
    else:
        lines.append(
            f"signed by the key {PUBLIC_KEY} in the folder (SHA-256 {found.signed_by}), which proves nothing "
            "about who signed: anybody can put a key there. Pass the signer's key, got from elsewhere, as "
            "--public-key"
        )
    return found.problems, lines


def _ledger(directory: Path, public_key: str | None) -> tuple[list[str], list[str]]:
    from loku.deletion.ledger import LEDGER, read_ledger, verify_ledger

    problems = verify_ledger(directory, public_key)
    try:
        ledger = read_ledger(directory)
    except ValueError:  # one of the problems
        return problems, []
    count = len(ledger.entries)
    lines = [
        f"{count} {'record' if count == 1 else 'records'} of {LEDGER} checked",
        f"the last line has the SHA-256 {ledger.last_digest}; keep it elsewhere, because the ledger cannot "
        "show that lines are missing at its end",
    ]
    if public_key is None:
        lines.append("who signed the records was not checked; pass --public-key")
    return problems, lines
