"""The first tables of README: an answer before and after unlearning, and the measures of the demo."""

from result_files import markdown_table
from tables import DEMO_METRICS, Result

from loku.demo import MEASURES

LEFT_OUT = ("extraction_likelihood_10", "retain_perplexity")  # README is short; docs/benchmarks.md has all


def forgetting(result: Result) -> str:
    """Return the answer to the first question of the demo's first seed, and that run's measures."""
    run = result["rows"][0]
    sample = run["samples"][0]
    columns = [run["before"], run["after"], run["retain_only"]]
    lines = []
    for metric, (name, form) in DEMO_METRICS.items():
        if metric in LEFT_OUT:
            continue
        cells = ("-" if column[metric] is None else format(column[metric], form) for column in columns)
        good, meaning = MEASURES[metric]
        lines.append([name, *cells, good, meaning])
    return (
        f"> {sample['question']}\n>\n> before: {sample['before']}\n>\n> after: {sample['after']}\n\n"
        + markdown_table(["measure", "before", "after", "twin", "better", "meaning"], lines)
    )
