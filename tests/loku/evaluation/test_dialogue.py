"""The dialogue F1 on cases that can be worked out by hand, and against the two codes that have it."""

import pytest

from loku.evaluation import dialogue_f1


@pytest.mark.parametrize(
    ("generated", "reference", "f1"),
    [
        ("The cat sat, on a mat!", "a cat sat on the red mat", 8 / 9),  # 4 of 4 words, and 4 of 5
        ("no no no", "No way.", 2 / 5),  # one word in common: 1 of 3, and 1 of 2
        ("It's here", "it s there", 4 / 6),
        ("an aunt", "aunt", 1.0),
        ("theatre", "atre", 0.0),  # an article is removed as a whole word
        ("", "yes", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_dialogue_f1(generated, reference, f1):
    assert dialogue_f1([generated], [reference]) == [pytest.approx(f1)]


# The figures are those of ParlAI, parlai/core/metrics.py, _f1_score (commit 00e06bd), and of
# joeljang/knowledge-unlearning, models/Neo_Model_valid.py, _f1_score (commit 732876d), run on these pairs.
@pytest.mark.parametrize(
    ("generated", "reference", "parlai", "knowledge_unlearning"),
    [
        ("The cat sat, on a mat!", "a cat sat on the red mat", 0.888888888888889, 0.888888888888889),
        ("It's here", "it s there", 0.6666666666666666, 0),
        ("I don't know, well-known", "I dont know well known", 0.7272727272727272, 0.6666666666666665),
        ("a.n orange", "an orange", 0.6666666666666666, 1.0),
        ("User's e-mail: the-end", "users email theend", 0, 1.0),
        ("«Oui», no", "oui no", 0.5, 0.5),
        ("...", "yes", 0, 0),
    ],
)
def test_both_normalisations_are_those_of_their_codes(generated, reference, parlai, knowledge_unlearning):
    assert dialogue_f1([generated], [reference], "parlai") == [pytest.approx(parlai)]
    assert dialogue_f1([generated], [reference], "knowledge-unlearning") == [
        pytest.approx(knowledge_unlearning)
    ]


def test_another_normalisation_is_refused():
    with pytest.raises(ValueError, match="normalisation must be one of parlai, knowledge-unlearning"):
        dialogue_f1(["a"], ["a"], "squad")
