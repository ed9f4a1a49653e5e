"""A hostile reference log gets one clear error, before the model is loaded."""

import copy
import json

import pytest

from loku import cli
from loku.evaluation.tofu_logs import check_reference

LOG = {
    "eval_log_forget.json": {
        "average_perturb_loss": {"0": [1.0, 2.0]},
        "avg_paraphrased_loss": {"0": 1.0},
        "generated_text": {"0": ["Question: Who?\n", "Ann.", "Ann."]},
    }
}
ROWS = [{"question": "Who?", "answer": "Ann.", "perturbed_answer": ["Bob.", "Cid."]}]


def changed(quantity, value):
    log = copy.deepcopy(LOG)
    log["eval_log_forget.json"][quantity] = value
    return log


def test_a_good_log_passes():
    check_reference(LOG, ROWS, "the log")


HOSTILE_FORMS = [
    *([], "x", None, 3, {"eval_log_forget.json": [1]}, {"eval_log_forget.json": "average_perturb_loss"}),
    *(
        changed("average_perturb_loss", value)
        for value in ([1], {"0": "a"}, {"0": {}}, {"0": [10**400]}, None)
    ),
    *(changed("avg_paraphrased_loss", value) for value in ("x", {"0": 10**400}, {"0": ["x"]})),
    *(
        changed("generated_text", value)
        for value in ([1], {"0": []}, {"0": [1, 2, 3]}, {"0": 5}, {"0": None})
    ),
]


@pytest.mark.parametrize("log", HOSTILE_FORMS, ids=str)
def test_hostile_forms(log):
    with pytest.raises(ValueError, match="the log has not the form of TOFU's logs"):
        check_reference(log, ROWS, "the log")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 10**6, "is not JSON"),
        ('{"a": ' * 10**5, "is not JSON"),
        ("1" * 10**5, "is not JSON"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "has not the form of TOFU's logs"),
        ("{}", "has no forget section"),
    ],
)
def test_the_command_refuses_it_first(text, problem, tmp_path, capsys):
    path, rows = tmp_path / "log.json", tmp_path / "rows.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    rows.write_text("".join(json.dumps(row) for row in ROWS))
    places = [str(tmp_path / "no_model"), "--data", f"forget={rows}", "--out", str(tmp_path / "report.json")]
    assert cli.main(["evaluate", *places, "--reference-log", str(path)]) == 2
    printed = capsys.readouterr().err
    assert problem in printed and len(printed) < 1000
    if problem == "is not JSON":
        assert f"error: {path} is not JSON" in printed
