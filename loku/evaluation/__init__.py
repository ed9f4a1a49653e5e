"""The knowledge left in a model: extraction, TOFU's and MUSE's measures, privacy, fluency, and reports."""

from loku.evaluation.dialogue import dialogue_f1
from loku.evaluation.endings import Endings, content_scores
from loku.evaluation.extraction import (
    ExtractionLikelihood,
    extraction_likelihood,
    generated_texts,
    greedy_answers,
)
from loku.evaluation.generation import generate_greedy
from loku.evaluation.last_word import LastWords, last_words
from loku.evaluation.muse import (
    Memorization,
    knowledge_memorization,
    rouge_l_f1,
    verbatim_memorization,
)
from loku.evaluation.privacy import min_k_auc, privleak, relative_difference
from loku.evaluation.reasoning import REASONING_TASKS, reasoning_accuracies
from loku.evaluation.report import format_table, plot_measures, plot_probabilities, write_report
from loku.evaluation.scores import (
    TokenScores,
    extraction_strength,
    mean_answer_probability,
    membership_auc,
    memorization_accuracy,
    min_k,
    perplexity,
    token_measures,
    token_scores,
)
from loku.evaluation.suite import Evaluation, evaluate
from loku.evaluation.text_fluency import (
    TextClassifier,
    fluency,
    load_classifier,
    ngram_entropy,
    repetition,
)
from loku.evaluation.tofu import answer_losses, evaluate_tofu_rows, rouge_recalls
from loku.evaluation.tofu_logs import forget_quality, model_utility, section_metrics, utility_table
from loku.evaluation.truth_probability import truth_probability

__all__ = [
    "REASONING_TASKS",
    "Endings",
    "Evaluation",
    "ExtractionLikelihood",
    "LastWords",
    "Memorization",
    "TextClassifier",
    "TokenScores",
    "answer_losses",
    "content_scores",
    "dialogue_f1",
    "evaluate",
    "evaluate_tofu_rows",
    "extraction_likelihood",
    "extraction_strength",
    "fluency",
    "forget_quality",
    "format_table",
    "generate_greedy",
    "generated_texts",
    "greedy_answers",
    "knowledge_memorization",
    "last_words",
    "load_classifier",
    "mean_answer_probability",
    "membership_auc",
    "memorization_accuracy",
    "min_k",
    "min_k_auc",
    "model_utility",
    "ngram_entropy",
    "perplexity",
    "plot_measures",
    "plot_probabilities",
    "privleak",
    "reasoning_accuracies",
    "relative_difference",
    "repetition",
    "rouge_l_f1",
    "rouge_recalls",
    "section_metrics",
    "token_measures",
    "token_scores",
    "truth_probability",
    "utility_table",
    "verbatim_memorization",
    "write_report",
]
