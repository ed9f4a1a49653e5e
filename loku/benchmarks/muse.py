"""MUSE (Shi et al., ICLR 2025): news and books, measured by six properties."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from loku.benchmarks.protocol import Benchmark, Column, Measures, Measuring, Sets
from loku.benchmarks.sources import Source, check_columns, texts_of
from loku.benchmarks.text_rows import measured_rows, pieces
from loku.evaluation.muse import knowledge_memorization, rouge_l_f1, verbatim_memorization
from loku.evaluation.privacy import min_k_auc, privleak
from loku.evaluation.scores import mean_over_rows, token_scores
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPOSITORY = "muse-bench/MUSE-{}"
MAX_LENGTH = 2048  # tokens of a training row, and of a text of PrivLeak
FOLDS = 4  # of scalability and sustainability, which News alone has
_LEADERBOARD = ("forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "privleak", "retain_knowmem_ROUGE")
_SPLIT = re.compile(r"(News|Books)|News-(scal|sust)([1-4])")


class Muse(Benchmark):
    """MUSE: verbatim and knowledge memorisation, privacy leakage and utility.

    The splits "News" and "Books" forget the corpus of MUSE's main table. "News-scalK" forgets the K folds of
    its scalability at once, and "News-sustK" forgets K folds one after the other. So the columns are those of
    five properties, and the sixth (sustainability) is seen along K.
    """

    name = "muse"
    title = "MUSE (Shi et al., 2025)"
    splits = ("News", "Books", "News-scal1 to News-scal4", "News-sust1 to News-sust4")
    default_split = "News"
    columns = (
        Column("VerbMem f", "lower", "ROUGE-L F1 of greedy continuations of the forget texts, no stemming."),
        Column("KnowMem f", "lower", "ROUGE-L F1 of answers about the forget texts, no stemming."),
        Column("PrivLeak", "near 0", "The relative difference of membership AUCs to a retain-only model, %."),
        Column("KnowMem r", "higher", "ROUGE-L F1 of answers about the retain texts, no stemming."),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"max_length": MAX_LENGTH}
    leaderboard = tuple((split, name) for split in ("News", "Books") for name in _LEADERBOARD)

    def sets(self, source: Source, split: str) -> Sets:
        """Read the texts to forget and to keep, and the sets of verbmem, knowmem and privleak."""
        match = _SPLIT.fullmatch(split)
        if match is None:
            raise self.split_error(split)
        repository = REPOSITORY.format(match[1] or "News")

        def texts(config: str, part: str) -> list[str]:
            return texts_of(source.rows(repository, config, part), f"{config} {part}")

        def table(config: str, part: str, *columns: str) -> list[Any]:
            rows = source.rows(repository, config, part)
            check_columns(rows, columns, f"{config} {part}")
            return rows

        if match[2] == "sust":
            requests = [texts("sust", f"forget_{fold}") for fold in range(1, int(match[3]) + 1)]
        elif match[2] == "scal":
            requests = [texts("scal", f"forget_{match[3]}")]
        else:
            requests = [texts("raw", "forget")]
        evaluation: dict[str, Any] = {"verbmem": table("verbmem", "forget", "prompt", "gt")}
        for name in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"):
            evaluation[name] = table("knowmem", name, "question", "answer")
        for name in ("forget", "holdout"):
            evaluation[f"privleak_{name}"] = texts("privleak", name)
        return Sets(requests, texts("raw", "retain1"), evaluation)

    def training_rows(self, rows: Any, tokenizer: PreTrainedTokenizerBase, config: Any) -> Any:
        """Cut the texts into pieces of ``max_length`` tokens."""
        return pieces(rows, tokenizer, config.max_length or MAX_LENGTH)

    def measure(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sets: Sets,
        measuring: Measuring,
    ) -> Measures:
        """Measure memorisation and utility. The reference is the AUC of membership by Min-40%.

        The row of open-unlearning's leaderboard compares the stems of words, and true continuations as a
        whole.
        """
        used = {name: measuring.first(rows) for name, rows in sets.evaluation.items()}
        options: dict[str, Any] = {"batch_size": measuring.batch_size, "progress": measuring.progress}
        continuations = [row["gt"] for row in used["verbmem"]]
        verbatim = verbatim_memorization(
            model, tokenizer, [row["prompt"] for row in used["verbmem"]], continuations, **options
        )
        values = {"VerbMem f": verbatim.mean}
        leaderboard = {
            "forget_verbmem_ROUGE": mean_over_rows(
                rouge_l_f1(verbatim.generated, continuations, stemming=True)
            )
        }
        for name, column in (("forget", "KnowMem f"), ("retain", "KnowMem r")):
            answers = [row["answer"] for row in used[f"{name}_qa"]]
            examples = [(row["question"], row["answer"]) for row in sets.evaluation[f"{name}_qa_icl"]]
            known = knowledge_memorization(
                model,
                tokenizer,
                [row["question"] for row in used[f"{name}_qa"]],
                answers,
                examples,
                **options,
            )
            values[column] = known.mean
            stemmed = rouge_l_f1(known.generated, answers, stemming=True)
            leaderboard[f"{name}_knowmem_ROUGE"] = mean_over_rows(stemmed)
        scores: dict[str, Any] = {}
        for name in ("forget", "holdout"):
            max_length = measuring.config.max_length if measuring.config is not None else MAX_LENGTH
            rows = measured_rows(used[f"privleak_{name}"], model, tokenizer, max_length, f"privleak {name}")
            scores[name] = token_scores(model, rows, **options, description=f"privleak {name}")
        return Measures(
            values, {}, {"min_k_auc": min_k_auc(scores["forget"], scores["holdout"])}, leaderboard
        )

    def compared(self, measures: Measures, reference: Mapping[str, Any] | None) -> Measures:
        """Add PrivLeak."""
        if reference is None:
            reason = "there is no model that never saw the forget set: --retain-model"
            return replace(measures, not_available={**measures.not_available, "PrivLeak": reason})
        if "min_k_auc" not in reference:
            raise ValueError("the reference of MUSE has 'min_k_auc', the AUC of a retain-only model")
        leak = privleak(measures.reference["min_k_auc"], reference["min_k_auc"])
        return replace(
            measures,
            values={**measures.values, "PrivLeak": leak},
            leaderboard={**measures.leaderboard, "privleak": leak},
        )
