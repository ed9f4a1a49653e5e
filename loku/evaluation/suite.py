"""``evaluate``: every measure that some data sets allow, in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loku.counts import check_counts, check_max_length
from loku.data import (
    IGNORE_INDEX,
    TOFU_TEMPLATE,
    QuestionTemplate,
    RowError,
    as_rows,
    check_template_used,
    labelled_column,
    read_rows,
    row_places,
    split_documents,
    token_limits,
    tokenize_dataset,
    wrong_answers,
)
from loku.distributed import is_main_process, spread
from loku.evaluation.dialogue import dialogue_f1
from loku.evaluation.endings import Endings, content_scores
from loku.evaluation.extraction import (
    check_definition,
    check_stop_strings,
    generated_texts,
    spread_extraction_likelihood,
)
from loku.evaluation.last_word import last_words
from loku.evaluation.muse import (
    KNOWLEDGE_TOKENS,
    VERBATIM_TOKENS,
    knowledge_prompts,
    reason_not_continued,
    spread_knowledge,
    spread_verbatim,
)
from loku.evaluation.privacy import (
    CHANCE_AUC,
    check_reference_report,
    min_k_auc,
    privleak,
    relative_differences,
)
from loku.evaluation.scores import (
    MIN_K_SHARE,
    TokenScores,
    check_share,
    mean_over_rows,
    row_measures,
    spread_token_scores,
    token_measures,
)
from loku.evaluation.text_fluency import TextClassifier, spread_fluency
from loku.evaluation.tofu import ANSWER_SLACK, Answer, measured_section, rouge_recalls, tokenized_answers
from loku.evaluation.tofu_logs import (
    CHOICE_SETS,
    SECTIONS,
    UTILITY_SETS,
    Log,
    Section,
    check_reference,
    forget_quality,
    model_utility,
    section_metrics,
)
from loku.evaluation.truth_probability import truth_probability
from loku.fingerprints import ordered_rows_fingerprint
from loku.models import CausalLM
from loku.nan_guard import check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTRACTION_SETS = ("forget", "holdout")
WHOLE = ("forget_quality", "model_utility", "membership_auc", "min_40_auc", "retain_auc", "privleak")


class Evaluation(NamedTuple):
    """The measures of a model on named data sets.

    Attributes:
        sets: The measures of each set, ``{set: {measure: number}}``.
        whole: The measures that take several sets, ``{measure: number}``; None for one that is not available.
        not_available: The reason for each measure that is not available, ``{measure: reason}``.
        log: The TOFU log of the sets that TOFU knows.
        relative_differences: The relative differences from the reference report in percent, ``{set:
            {measure: percent}}``, those of ``whole`` under "all sets"; empty without one.
        digests: A digest of the tokenised rows of each set, ``{set: digest}``.
        rows: The measures of the rows of each set, ``{set: {measure: [one value for each row]}}``: the
            ``row_measures`` of ``loku.evaluation.scores``.
    """

    sets: dict[str, dict[str, float]]
    whole: dict[str, float | None]
    not_available: dict[str, str]
    log: dict[str, Section]
    relative_differences: dict[str, dict[str, float]]
    digests: dict[str, str]
    rows: dict[str, dict[str, list[float | None]]]


def evaluate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Iterable[Any] | str | os.PathLike],
    *,
    reference_log: Log | None = None,
    reference_report: Mapping[str, Any] | None = None,
    knowledge_examples: Iterable[Any] | str | os.PathLike | None = None,
    classifier: TextClassifier | None = None,
    n: int = 10,
    stride: int = 1,
    min_k_share: float = MIN_K_SHARE,
    count_end: bool = True,
    el_definition: str = "paper",
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    stop_strings: Sequence[str] = (),
    batch_size: int = 16,
    progress: bool = True,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> Evaluation:
    """Measure a causal LM on named data sets.

    Every set gets ``token_measures``: probability, perplexity, Memorisation Accuracy, extraction strength and
    Min-K%. "forget" and "holdout" get Extraction Likelihood too. Sets of ``question`` and ``answer`` get
    TOFU's measures of a section, ``truth_probability`` and dialogue F1. Sets of ``prompt`` and ``completion``
    get the ROUGE-L recall and dialogue F1 of generated completions, and MUSE's verbatim memorisation. Both
    kinds get the ``fluency`` of the generated texts. ``dialogue_f1`` is ParlAI's, and
    ``dialogue_f1_knowledge_unlearning`` that of Jang et al. (``loku.evaluation.dialogue_f1``). Sets of texts
    get the accuracy of their last words (``loku.evaluation.last_word``).

    Some measures take several sets. ``forget_quality`` needs a reference log of the same forget questions.
    ``model_utility`` needs "retain", "real_authors" and "world_facts" with ``perturbed_answer``.
    ``membership_auc`` tells "forget" from "holdout" by Min-K%, and ``min_40_auc`` by Min-40%, as MUSE, always
    without the endings of answers: MUSE's texts have no EOS, and open-unlearning leaves it out.
    ``privleak`` compares the latter with ``retain_auc``, that of the reference report, or with 0.5.

    With torch.distributed the rows are shared out among the processes. All processes must call this, and all
    get all the measures.

    Args:
        model: The causal LM, on the device where it runs.
        tokenizer: The tokenizer.
        data: The data sets, ``{set name: rows}``. In place of rows, the path of a file or a hub name, as for
            ``loku.data.read_rows``. The names "forget", "holdout", "retain", "real_authors" and "world_facts"
            have a meaning; sets with other names get the measures of every set.
        reference_log: The parsed log of a model that never saw the forget set, in any of the forms of
            ``loku.evaluation.log_forms``; None (default) for none.
        reference_report: The parsed report of ``loku evaluate`` for the same model and the same rows, for
            relative differences and PrivLeak; None by default.
        knowledge_examples: Questions with their answers, for MUSE's knowledge memorisation of the sets of
            questions: rows, a file or a hub name; [] for none. None (default) does not measure it.
        classifier: A classifier of texts from ``load_classifier``. The generated texts of a set then get the
            mean probability of its class, ``classifier_probability``. None by default.
        n: The length of Extraction Likelihood's n-grams, in tokens, >= 1; 10 by default.
        stride: The distance between the prefixes that Extraction Likelihood continues, in tokens, >= 1;
            1 by default.
        min_k_share: The share of a row's tokens that Min-K% takes, in (0, 1], 0.2 by default.
        count_end: Whether the endings of answers count in Memorisation Accuracy, extraction strength,
            Extraction Likelihood and Min-K%, True by default. An ending is an EOS and the special tokens that
            a chat template puts after an answer (``loku.evaluation.endings``). They always count in the
            probability and the perplexity.
        el_definition: "paper" (default) or "knowledge-unlearning"; see ``extraction_likelihood``.
        max_length: The number of tokens at which texts are cut, >= 2; None (default) does not cut them. A
            question with its answer is never cut: one that is longer is refused.
        max_new_tokens: The greatest number of tokens of a generated answer, >= 1. None (default) stands for
            ``ANSWER_SLACK`` (16) more than the longest true answer of the set has.
        stop_strings: Texts before the first of which a generated answer ends, such as ``["\\nQuestion:"]``;
            none by default.
        batch_size: The number of rows in a batch, >= 1; 16 by default.
        progress: Whether the main process shows progress bars, True by default.
        template: The template of ``question`` and ``answer`` in all measures; TOFU's by default. A reference
            log should be made with the same one.

    Raises:
        RowError: A row cannot be used. The message names the set and the row, and the line of a file.
        ValueError: ``n``, ``stride``, ``min_k_share``, ``el_definition``, ``max_length``, ``max_new_tokens``,
            ``stop_strings`` or ``batch_size`` is out of its range; a set is empty; no row has the
            ``question`` that ``template`` is for; the reference log is about other questions than the forget
            set, or one of them lacks perturbed answers; the reference report is about other rows; or the
            knowledge examples are no questions with answers, or too long for the model's context.
        FloatingPointError: A weight is NaN or Inf, or a loss or a logit is NaN.
    """
    check_counts(n=n, stride=stride, batch_size=batch_size)
    check_max_length(max_length)
    check_share(min_k_share)
    check_definition(el_definition)
    check_stop_strings(stop_strings)
    if max_new_tokens is not None:
        check_counts(max_new_tokens=max_new_tokens)
    check_weights(model)
    sources = {name: rows for name, rows in data.items() if isinstance(rows, (str, os.PathLike))}
    data_sets = {
        name: list(as_rows(read_rows(sources[name]) if name in sources else rows, name))
        for name, rows in data.items()
    }
    check_template_used(template, data_sets)
    limits = token_limits(model)
    answers_of: dict[str, list[list[Answer]]] = {}
    tokens_of: dict[str, Sequence[Mapping[str, Any]]] = {}
    with row_places(sources):  # all that is measured is checked before the first measure
        for name, rows in data_sets.items():
            if rows and all(map(_is_question, rows)):
                answers_of[name] = tokenized_answers(rows, tokenizer, name, max_length, limits, template)
                tokens_of[name] = [true.tokens for true, *_ in answers_of[name]]
            else:
                ids = tokenize_dataset(
                    rows, tokenizer, max_length=max_length, name=name, limits=limits, template=template
                )
                tokens_of[name] = split_documents(ids)
    if reference_log is not None:
        forget = data_sets.get("forget", [])
        if not all(map(_is_question, forget)) or not any(map(wrong_answers, forget)):
            raise ValueError(
                "forget quality needs a forget set of questions and answers, with 'perturbed_answer'"
            )
        check_reference(reference_log, forget, "the reference log")
    digests = {name: ordered_rows_fingerprint(tokens) for name, tokens in tokens_of.items()}
    if reference_report is not None:
        check_reference_report(reference_report, digests)
    examples = _examples(knowledge_examples)
    if examples is not None:
        for name in answers_of:
            prompts = knowledge_prompts((row["question"] for row in data_sets[name]), examples)
            reason = reason_not_continued(model, tokenizer, prompts, KNOWLEDGE_TOKENS)
            if reason is not None:
                raise ValueError(f"knowledge memorisation of the {name} set: {reason}; take fewer examples")
    show = progress and is_main_process()
    endings = Endings(model, tokenizer, template)
    not_available: dict[str, str] = {}
    sets: dict[str, dict[str, float]] = {}
    log: dict[str, Section] = {}
    rows_of: dict[str, dict[str, list[float | None]]] = {}
    counted_of: dict[str, list[TokenScores]] = {}
    content_of: dict[str, list[TokenScores]] = {}
    for name, rows in data_sets.items():
        tokens = tokens_of[name]
        scores = spread_token_scores(model, tokens, batch_size, progress, f"{name}: scoring")
        content = content_scores(tokens, scores, endings)
        counted = scores if count_end else content
        sets[name] = {"rows": len(rows), **token_measures(scores, min_k_share, counted)}
        rows_of[name] = row_measures(counted)
        counted_of[name], content_of[name] = (
            [score for score in kept if len(score.losses)] for kept in (counted, content)
        )
        if name in EXTRACTION_SETS:
            sets[name][f"extraction_likelihood_{n}"] = spread_extraction_likelihood(
                model, tokens, counted, n, stride, batch_size, progress, el_definition
            )
        room = max_new_tokens or max(len(score.losses) for score in scores) + ANSWER_SLACK
        if all(labelled_column(row) == "text" for row in rows):
            texts = [row if isinstance(row, str) else row["text"] for row in rows]
            sets[name] |= last_words(texts, tokenizer, tokens, scores).measures()
        if name in answers_of:

            def tofu_rows(
                rows: list[Any],
                answers: list[list[Answer]],
                scores: list[TokenScores],
                room: int = room,
                name: str = name,
            ) -> list[dict[str, Any]]:
                section = measured_section(
                    model,
                    tokenizer,
                    rows,
                    answers,
                    batch_size,
                    show,
                    name,
                    scores,
                    room,
                    template,
                    stop_strings,
                )
                return _by_row(section, len(rows))

            section = _by_quantity(spread(tofu_rows, rows, answers_of[name], scores))
            generated = [template.bare_answer(text) for _, text, _ in section["generated_text"].values()]
            choice = name in CHOICE_SETS and all(map(wrong_answers, rows))
            sets[name] |= section_metrics(section, choice, name == "forget")
            if "truth_ratio" in sets[name]:
                sets[name]["truth_probability"] = truth_probability(section)
            if name in CHOICE_SETS and not choice:
                for measure in ("truth_ratio", "truth_probability"):
                    sets[name].pop(measure, None)
            sets[name] |= _dialogue_measures(generated, [row["answer"] for row in rows])
            sets[name] |= spread_fluency(generated, classifier)
            if examples is not None:
                sets[name]["knowledge_memorization"] = spread_knowledge(
                    model, tokenizer, rows, examples, batch_size, show, name
                )
            if name in SECTIONS:
                log[SECTIONS[name]] = section
        elif all(labelled_column(row) == "completion" for row in rows):

            def replies(
                tokens: list[Any], scores: list[TokenScores], room: int = room, name: str = name
            ) -> list[str]:
                title = f"{name}: generating"
                return generated_texts(
                    model, tokenizer, tokens, scores, room, batch_size, show, title, stop_strings=stop_strings
                )

            generated = spread(replies, tokens, scores)
            references = _completions(rows, tokens, tokenizer, max_length)
            sets[name]["rouge"] = mean_over_rows(rouge_recalls(generated, references)[1])
            sets[name] |= _dialogue_measures(generated, references)
            sets[name] |= spread_fluency(generated, classifier)
            reason = reason_not_continued(model, tokenizer, (row["prompt"] for row in rows), VERBATIM_TOKENS)
            if reason is None:
                sets[name]["verbatim_memorization"] = spread_verbatim(
                    model, tokenizer, rows, batch_size, show, name
                )
            else:
                not_available[f"verbatim_memorization of {name}"] = reason

    whole: dict[str, float | None] = dict.fromkeys(WHOLE)
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
        whole["membership_auc"] = min_k_auc(counted_of["forget"], counted_of["holdout"], min_k_share)
        auc = whole["min_40_auc"] = min_k_auc(content_of["forget"], content_of["holdout"])
        if reference_report is None:
            not_available["retain_auc"] = f"no reference report; privleak takes {CHANCE_AUC}"
            whole["privleak"] = privleak(auc)
        else:
            whole["retain_auc"] = reference_report["whole"]["min_40_auc"]
            whole["privleak"] = privleak(auc, reference_report["whole"]["min_40_auc"])
    else:
        for measure in ("membership_auc", "min_40_auc", "retain_auc", "privleak"):
            not_available[measure] = f"no {' and no '.join(missing)} set"
    differences: dict[str, dict[str, float]] = {}
    if reference_report is not None:
        theirs = {**reference_report["sets"], "all sets": reference_report["whole"]}
        compared = {name: value for name, value in whole.items() if name not in ("privleak", "retain_auc")}
        differences = relative_differences({**sets, "all sets": compared}, theirs)
    return Evaluation(sets, whole, not_available, log, differences, digests, rows_of)


def _dialogue_measures(generated: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {
        "dialogue_f1": mean_over_rows(dialogue_f1(generated, references)),
        "dialogue_f1_knowledge_unlearning": mean_over_rows(
            dialogue_f1(generated, references, "knowledge-unlearning")
        ),
    }


def _examples(source: Iterable[Any] | str | os.PathLike | None) -> list[tuple[str, str]] | None:
    """Return the questions and answers of the knowledge examples; None if there are none given."""
    if source is None:
        return None
    given = read_rows(source) if isinstance(source, (str, os.PathLike)) else source
    rows = list(as_rows(given, "knowledge examples"))
    for index, row in enumerate(rows):
        if not _is_question(row):
            raise RowError("knowledge examples", index, "it needs 'question' and 'answer'")
    return [(row["question"], row["answer"]) for row in rows]


def _completions(
    rows: list[Any], tokens: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[str]:
    """Return the texts that generated completions are compared with: of a cut row, what was left of it."""
    decode: Any = tokenizer.decode
    return [
        decode([label for label in ids["labels"] if label != IGNORE_INDEX], skip_special_tokens=True)
        if len(ids["input_ids"]) == max_length
        else row["completion"]
        for row, ids in zip(rows, tokens, strict=True)
    ]


def _is_question(row: Any) -> bool:
    return labelled_column(row) == "answer"


def _by_row(section: Section, count: int) -> list[dict[str, Any]]:
    """Turn a section of a TOFU log into one ``{quantity: value}`` for each of its ``count`` rows."""
    return [
        {quantity: values[str(i)] for quantity, values in section.items() if str(i) in values}
        for i in range(count)
    ]


def _by_quantity(rows: Iterable[dict[str, Any]]) -> Section:
    """Turn one ``{quantity: value}`` for each row into a section of a TOFU log."""
    section: Section = {}
    for index, row in enumerate(rows):
        for quantity, value in row.items():
            section.setdefault(quantity, {})[str(index)] = value
    return section
