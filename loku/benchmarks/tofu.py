"""TOFU (Maini et al., 2024): fictitious authors that a fine-tuned model forgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loku.benchmarks.protocol import Benchmark, Column, Measures, Measuring, Sets
from loku.benchmarks.sources import Source, check_columns
from loku.data import TOFU_TEMPLATE
from loku.evaluation.tofu import evaluate_tofu_rows
from loku.evaluation.tofu_logs import SECTIONS, forget_quality, model_utility, utility_table
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPOSITORY = "locuslab/TOFU"
RETAIN_SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
_UTILITY_CONFIGS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
_SHORT = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
_MEASURES = {"probability": "Q_A_Prob", "rouge": "Q_A_ROUGE", "truth_ratio": "Truth_Ratio"}


def _component_columns() -> list[Column]:
    kinds = {
        "Q_A_Prob": "mean probability of the answers",
        "Q_A_ROUGE": "ROUGE-L recall of generated answers",
        "Truth_Ratio": "truth ratio",
    }
    sets = {"forget": "the forget set", "retain": "the retain set", "ra": "real authors", "wf": "world facts"}
    return [
        Column(f"{short}_{kind}", "lower" if short == "forget" else "higher", f"The {text} of {of}.")
        for short, of in sets.items()
        for kind, text in kinds.items()
        if (short, kind) != ("forget", "Truth_Ratio")  # it has a column of its own
    ]


class Tofu(Benchmark):
    """TOFU: forget quality, model utility and their components.

    The columns have the names of open-unlearning. ``model_utility`` and its components are TOFU's.
    """

    name = "tofu"
    title = "TOFU (Maini et al., 2024)"
    splits = tuple(RETAIN_SPLITS)
    default_split = "forget10"
    columns = (
        Column(
            "forget_quality",
            "higher",
            "The p-value of the Kolmogorov-Smirnov test of the truth ratios against a retain-only model.",
        ),
        Column("model_utility", "higher", "The harmonic mean of nine measures of what is kept."),
        Column("forget_truth_ratio", "higher", "The mean of min(R, 1/R) of the forget set's truth ratios R."),
        *_component_columns(),
    )
    leaderboard = (("forget10", "forget_quality"), ("forget10", "model_utility"))

    def sets(self, source: Source, split: str) -> Sets:
        """Read the forget set, its retain set and TOFU's four evaluation sets."""
        if split not in RETAIN_SPLITS:
            raise self.split_error(split)
        forget, retain = source.rows(REPOSITORY, split), source.rows(REPOSITORY, RETAIN_SPLITS[split])
        configs = {"forget": f"{split}_perturbed", **_UTILITY_CONFIGS}
        evaluation = {name: source.rows(REPOSITORY, config) for name, config in configs.items()}
        for name, rows in {split: forget, RETAIN_SPLITS[split]: retain}.items():
            check_columns(rows, ("question", "answer"), name)
        for name, rows in evaluation.items():
            check_columns(rows, ("question", "answer", "perturbed_answer"), configs[name])
        return Sets([forget], retain, evaluation)

    def full_rows(self, source: Source) -> list[Any]:
        """Read all rows, on which the model that forgets is fine-tuned."""
        rows = source.rows(REPOSITORY, "full")
        check_columns(rows, ("question", "answer"), "full")
        return rows

    def measure(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sets: Sets,
        measuring: Measuring,
    ) -> Measures:
        """Measure TOFU's sections. The reference is TOFU's log of the forget set."""
        template = TOFU_TEMPLATE if measuring.config is None else measuring.config.template()
        rows_of = {name: measuring.first(rows) for name, rows in sets.evaluation.items()}
        log = {
            SECTIONS[name]: evaluate_tofu_rows(
                model,
                tokenizer,
                rows,
                batch_size=measuring.batch_size,
                progress=measuring.progress,
                description=name,
                template=template,
            )
            for name, rows in rows_of.items()
        }
        table = utility_table(log)
        values = {"model_utility": model_utility(log), "forget_truth_ratio": table["forget"]["truth_ratio"]}
        for name, short in _SHORT.items():
            for measure, column in _MEASURES.items():
                if (name, measure) != ("forget", "truth_ratio"):
                    values[f"{short}_{column}"] = table[name][measure]
        log_of_forget = {SECTIONS["forget"]: log[SECTIONS["forget"]]}
        return Measures(values, {}, log_of_forget, {"model_utility": values["model_utility"]})

    def compared(self, measures: Measures, reference: Mapping[str, Any] | None) -> Measures:
        """Add the forget quality."""
        if reference is None:
            reason = "there is no model that never saw the forget set: --retain-model or --retain-log"
            return replace(measures, not_available={**measures.not_available, "forget_quality": reason})
        added = {"forget_quality": forget_quality(measures.reference, reference)}
        return replace(
            measures, values={**measures.values, **added}, leaderboard={**measures.leaderboard, **added}
        )
