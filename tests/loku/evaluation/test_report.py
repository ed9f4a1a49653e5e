"""Reports as JSON, as a table and as figures."""

import json
import math

import pytest
import torch

from loku.evaluation import format_table, plot_measures, plot_probabilities, write_report


def test_report_is_strict_json(tmp_path):
    report = {
        "nan": math.nan,
        "list": [1, -math.inf, "é"],
        "tensor": torch.tensor([0.5, math.nan]),
        "scalar": torch.tensor(2.5).numpy(),
        "path": tmp_path,
        "none": None,
        3: True,
    }
    write_report(tmp_path / "new" / "report.json", report)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "new" / "report.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {
        "nan": None,
        "list": [1, None, "é"],
        "tensor": [0.5, None],
        "scalar": 2.5,
        "path": str(tmp_path),
        "none": None,
        "3": True,
    }


def test_table_has_a_column_a_model_and_a_dash_for_a_missing_value():
    table = format_table(
        {
            "before": {"probability": 0.99951, "p": 2.2e-16},
            "after": {"probability": 0.02, "p": math.nan, "rows": 40},
            "retain_only": {},
        }
    )
    cells = [line.split() for line in table.splitlines()]
    assert cells[0] == ["before", "after", "retain_only"]
    assert cells[2:] == [
        ["probability", "1.000", "0.020", "-"],
        ["p", "2.2e-16", "-", "-"],
        ["rows", "-", "40", "-"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_plot(tmp_path):
    history = [
        {"step": 0, "forget_probability": 1.0, "retain_probability": 1.0},
        {"step": 5, "loss": 1.0},
        {"step": 10, "forget_probability": 0.1, "retain_probability": None},
    ]
    plot_probabilities(tmp_path / "curve.png", history)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="forget_probability"):
        plot_probabilities(tmp_path / "none.png", [{"step": 1, "loss": 2.0}])
    plot_measures(
        tmp_path / "bars.png", {"forget": {"rouge": 0.5, "rows": 3}, "retain": {"probability": 1.0}}
    )
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no measure to plot"):
        plot_measures(tmp_path / "none.png", {"forget": {"perplexity": 3.0}})
