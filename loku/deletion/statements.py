"""The fixed statements of a record: what an outcome means, and what a record does and does not prove."""

from __future__ import annotations

# outcome -> (its name on the page, the answer to "did it work?", what it means)
OUTCOME_STATEMENTS = {
    "forgotten": (
        "Forgotten",
        "Yes, within the limits of the request.",
        "The new model stays within every limit of the request: it shows the rows no more than the limits "
        "allow. The old model still has them, and must not be used any more.",
    ),
    "not forgotten": (
        "Not forgotten",
        "No.",
        "The new model is not within all limits of the request, so it may still show the rows. The deletion "
        "is not done.",
    ),
    "undone": (
        "Undone",
        "No.",
        "The training damaged the model more than the request allows, so it was undone. No new model was "
        "made, and the old one still has the rows. The deletion is not done.",
    ),
    "not known": (
        "Not known",
        "There was nothing to delete from the model.",
        "No measure shows that the model knows the rows. So nothing was trained, and no new model was made.",
    ),
    "delete the adapter": (
        "Delete the adapter",
        "Not yet.",
        "The rows trained one adapter and nothing else. So the deletion of this adapter and of its copies "
        "is the deletion of the rows from the model. Nothing was trained. The adapter is still there: its "
        "owner must delete it.",
    ),
}

# The figures are those of experiments/results/robustness_cpu.json; a test compares them.
PROOF = (
    "This procedure suppresses; it does not erase. Its aim is a model that no longer writes or prefers the "
    "texts of the rows. Even then traces of the texts remain in the weights. Somebody who has the weights "
    "and a part of the texts can bring much of the rest back by training.",
    "Our own figures say how much. They are of the small model that ships with this software. After "
    "unlearning, the mean probability of one half of the answers to forget was 0.008. Then the model was "
    "trained for 20 steps on the other half. The probability rose to 0.41. Training on as many rows to keep "
    "brought it to 0.066. A model that had never seen the answers reached 0.001 by training on the other "
    "half. Rounding the weights to 8 or 4 bits did not bring the answers back: the probability of all of "
    "them was 0.0185 before it and at most 0.0192 after it.",
    "The base model is not changed. A person who has the base model without the new adapter, or an older "
    "copy of the model, has the rows. This procedure does not delete the old copies.",
    "Everything beside the model is outside of this record: the data sets themselves, copies and backups, "
    "logs, caches, search indices and vector stores, and other models that were trained on the same rows or "
    "on the outputs of the model.",
    "The tests show what they tried. Rows that no test extracted may be extracted by a test that nobody has "
    "tried. The limits are those of the request. The reader must decide whether they are strict enough for "
    "the law and for the person who asked.",
    "The digests show that no file was changed since the record was sealed. A signature shows who sealed it. "
    "Neither shows that the statements in it are true.",
)

ATTACK_TITLES = {
    "extract": "Extraction: does the model write the rows when it is asked for them?",
    "mia": "Membership inference: can one tell by the model that it was trained on the rows?",
    "relearn": "Relearning: does training on a half of the rows bring the other half back?",
    "quantise": "Rounding: do weights of 8 or 4 bits bring the rows back?",
}

MEASURE_TITLES = {
    "rows": "number of rows",
    "probability": "mean probability of a token of the answer",
    "perplexity": "perplexity of the answer",
    "memorization_accuracy": "share of tokens that are the first guess (MA)",
    "extraction_strength": "share of the answer that its beginning brings back (ES)",
    "extracted": "share of answers written word by word",
}


def measure_title(name: str) -> str:
    """Return the name of a measure for a reader.

    Args:
        name: The name in ``record.json``.
    """
    prefix = "extraction_likelihood_"
    if name.startswith(prefix) and name.removeprefix(prefix).isdecimal():
        return f"likelihood of extracting {name.removeprefix(prefix)} tokens (EL)"
    return MEASURE_TITLES.get(name, name.replace("_", " "))
