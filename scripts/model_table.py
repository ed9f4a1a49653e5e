"""The table of tested model classes in docs/models.md.

    python scripts/model_table.py            # write the table of the committed results
    python scripts/model_table.py --run      # run every class first (minutes), and write the results

``tests/loku/test_model_classes.py`` runs the classes, too, and fails where the committed results differ.
"""

import argparse
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "model_table.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- model classes -->", "<!-- /model classes -->"

Facts = dict[str, Any]


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(facts: Facts) -> str:
    targets = _names(facts["modules"])
    if facts["parameters"]:
        targets += f"; as tensors {_names(facts['parameters'])}"
    if not facts["init"]:
        start, saves = f"refused: {facts['refusal']}", "-"
    else:
        saves = "portable, residual, merged"
        if facts["init"] == "default":
            start = f'refused: {facts["refusal"]} `init="default"` works'
        else:
            start = "linears; default LoRA for the tensors" if facts["parameters"] else "all targets"
    return f"| `{facts['class']}` (`{facts['kind']}`) | {targets or '-'} | {start} | {saves} |"


def table(results: list[Facts]) -> str:
    """Return the table of some results, in Markdown.

    Args:
        results: The facts of each class: its ``kind`` (the model type), ``class``, ``modules``,
            ``parameters``, ``init`` and ``refusal``, as ``run`` records them.
    """
    rows = [_row(facts) for facts in sorted(results, key=lambda facts: facts["class"].lower())]
    works = sum(bool(facts["init"]) for facts in results)
    head = [
        f"{works} classes work, and {len(results) - works} are refused.",
        "",
        "| class (model type) | default targets | FILA | saves |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def render(page: str, results: list[Facts]) -> str:
    """Return a page with the table of some results between its markers."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def _run_all() -> list[Facts]:
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import model_classes

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = []
    for kind in model_classes.KINDS:
        with tempfile.TemporaryDirectory() as directory:
            shown = model_classes.run(kind, Path(directory))
        print(kind, "works" if shown.init else "refused", shown.wrong() or "", flush=True)
        results.append(shown.facts())
    return results


def main() -> None:
    """Write the table, and with --run the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help=f"run every class and write {RESULTS.name}")
    if parser.parse_args().run:
        lines = ",\n".join(json.dumps(facts) for facts in _run_all())
        RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
