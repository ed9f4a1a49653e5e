"""TOFU's measures (Maini et al., 2024), read from and written to TOFU's own JSON logs.

A log maps file names to sections, one for each set of questions; a section maps a quantity to
``{str(row index): value}``. Losses are in nats: ``*_loss`` sums over an answer's tokens and ``avg_*_loss``
and ``average_perturb_loss`` are means over them.
"""

import numpy as np
import torch

from loku.data import question_answer_texts, tokenize_dataset
from loku.evaluation.extraction import generated_texts
from loku.evaluation.scores import token_scores

SECTIONS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
CHOICE_SETS = ("real_authors", "world_facts")  # whose answers are judged against wrong ones
UTILITY_SETS = ("retain", *CHOICE_SETS)
ANSWER_SLACK = 16  # tokens that a generated answer may have beyond the longest true one


def answer_losses(
    model, tokenizer, prompts, completions, batch_size=16, progress=True, description="answers"
):
    """Negative log-likelihood of each completion (and EOS) after its prompt.

    Returns (mean over the completion's tokens, float64 (N,), in nats; number of tokens, int64 (N,)).
    """
    if not prompts:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    pairs = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
    rows = tokenize_dataset(pairs, tokenizer, name="evaluation")
    scores = token_scores(model, rows, batch_size, progress, description)
    return torch.stack([s.losses.mean() for s in scores]), torch.tensor([len(s.losses) for s in scores])


