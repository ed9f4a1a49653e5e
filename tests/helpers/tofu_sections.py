"""TOFU's logs of random losses, for the figures that other repositories compute of them."""

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

WORDS = "a big cat sat on the red mat and saw some birds".split()
SETS = {  # the rows of a set, their wrong answers, and whether the answers are paraphrased
    "eval_log.json": (12, 3, True),
    "eval_real_author_wo_options.json": (9, 3, False),
    "eval_real_world_wo_options.json": (9, 2, False),
    "eval_log_forget.json": (20, 4, True),
}


def random_section(seed, rows, wrong, paraphrased, scale):
    """Make a section whose mean losses are gamma variates, of ``2 * scale`` nats in the mean."""
    draw = np.random.default_rng(seed)
    true, other, false = (np.round(draw.gamma(2.0, scale, size), 6) for size in (rows, rows, (rows, wrong)))
    texts = {}
    for i in range(rows):
        generated = " ".join(draw.permutation(WORDS)[:5])
        texts[str(i)] = [
            f"Question: number {i}?\n",
            f"Answer: {generated}",
            " ".join(WORDS[i % 5 : i % 5 + 6]),
        ]
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    rouge = [scorer.score(text[2], text[1].removeprefix("Answer:")) for text in texts.values()]

    def by_row(values):
        return {str(i): value for i, value in enumerate(values)}

    return {
        "avg_gt_loss": by_row(true.tolist()),
        "average_perturb_loss": by_row(false.tolist()),
        "avg_paraphrased_loss": by_row((other if paraphrased else true).tolist()),
        "generated_text": texts,
        "rouge1_recall": by_row(score["rouge1"].recall for score in rouge),
        "rougeL_recall": by_row(score["rougeL"].recall for score in rouge),
    }


def random_log(seed, scale):
    """Make a log of all sets."""
    return {name: random_section(seed + i, *shape, scale) for i, (name, shape) in enumerate(SETS.items())}
