"""Attacks on an unlearned model: what of the forgotten rows can still be got out of it, and how.

Each attack is a function of a model and of rows. It returns a dict that JSON holds, with figures, counts and
indices of rows, and no text of a row. ``not_tested`` in it names what was not tested, with the reason. No
attack changes the model that it is given.

An attack that brings the rows back proves that knowledge is left. An attack that fails proves nothing beyond
itself: a stronger one may succeed. The figures of the hold-out rows and of a control tell what a model that
never saw the rows would give.
"""

from loku.attacks.extraction import extraction_attack
from loku.attacks.membership import membership_attack
from loku.attacks.preambles import PREAMBLES
from loku.attacks.quantisation import quantisation_attack
from loku.attacks.relearning import relearning_attack

__all__ = [
    "PREAMBLES",
    "extraction_attack",
    "membership_attack",
    "quantisation_attack",
    "relearning_attack",
]
