"""What a model still knows: extraction (Eqs. 4 to 6), TOFU's measures, reports and plots."""

from loku.evaluation.extraction import (
    ExtractionLikelihood,
    extraction_likelihood,
    generate_greedy,
    greedy_answers,
    memorization_accuracy,
    perplexity,
    token_scores,
)
from loku.evaluation.report import format_table, plot_probabilities, write_report
from loku.evaluation.tofu import (
    answer_losses,
    evaluate_tofu_rows,
    forget_quality,
    model_utility,
    rouge_recalls,
    section_metrics,
    utility_table,
)

__all__ = [
    "ExtractionLikelihood",
    "answer_losses",
    "evaluate_tofu_rows",
    "extraction_likelihood",
    "forget_quality",
    "format_table",
    "generate_greedy",
    "greedy_answers",
    "memorization_accuracy",
    "model_utility",
    "perplexity",
    "plot_probabilities",
    "rouge_recalls",
    "section_metrics",
    "token_scores",
    "utility_table",
    "write_report",
]
