"""PrivLeak and relative differences, by open-unlearning's figures."""

import math

import pytest
import torch
from character_tokenizer import character_tokenizer
from membership_texts import THEIR_TEXTS
from tiny_models import tiny_model

from loku.evaluation import (
    TokenScores,
    membership_auc,
    min_k,
    min_k_auc,
    privleak,
    relative_difference,
    token_scores,
)
from loku.evaluation.privacy import check_reference_report, relative_differences

# locuslab/open-unlearning at d3d7cf9, src/evals/metrics/privacy.py: privleak and rel_diff of the AUC 0.93
# after a retrained model's 0.61, and so on; without the latter they take 0.5.
THEIR_FIGURES = [
    (0.93, 0.61, -82.05128203024327, 52.45901638484279),
    (0.31, None, 37.99999999239999, -37.9999999924),
    (0.5, 0.5, 0.0, 0.0),
    (0.2, 0.7, 166.66666661111108, -71.42857141836735),
]

MUSE_MIN_40 = [5.8590544707596095, 5.66553834075997, 5.959402695246101, 5.522448600504895, 5.568506605238798]


@pytest.mark.parametrize(("auc", "retain_auc", "leak", "difference"), THEIR_FIGURES)
def test_figures_of_open_unlearning(auc, retain_auc, leak, difference):
    given = () if retain_auc is None else (retain_auc,)
    assert privleak(auc, *given) == pytest.approx(leak, rel=1e-12)
    assert relative_difference(auc, retain_auc or 0.5) == pytest.approx(difference, rel=1e-12)


def test_privleak_tells_too_little_from_too_much():
    assert privleak(1.0) == pytest.approx(-100)  # the forget set is known as well as before
    assert privleak(0.0) == pytest.approx(100)  # it stands out as unknown
    assert privleak(0.6, 0.6) == 0
    assert math.isnan(privleak(math.nan))
    for name, arguments in {"auc": (1.2,), "retain_auc": (0.5, -0.1)}.items():
        with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\]"):
            privleak(*arguments)


def scores_of(losses):
    losses = torch.tensor(losses, dtype=torch.float64)
    count = len(losses)
    return TokenScores(losses, torch.ones(count, dtype=torch.bool), torch.arange(count), torch.arange(count))


def test_min_k_auc_takes_forty_percent():
    forget = [scores_of([9.0, 0.1, 0.1, 0.1, 0.1]), scores_of([1.0, 1.0, 1.0, 1.0, 1.0])]
    holdout = [scores_of([5.0, 5.0, 0.1, 0.1, 0.1]), scores_of([0.1, 0.2, 0.3, 0.4, 0.5])]
    assert min_k_auc(forget, holdout) == membership_auc(min_k(forget, 0.4), min_k(holdout, 0.4)) == 0.5
    assert min_k_auc(forget, holdout, 0.2) == 0.25


def test_relative_differences_leave_out_what_has_none():
    ours = {
        "forget": {"rows": 3, "probability": 0.2, "rouge": 0.5, "zero": 0.1, "nan": math.nan},
        "x": {"a": 1.0},
    }
    theirs = {"forget": {"rows": 3, "probability": 0.4, "rouge": None, "zero": 0.0, "nan": 1.0}}
    found = relative_differences(ours, theirs)
    assert found == {"forget": {"probability": pytest.approx(-50)}}


def test_a_reference_report_is_checked():
    report = {"sets": {"forget": {}}, "whole": {"min_40_auc": 0.5}, "digests": {"forget": "a"}}
    check_reference_report(report, {"forget": "a", "holdout": "b"})
    check_reference_report({**report, "whole": {}}, {"forget": "a", "retain": "b"})
    for wrong, digests, words in (
        ([], {"forget": "a"}, "lacks 'sets', 'whole' or 'digests'"),
        ({"sets": {}, "whole": {}}, {"forget": "a"}, "lacks 'sets', 'whole' or 'digests'"),
        (report, {"retain": "a"}, r"has the sets \['forget'\] and none of \['retain'\]"),
        (report, {"forget": "c"}, "other rows of the forget set"),
        ({**report, "whole": {}}, {"forget": "a", "holdout": "b"}, "has no 'min_40_auc'"),
        ({**report, "whole": {"min_40_auc": None}}, {"forget": "a", "holdout": "b"}, "has no 'min_40_auc'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_reference_report(wrong, digests)


def test_figures_of_muse():
    """By its own code on the same texts: jaechan-repo/muse_bench at 54719c5, privleak.

    ``inference`` of get_ppl_utils.py gives Min-40%, and ``sweep`` of scripts/get_ppl.py the AUC of the pair
    (forget, holdout): 0.5667 for the model, and 0.3 for another one in the place of the retrained model.
    """
    tokenizer = character_tokenizer()
    found, aucs = {}, []
    for seed in (0, 1):
        model = tiny_model("llama", len(tokenizer), seed).double()
        for name, texts in THEIR_TEXTS.items():
            ids = [tokenizer(text)["input_ids"] for text in texts]
            rows = [{"input_ids": tokens, "labels": [-100, *tokens[1:]]} for tokens in ids]
            found[seed, name] = token_scores(model, rows, progress=False)
        aucs.append(min_k_auc(found[seed, "forget"], found[seed, "holdout"]))
    assert [-value for value in min_k(found[0, "forget"], 0.4)] == pytest.approx(MUSE_MIN_40, rel=1e-9)
    assert [1 - auc for auc in aucs] == pytest.approx([0.5666666666666667, 0.3])
    assert privleak(*aucs) == pytest.approx(100 * (0.5666666666666667 - 0.3) / 0.3)
