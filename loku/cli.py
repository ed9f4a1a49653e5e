"""The ``loku`` command."""

import argparse


def _demo(options):
    from loku.demo import format_report, run_demo

    report = run_demo(options.output, options.seed, progress=not options.quiet)
    print(format_report(report))
    print(f"\nwritten to {options.output}: adapter/, probabilities.png, report.json")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="loku", description="Unlearning for causal language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="unlearn two authors from a small model that ships with the package",
        description="Make the embedded model forget two of its 40 authors, and compare it with a twin that "
        "never saw them. Needs no network; about a minute on two cores.",
    )
    demo.add_argument("--output", default="loku-demo", help="directory to write to (default: loku-demo)")
    demo.add_argument("--seed", type=int, default=0, help="of the retain rows' order (default: 0)")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=_demo)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
