"""The forms of logs: TOFU's by index and with lists, one set's, and open-unlearning's, read and written."""

import gzip
import json
import math
from pathlib import Path

import pytest
from tofu_sections import random_log

from loku.evaluation import forget_quality, model_utility, utility_table
from loku.evaluation.log_forms import SECTIONS, TRUTH_RATIO, read_log, tofu_log
from loku.evaluation.open_unlearning import open_unlearning_log, open_unlearning_summary
from loku.evaluation.tofu_logs import check_forget_section, check_reference

FORGET = SECTIONS["forget"]
# The figures are those of locuslab/open-unlearning, src/evals/metrics/memorization.py (truth_ratio,
# probability_w_options, and the mean of exp(-mean loss)), privacy.py (ks_test) and utility.py (hm_aggregate)
# (commit d3d7cf9), run on the losses of random_log(10, scale) with random_log(20, 0.7) as the reference. In
# the second log the losses are as of a collapsed model, 24 nats in the mean.
OPEN_UNLEARNING = {
    0.8: {
        "forget_Q_A_Prob": 0.25642073363293083,
        "forget_Q_A_PARA_Prob": 0.3499398095455292,
        "forget_Q_A_PERT_Prob": 0.3109512392156436,
        "forget_Q_A_ROUGE": 0.29999999999999993,
        "forget_truth_ratio": 0.4863160117348926,
        "forget_quality": 0.17453300569806826,
        "retain_Q_A_Prob": 0.3925392408423279,
        "retain_Q_A_PARA_Prob": 0.29803692138075205,
        "retain_Q_A_PERT_Prob": 0.3360349180308096,
        "retain_Q_A_ROUGE": 0.3333333333333333,
        "retain_Truth_Ratio": 0.18457213770338013,
        "ra_Q_A_Prob": 0.16645339786322874,
        "ra_Q_A_PERT_Prob": 0.28268167135432365,
        "ra_Q_A_Prob_normalised": 0.17617690682520618,
        "ra_Q_A_ROUGE": 0.2592592592592593,
        "ra_Truth_Ratio": 0.10801636989961236,
        "wf_Q_A_Prob": 0.3207226124798819,
        "wf_Q_A_PERT_Prob": 0.253032129634114,
        "wf_Q_A_Prob_normalised": 0.40550087241535016,
        "wf_Q_A_ROUGE": 0.3148148148148148,
        "wf_Truth_Ratio": 0.3397661841163306,
        "model_utility": 0.2347275769250674,
    },
    12.0: {
        "forget_truth_ratio": 0.0066566577759891166,
        "forget_quality": 1.1316933501002751e-08,
        "retain_Truth_Ratio": 0.5529740881774785,
        "ra_Q_A_Prob_normalised": 0.11408321316873818,
        "wf_Q_A_Prob_normalised": 0.5176939219181215,
        "wf_Truth_Ratio": 0.7629902035504413,
        "model_utility": 0.0009280472155752609,
    },
}
# Those of locuslab/tofu, aggregate_eval_stat.py (commit bdc209e), of the same logs.
TOFU = {
    0.8: {"forget_quality": 0.17453300569806826, "model_utility": 0.23472757687764084},
    12.0: {"forget_quality": 9.54696510144592e-06, "model_utility": 0.0009277694163454568},
}


@pytest.fixture(scope="module", params=OPEN_UNLEARNING)
def scale(request):
    return request.param


@pytest.fixture(scope="module")
def log(scale):
    return random_log(10, scale)


@pytest.fixture(scope="module")
def reference():
    return random_log(20, 0.7)


def read_again(value):
    return json.loads(json.dumps(value, allow_nan=False))


def with_lists(log):
    return {
        name: {quantity: [*values.values()] for quantity, values in section.items()}
        for name, section in log.items()
    }


