"""What the tables of compiled kernels have in common: the file, the comparison with it, the command line.

A table is {compiler: its version, "kernels": {kernel: {architecture: facts}}}.
"""

import argparse
import json


def differences(ours, committed, compiler):
    """Lines that say where a table is not as committed: facts, if the compiler's version is the same."""
    found = []
    if other := ours["kernels"].keys() ^ committed["kernels"].keys():
        found.append(f"not the kernels that are recorded: {sorted(other)}")
    if ours[compiler] != committed[compiler]:
        return found
    for name, row in ours["kernels"].items():
        for architecture, facts in row.items():
            recorded = committed["kernels"].get(name, {}).get(architecture)
            if facts != recorded:
                found.append(f"{name} on {architecture}: {facts}, recorded {recorded}")
    return found


def argument_parser(description, path):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {path.name}")
    return parser


def report(ours, path, problems, write):
    """Write the table, if asked to; say what ``problems(ours, committed)`` finds, and exit with 1 for any."""
    if write:
        path.write_text(json.dumps(ours, indent=1) + "\n")
    wrong = problems(ours, json.loads(path.read_text()))
    print("\n".join(wrong) or f"as in {path.name}")
    raise SystemExit(1 if wrong else 0)