def rouge_recalls(generated, references):
    """ROUGE-1 and ROUGE-L recall of each generated text, stemmed, as TOFU has them: two lists of float."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(target, text) for target, text in zip(references, generated, strict=True)]
    return [s["rouge1"].recall for s in scores], [s["rougeL"].recall for s in scores]


def evaluate_tofu_rows(
    model,
    tokenizer,
    rows,
    batch_size=16,
    progress=True,
    description="TOFU",
    scores=None,
    max_new_tokens=None,
):
    """One section of a TOFU log for rows with ``question`` and ``answer``.

    Answers are generated greedily, up to ``max_new_tokens``: by default a few more than the longest true one
    has. Rows with ``perturbed_answer`` (a list of wrong answers) also get their losses, and those of
    ``paraphrased_answer``, or of the answer itself where there is none (as for real authors and world
    facts), and the truth ratio exp(paraphrased loss - mean perturbed loss) of mean token losses. Without
    such rows these keys are absent. ``scores``: the ``token_scores`` of the true answers, if they are known.
    """
    if len(rows) == 0:
        raise ValueError("there are no TOFU rows to evaluate")
    for index, row in enumerate(rows):
        if not {"question", "answer"} <= set(row):
            raise ValueError(f"row {index}: TOFU rows need 'question' and 'answer', this one has {list(row)}")

    # Every answer to score in one list, so that batches are filled across kinds: (row, kind, answer).
    jobs = [(i, "gt", row["answer"]) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        if row.get("perturbed_answer"):
            jobs.append((i, "paraphrased", row.get("paraphrased_answer") or row["answer"]))
            jobs += [(i, "perturb", answer) for answer in row["perturbed_answer"]]
    pairs = []
    for i, _, answer in jobs:
        prompt, completion = question_answer_texts(rows[i]["question"], answer)
        pairs.append({"prompt": prompt, "completion": completion})
    tokens = tokenize_dataset(pairs, tokenizer, name="evaluation")
    known = scores or []
    to_score = tokens[len(known) :]
    scores = [*known, *token_scores(model, to_score, batch_size, progress, f"{description}: scoring")]
    scored = {"gt": {}, "paraphrased": {}, "perturb": {}}
    for (i, kind, _), score in zip(jobs, scores, strict=True):
        scored[kind].setdefault(str(i), []).append((score.losses.mean().item(), len(score.losses)))

    if max_new_tokens is None:
        max_new_tokens = max(len(score.losses) for score in scores[: len(rows)]) + ANSWER_SLACK
    generated = generated_texts(
        model,
        tokenizer,
        tokens[: len(rows)],
        scores[: len(rows)],
        max_new_tokens,
        batch_size,
        progress,
        f"{description}: generating",
    )
    rouge1, rougeL = rouge_recalls(generated, [row["answer"] for row in rows])

    def by_row(values):
        return {str(i): value for i, value in enumerate(values)}

    def means_of(answers):
        return {i: [mean for mean, _ in pairs] for i, pairs in answers.items()}

    def counts_of(answers):
        return {i: [count for _, count in pairs] for i, pairs in answers.items()}

    def sums_of(answers):
        return {i: [mean * count for mean, count in pairs] for i, pairs in answers.items()}

    def single(answers):
        return {i: value for i, (value,) in answers.items()}

    section = {
        "avg_gt_loss": single(means_of(scored["gt"])),
        "gt_loss": single(sums_of(scored["gt"])),
        "num_token_gt": single(counts_of(scored["gt"])),
        # TOFU splits prompt and generation before "Answer:".
        "generated_text": by_row(
            [f"Question: {row['question']}\n", f"Answer:{text}", row["answer"]]
            for row, text in zip(rows, generated, strict=True)
        ),
        "rouge1_recall": by_row(rouge1),
        "rougeL_recall": by_row(rougeL),
    }
    if scored["perturb"]:
        section |= {
            "average_perturb_loss": means_of(scored["perturb"]),
            "perturb_loss": sums_of(scored["perturb"]),
            "num_token_perturb": counts_of(scored["perturb"]),
            "avg_paraphrased_loss": single(means_of(scored["paraphrased"])),
            "paraphrased_loss": single(sums_of(scored["paraphrased"])),
            "num_token_paraphrased": single(counts_of(scored["paraphrased"])),
        }
        with np.errstate(over="ignore"):
            ratios = np.exp(-_log_truth_ratio(section))
        section["truth_ratio"] = dict(zip(scored["perturb"], ratios.tolist(), strict=True))
    return section


def forget_quality(unlearned_log, retain_log):
    """p-value of the two-sided Kolmogorov-Smirnov test that the truth ratios of the forget set,
    exp(mean perturbed loss - paraphrased loss), come from one distribution in the unlearned model and in
    the one that never saw the set. Both arguments are parsed TOFU logs. High is good.

    Raises ``ValueError`` if a log has no forget section with perturbed answers.
    """
    from scipy.stats import ks_2samp

    # The test looks at the order alone, so the logarithm gives the same p-value and cannot overflow.
    ratios = [
        _log_truth_ratio(_section(log, "forget"), f"the {name} log's forget section")
        for name, log in [("unlearned", unlearned_log), ("retain", retain_log)]
    ]
    return float(ks_2samp(*ratios).pvalue)


def check_forget_section(log, name):
    """Raise ``ValueError`` if a parsed TOFU log, called ``name``, has nothing that forget quality needs."""
    _log_truth_ratio(_section(log, "forget"), f"the forget section of {name}")


def section_metrics(section, choice=False, forget=False):
    """The three numbers of one section: ``{"probability", "rouge", "truth_ratio"}``, each a mean over rows.

    ``probability`` is that of the answer, exp(-mean token loss); with ``choice`` (real authors, world
    facts) it is normalised over the answer and its wrong alternatives. ``rouge`` is ROUGE-L recall.
    With R = exp(mean perturbed loss - paraphrased loss), ``truth_ratio`` is max(0, 1 - 1/R), or
    min(R, 1/R) with ``forget``. It is absent where no row has perturbed answers.
    """
    loss = _values(section, "avg_gt_loss")
    if choice:
        wrong = section.get("average_perturb_loss", {})
        missing = sorted(set(section["avg_gt_loss"]) - set(wrong))
        if missing:
            raise ValueError(f"rows {missing[:5]} have no perturbed answers to choose among")
        # A softmax over the alternatives; exp(-loss) itself may underflow for all of them.
        with np.errstate(over="ignore"):
            odds = [
                np.exp(right - np.array([right, *wrong[i]])) for i, right in section["avg_gt_loss"].items()
            ]
        probability = np.array([1 / each.sum() for each in odds])
    else:
        probability = np.exp(-loss)
    rouge = _values(section, "rougeL_recall")
    metrics = {"probability": float(probability.mean()), "rouge": float(rouge.mean())}
    if "average_perturb_loss" in section:
        log_ratio = _log_truth_ratio(section)
        truth = np.exp(-np.abs(log_ratio)) if forget else -np.expm1(-np.maximum(log_ratio, 0))
        metrics["truth_ratio"] = float(truth.mean())
    return metrics


def utility_table(log):
    """``{set: {"probability", "rouge", "truth_ratio"}}`` for those of the sets retain, real_authors,
    world_facts and forget that a parsed TOFU log has."""
    return {
        name: section_metrics(log[key], name in CHOICE_SETS, name == "forget")
        for name, key in SECTIONS.items()
        if key in log
    }


def model_utility(log, sets=UTILITY_SETS):
    """TOFU's model utility: the harmonic mean of probability, ROUGE-L recall and truth ratio on retain,
    real authors and world facts, nine numbers; of a parsed TOFU log.

    ``sets`` takes fewer for a model that never saw the others, such as the embedded one: the result is
    then not comparable with published figures. Raises ``ValueError`` if the log lacks one of them.
    """
    for name in sets:
        _section(log, name)
    table = utility_table(log)
    values = []
    for name in sets:
        if "truth_ratio" not in table[name]:
            raise ValueError(f"the log's {name} section has no perturbed answers, so no truth ratio")
        values += table[name].values()
    return len(values) / sum(1 / v for v in values) if all(v != 0 for v in values) else 0.0


def _section(log, name):
    if SECTIONS[name] not in log:
        raise ValueError(f"the log has no {name} section {SECTIONS[name]!r}; it has {list(log)}")
    return log[SECTIONS[name]]


def _values(section, key):
    return np.array(list(section[key].values()), dtype=np.float64)


def _log_truth_ratio(section, where="the section"):
    """mean perturbed loss - paraphrased loss, one number a row with perturbed answers, (rows,) float64."""
    if not section.get("average_perturb_loss") or not section.get("avg_paraphrased_loss"):
        raise ValueError(
            f"{where} lacks 'average_perturb_loss' or 'avg_paraphrased_loss'; evaluate rows with "
            f"'perturbed_answer'"
        )
    right, wrong = section["avg_paraphrased_loss"], section["average_perturb_loss"]
    if missing := sorted(wrong.keys() - right.keys()):
        raise ValueError(f"{where}: rows {missing[:5]} have no 'avg_paraphrased_loss'")
    return np.array([np.mean(losses) - right[i] for i, losses in wrong.items()])