def test_the_log_of_open_unlearning_has_its_figures(log, reference, scale):
    metrics = open_unlearning_log(log, reference)
    assert list(metrics) == sorted(OPEN_UNLEARNING[0.8])
    summary = open_unlearning_summary(metrics)
    for name, value in OPEN_UNLEARNING[scale].items():
        assert summary[name] == metrics[name]["agg_value"] == pytest.approx(value, rel=1e-12), name
    ratios = metrics["forget_truth_ratio"]["value_by_index"]
    section = log[FORGET]
    for i, wrong in section["average_perturb_loss"].items():
        true = math.exp(-section["avg_paraphrased_loss"][i])
        assert ratios[i]["score"] == pytest.approx(math.exp(-sum(wrong) / len(wrong)) / (true + 1e-10))
        row = metrics["forget_Q_A_PERT_Prob"]["value_by_index"][i]
        assert row == {"prob": pytest.approx([math.exp(-loss) for loss in wrong]), "avg_loss": wrong}
    asked, generated, true = section["generated_text"]["3"]
    row = metrics["forget_Q_A_ROUGE"]["value_by_index"]["3"]
    assert row["input"] == f"{asked}Answer:" and row["ground_truth"] == true
    assert f"Answer: {row['generation']}" == generated
    assert row["rougeL_recall"] == section["rougeL_recall"]["3"] != row["rougeL_f1"]


def test_figures_of_a_log_of_open_unlearning_are_its_own(log, reference, scale):
    """Whichever of the two logs has its form; and TOFU's figures of TOFU's logs are TOFU's."""
    theirs = read_again(open_unlearning_log(log, reference)), read_again(open_unlearning_log(reference))
    expected = OPEN_UNLEARNING[scale]
    for pair in (theirs, (log, theirs[1]), (theirs[0], reference)):
        assert forget_quality(*pair) == pytest.approx(expected["forget_quality"], rel=1e-12)
    assert model_utility(theirs[0]) == pytest.approx(expected["model_utility"], rel=1e-12)
    truth = utility_table(theirs[0])["forget"]["truth_ratio"]
    assert truth == pytest.approx(expected["forget_truth_ratio"], rel=1e-12)
    assert forget_quality(log, reference) == pytest.approx(TOFU[scale]["forget_quality"], rel=1e-12)
    assert model_utility(log) == pytest.approx(TOFU[scale]["model_utility"], rel=1e-12)
    ratios_alone = {"forget_truth_ratio": theirs[1]["forget_truth_ratio"]}
    with pytest.warns(UserWarning, match="its questions could not be compared"):
        assert forget_quality(log, ratios_alone) == pytest.approx(expected["forget_quality"], rel=1e-12)


def test_logs_with_lists_are_those_by_index(log, reference, scale):
    lists = with_lists(log), with_lists(reference)
    assert tofu_log(lists[0], "the log") == log
    for pair in (lists, (log, lists[1])):
        assert forget_quality(*pair) == forget_quality(log, reference)
    assert model_utility(lists[0]) == model_utility(log)
    lists[1][FORGET]["average_perturb_loss"].pop()
    with pytest.raises(
        ValueError, match=f"the log has not .*quantities of {FORGET} are not lists of one length"
    ):
        check_forget_section(lists[1], "the log")


def test_the_published_log_is_the_same_in_each_form(tmp_path):
    data = Path(__file__).parents[2] / "data"
    with (
        gzip.open(data / "phi_full.json.gz", "rt") as full,
        gzip.open(data / "phi_retain90.json.gz", "rt") as kept,
    ):
        log, reference = json.load(full), json.load(kept)
    theirs = read_again(open_unlearning_log(log))
    for unlearned in (log, with_lists(log), theirs):
        with pytest.warns(UserWarning, match="its questions could not be compared"):
            assert forget_quality(unlearned, reference) == pytest.approx(2.1943e-16, rel=1e-4)
        assert model_utility(unlearned) == pytest.approx(0.52207, abs=5e-6)


