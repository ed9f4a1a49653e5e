"""The dialogue F1 on cases that can be worked out by hand."""

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
