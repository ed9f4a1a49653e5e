"""Every measure that some data sets allow, in one call: what ``loku evaluate`` runs."""

from collections.abc import Mapping
from typing import NamedTuple

from loku.data import split_documents, tokenize_dataset
from loku.distributed import is_main_process, spread
from loku.evaluation.dialogue import dialogue_f1
from loku.evaluation.extraction import generated_texts, spread_extraction_likelihood
from loku.evaluation.scores import (
    MIN_K_SHARE,
    membership_auc,
    min_k,
    spread_token_scores,
    token_measures,
)
from loku.evaluation.tofu import (
    ANSWER_SLACK,
    CHOICE_SETS,
    SECTIONS,
    UTILITY_SETS,
    check_forget_section,
    evaluate_tofu_rows,
    forget_quality,
    model_utility,
    rouge_recalls,
    section_metrics,
)

EXTRACTION_SETS = ("forget", "holdout")


class Evaluation(NamedTuple):
    """sets: ``{set: {measure: number}}``. whole: the measures that take several sets, None where not
    available, and then not_available says why. log: TOFU's, of the sets that it knows."""

    sets: dict
    whole: dict
    not_available: dict
    log: dict


def evaluate(
    model,
    tokenizer,
    data,
    *,
    reference_log=None,
    n=10,
    stride=1,
    min_k_share=MIN_K_SHARE,
    max_length=None,
    batch_size=16,
    progress=True,
):
    """Measure a causal LM on named data sets. Returns an ``Evaluation``.

    Every set gets ``token_measures``: probability, perplexity, Memorisation Accuracy, extraction strength and
    Min-K%. "forget" and "holdout" get Extraction Likelihood too. Sets of ``question`` and ``answer`` get
    TOFU's measures of a section and dialogue F1; sets of ``prompt`` and ``completion`` get ROUGE-L recall and
    dialogue F1 of generated completions.

    Of the whole: ``forget_quality`` (needs a reference log), ``model_utility`` (needs "retain",
    "real_authors" and "world_facts" with ``perturbed_answer``) and ``membership_auc``, by Min-K%, of "forget"
    against "holdout".

    Where torch.distributed is set up, rows are shared out; every process must call this, and gets it all.

    Args:
        data: ``{set name: rows}``. The names above and "retain" have a meaning; others are measured alike.
        reference_log: parsed TOFU log of a model that never saw the forget set.
        n, stride: of Extraction Likelihood; every ``stride``-th prefix is continued.
        max_length: tokens at which texts are cut (answers to questions are not).

    Raises ``ValueError`` for unusable rows, and for a reference log with nothing to compare.
    """
    data = {name: list(rows) for name, rows in data.items()}
    if reference_log is not None:
        check_forget_section(reference_log, "the reference log")
        forget = data.get("forget", [])
        if not all(map(_is_question, forget)) or not any(row.get("perturbed_answer") for row in forget):
            raise ValueError(
                "forget quality needs a forget set of questions and answers, with 'perturbed_answer'"
            )
    show = progress and is_main_process()
    sets, log, min_k_of = {}, {}, {}
    for name, rows in data.items():
        questions = all(_is_question(row) for row in rows)
        cut = None if questions else max_length
        tokens = split_documents(tokenize_dataset(rows, tokenizer, max_length=cut, name=name))
        _check_context(model, tokens, name)
        scores = spread_token_scores(model, tokens, batch_size, progress, f"{name}: scoring")
        sets[name] = {"rows": len(rows), **token_measures(scores, min_k_share)}
        min_k_of[name] = min_k(scores, min_k_share)
        if name in EXTRACTION_SETS:
            sets[name][f"extraction_likelihood_{n}"] = spread_extraction_likelihood(
                model, tokens, scores, n, stride, batch_size, progress
            )
        room = max(len(score.losses) for score in scores) + ANSWER_SLACK
        if questions:

            def tofu_rows(rows, scores, room=room, name=name):
                section = evaluate_tofu_rows(model, tokenizer, rows, batch_size, show, name, scores, room)
                return _by_row(section, len(rows))

            section = _by_quantity(spread(tofu_rows, rows, scores))
            generated = [text.removeprefix("Answer:") for _, text, _ in section["generated_text"].values()]
            choice = name in CHOICE_SETS and all(row.get("perturbed_answer") for row in rows)
            sets[name] |= section_metrics(section, choice, name == "forget")
            if name in CHOICE_SETS and not choice:
                sets[name].pop("truth_ratio", None)
            sets[name]["dialogue_f1"] = _mean(dialogue_f1(generated, [row["answer"] for row in rows]))
            if name in SECTIONS:
                log[SECTIONS[name]] = section
        elif all(_is_prompted(row) for row in rows):

            def replies(tokens, scores, room=room, name=name):
                return generated_texts(
                    model, tokenizer, tokens, scores, room, batch_size, show, f"{name}: generating"
                )

            generated = spread(replies, tokens, scores)
            references = [row["completion"] for row in rows]
            sets[name]["rouge"] = _mean(rouge_recalls(generated, references)[1])
            sets[name]["dialogue_f1"] = _mean(dialogue_f1(generated, references))

    whole = {"forget_quality": None, "model_utility": None, "membership_auc": None}
    not_available = {}
    if reference_log is not None:
        whole["forget_quality"] = forget_quality(log, reference_log)
    else:
        not_available["forget_quality"] = "no reference log"
    missing = [name for name in UTILITY_SETS if "truth_ratio" not in sets.get(name, {})]
    if not missing:
        whole["model_utility"] = model_utility(log)
    else:
        not_available["model_utility"] = f"perturbed answers are missing in {', '.join(missing)}"
    missing = [name for name in EXTRACTION_SETS if name not in sets]
    if not missing:
        whole["membership_auc"] = membership_auc(*(min_k_of[name] for name in EXTRACTION_SETS))
    else:
        not_available["membership_auc"] = f"no {' and no '.join(missing)} set"
    return Evaluation(sets, whole, not_available, log)


def _check_context(model, tokens, name):
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(row["input_ids"]) for row in tokens), default=0)
    if context is not None and longest > context:
        raise ValueError(
            f"{name}: a row has {longest} tokens, and the model's context is {context}: cut texts "
            "(max_length, --max-length), or leave the row out"
        )


# As ``loku.data.tokenize_dataset`` reads them: other columns come before these two.


def _is_prompted(row):
    return (
        isinstance(row, Mapping)
        and not _has(row, "input_ids")
        and not _has(row, "messages")
        and _has(row, "prompt", "completion")
    )


def _is_question(row):
    return (
        isinstance(row, Mapping)
        and not _has(row, "input_ids")
        and not _has(row, "messages")
        and not _has(row, "prompt", "completion")
        and _has(row, "question", "answer")
    )


def _has(row, *columns):
    return all(row.get(column) is not None for column in columns)


def _by_row(section, count):
    """A section of a TOFU log, turned over: one ``{quantity: value}`` a row."""
    return [
        {quantity: values[str(i)] for quantity, values in section.items() if str(i) in values}
        for i in range(count)
    ]


def _by_quantity(rows):
    section = {}
    for index, row in enumerate(rows):
        for quantity, value in row.items():
            section.setdefault(quantity, {})[str(index)] = value
    return section


def _mean(values):
    return sum(values) / len(values)