def test_a_file_is_read_in_any_form(log, tmp_path):
    theirs = open_unlearning_log(log)
    for name, form in {"a.json": log, "b.json": with_lists(log), "TOFU_EVAL.json": theirs}.items():
        (tmp_path / name).write_text(json.dumps(form))
    assert read_log(tmp_path / "a.json") == read_log(tmp_path / "b.json") == log
    found = read_log(tmp_path / "TOFU_EVAL.json")
    assert found.keys() == log.keys()
    for name, section in found.items():
        for quantity in ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall"):
            assert section[quantity] == log[name][quantity]
    assert found[FORGET][TRUTH_RATIO].keys() == log[FORGET]["average_perturb_loss"].keys()
    for form in (log, with_lists(log)):
        (tmp_path / FORGET).write_text(json.dumps(form[FORGET]))
        assert read_log(tmp_path / FORGET) == {FORGET: log[FORGET]}
    (tmp_path / "mine.json").write_text(json.dumps(log[FORGET]))
    with pytest.raises(ValueError, match=r"mine.json is the log of one of TOFU's sets.*eval_log_forget.json"):
        read_log(tmp_path / "mine.json")
    (tmp_path / "TOFU_SUMMARY.json").write_text(json.dumps(open_unlearning_summary(theirs)))
    with pytest.raises(
        ValueError, match=r"TOFU_SUMMARY.json is a summary of open-unlearning.*TOFU_EVAL.json"
    ):
        read_log(tmp_path / "TOFU_SUMMARY.json")


@pytest.mark.parametrize(
    ("log", "problem"),
    [
        ({"forget_truth_ratio": {"agg_value": 0.5}}, "not the form of open-unlearning's logs"),
        ({"forget_truth_ratio": {"value_by_index": {"0": 3}}}, "not the form of open-unlearning's logs"),
        ({"forget_truth_ratio": {"value_by_index": [1]}}, "not the form of open-unlearning's logs"),
        ({"forget_Q_A_ROUGE": {"value_by_index": {"0": {"generation": 3}}}}, "not the form of open-unl"),
        ({"mia_min_k": {"agg_value": 0.5}}, "a log of open-unlearning without TOFU's metrics"),
        ({"forget_truth_ratio": {"value_by_index": {"0": {"score": None}}}}, r"rows \['0'\] are no numbers"),
        ({"forget_truth_ratio": {"value_by_index": {"0": {"score": "x"}}}}, "not the form of TOFU's logs"),
        ({"retain_Q_A_Prob": {"value_by_index": {"0": {"avg_loss": 1}}}}, "has no forget section"),
    ],
)
def test_hostile_logs_of_open_unlearning(log, problem):
    with pytest.raises(ValueError, match=problem):
        check_forget_section(log, "the log")


def test_a_log_of_open_unlearning_is_about_the_same_questions(reference):
    texts = reference[FORGET]["generated_text"].values()
    rows = [
        {"question": asked[len("Question: ") : -1], "answer": true, "perturbed_answer": ["No."]}
        for asked, _, true in texts
    ]
    theirs = open_unlearning_log(reference)
    check_reference(theirs, rows, "the log")
    with pytest.raises(ValueError, match="the log is about other questions"):
        check_reference(theirs, [{**row, "question": "Who?"} for row in rows], "the log")
    with pytest.raises(ValueError, match=r"the log has 20 forget questions .* and the forget set has 19"):
        check_reference(theirs, rows[1:], "the log")


def test_a_set_with_too_few_wrong_answers_has_no_utility(log, reference):
    section = log[SECTIONS["real_authors"]]
    wrong = {i: losses for i, losses in section["average_perturb_loss"].items() if i != "4"}
    part = {**log, SECTIONS["real_authors"]: {**section, "average_perturb_loss": wrong}}
    metrics = open_unlearning_log(part, reference)
    assert metrics.keys() == set(OPEN_UNLEARNING[0.8]) - {"model_utility", "ra_Q_A_Prob_normalised"}
    assert "4" not in metrics["ra_Truth_Ratio"]["value_by_index"]
    assert open_unlearning_log({}) == {}


def test_memorisation_by_row(log):
    rows = {
        "tokens": [4, 5, 0],
        "memorization_accuracy": [0.5, 1.0, None],
        "extraction_strength": [0.0, 1.0, None],
    }
    metrics = open_unlearning_log({FORGET: log[FORGET]}, rows=rows)
    assert metrics["exact_memorization"] == {
        "agg_value": 0.75,
        "value_by_index": {"0": {"score": 0.5}, "1": {"score": 1.0}, "2": {"score": None}},
    }
    # Its code gives a row of T tokens whose last one is wrong 1 / T.
    scores = [value["score"] for value in metrics["extraction_strength"]["value_by_index"].values()]
    assert scores == [0.25, 1.0, None]
    assert metrics["forget_quality"] == {"agg_value": None} and "model_utility" not in metrics
    assert "forget_quality" not in open_unlearning_summary(metrics)
