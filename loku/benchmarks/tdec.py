"""The Training Data Extraction Challenge as Jang et al. (ACL 2023) and LoKU use it: memorised sequences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loku.benchmarks.protocol import Benchmark, Column, Measures, Measuring, Sets
from loku.benchmarks.sources import Source, texts_of
from loku.benchmarks.text_rows import first_tokens, measured_rows
from loku.callbacks import ExtractionStopping
from loku.data.files import read_rows, read_text
from loku.evaluation.dialogue import dialogue_f1
from loku.evaluation.extraction import extraction_likelihood
from loku.evaluation.generation import generate_greedy
from loku.evaluation.reasoning import check_harness, reasoning_accuracies
from loku.evaluation.scores import mean_over_rows, token_measures, token_scores
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

REPOSITORY = "https://github.com/joeljang/knowledge-unlearning"
SEQUENCE_TOKENS = 200
INPUT_TOKENS = 512  # of a text of perplexity, and of the turns of a dialogue
REPLY_TOKENS = 32
NGRAM = 10
DIALOGUES = ("blended_skill_talk", "empathetic_dialogues", "wizard_of_internet", "wizard_of_wikipedia")
_FIRST_PERSON = ("i", "i'm", "i've", "i'll", "i'd")
# how a mark stands apart from words -> how it stands in a turn, in the order in which ParlAI replaces them
_MARKS = {" .": ".", " ,": ",", " ?": "?", " !": "!", " ' ": "'"}
_SENTENCE_ENDS = ("", ".", "?", "!", "?.", ".!", "?.!")  # the pieces of "?.!", of which "" is one


class Tdec(Benchmark):
    """TDEC: extraction likelihood, memorisation accuracy, and what is kept.

    The data is a checkout of knowledge-unlearning. A split is the name of a file in its ``data/main`` or
    ``data/domain_main`` without the suffix. Several with "+" between them are forgotten one after the other.
    ``validation_data/wikitext.csv`` is kept, unless ``retain`` names other texts.

    Args:
        thresholds: EL10 and MA at which training stops, both in [0, 1]; None (default) for none.
        holdout: Texts that the model never saw, as for ``loku.data.read_rows``. Training stops when the
            forget texts are known no better than these; None (default) for none.
        retain: A data set of texts to keep, in the same forms; None (default) for WikiText.
        reasoning: Whether the nine reasoning sets are measured, by lm-evaluation-harness; False by default.

    Raises:
        ValueError: There are both ``thresholds`` and ``holdout``.
    """

    name = "tdec"
    title = "TDEC (Jang et al., 2023; Cha et al., 2025)"
    splits = ("the names of the files in data/main and data/domain_main without .csv",)
    default_split = "lm_extraction_32_0"
    columns = (
        Column("EL10", "lower", "Extraction Likelihood of the forget sequences."),
        Column("MA", "lower", "Memorisation Accuracy of the forget sequences."),
        Column("Reasoning", "higher", "Mean accuracy of the nine reasoning sets."),
        Column("Dialogue", "higher", "Mean F1 of replies in four dialogue sets."),
        Column("Pile", "lower", "Perplexity of texts of the Pile."),
        Column("WikiText", "lower", "Perplexity of WikiText."),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"max_length": SEQUENCE_TOKENS, "num_train_epochs": 20}
    averages_splits = True

    def __init__(
        self,
        thresholds: tuple[float, float] | None = None,
        holdout: str | None = None,
        retain: str | None = None,
        reasoning: bool = False,
    ) -> None:
        if thresholds is not None and holdout is not None:
            raise ValueError("thresholds are given or measured on a hold-out set: name one of the two")
        for value in thresholds or ():
            if not 0 <= value <= 1:
                raise ValueError(f"thresholds of EL10 and MA are in [0, 1], got {value}")
        self.thresholds, self.holdout, self.retain, self.reasoning = thresholds, holdout, retain, reasoning

    def check(self) -> None:
        """Check that lm-evaluation-harness is installed if the reasoning sets are measured."""
        if self.reasoning:
            check_harness()

    def sets(self, source: Source, split: str) -> Sets:
        """Read the sequences, the texts to keep, dialogues and texts of perplexity."""
        if source.folder is None:
            raise ValueError(
                f"TDEC's data is on no hub: git clone {REPOSITORY}; then --data knowledge-unlearning"
            )
        folder = source.folder
        requests = [_texts(_sequences(folder, name)) for name in split.split("+")]
        validation = folder / "validation_data"
        evaluation: dict[str, Any] = {
            name: _dialogues(_existing(validation / f"{name}.json")) for name in DIALOGUES
        }
        for name in ("pile", "wikitext"):
            evaluation[name] = _texts(_existing(validation / f"{name}.csv"))
        evaluation["forget"] = [text for request in requests for text in request]
        if self.holdout is not None:
            evaluation["holdout"] = texts_of(list(read_rows(self.holdout)), "holdout")
        retain = evaluation["wikitext"]
        if self.retain is not None:
            retain = texts_of(list(read_rows(self.retain)), "retain")
        return Sets(requests, retain, evaluation)

    def sample_kind(self, split: str) -> str:
        """Return the names of the files without the number of the sample, such as ``lm_extraction_32``."""
        return "+".join(name.rpartition("_")[0] for name in split.split("+"))

    def training_rows(self, rows: Any, tokenizer: PreTrainedTokenizerBase, config: Any) -> Any:
        """Return the first ``max_length`` tokens of each text."""
        return first_tokens(rows, tokenizer, config.max_length, "forget or retain")

    def callbacks(
        self, request: Any, sets: Sets, tokenizer: PreTrainedTokenizerBase, measuring: Measuring
    ) -> list[TrainerCallback]:
        """Return the paper's stopping rule, if there are thresholds or a hold-out set."""
        if self.thresholds is None and self.holdout is None:
            return []
        holdout, known = request, None
        if self.holdout is not None:
            holdout = first_tokens(sets.evaluation["holdout"], tokenizer, SEQUENCE_TOKENS, "holdout")
        else:
            names = (f"holdout_extraction_likelihood_{NGRAM}", "holdout_memorization_accuracy")
            known = dict(zip(names, self.thresholds or (), strict=True))
        return [
            ExtractionStopping(request, holdout, n=NGRAM, batch_size=measuring.batch_size, thresholds=known)
        ]

    def measure(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sets: Sets,
        measuring: Measuring,
    ) -> Measures:
        """Measure the columns. The forget sequences are those of all requests."""
        options: dict[str, Any] = {"batch_size": measuring.batch_size, "progress": measuring.progress}
        forget = measured_rows(
            measuring.first(sets.evaluation["forget"]), model, tokenizer, SEQUENCE_TOKENS, "forget"
        )
        scores = token_scores(model, forget, **options, description="MA")
        values = {
            "EL10": extraction_likelihood(model, forget, n=NGRAM, scores=scores, **options).mean,
            "MA": token_measures(scores)["memorization_accuracy"],
            "Dialogue": mean_over_rows(
                self._dialogue(model, tokenizer, name, measuring.first(sets.evaluation[name]), measuring)
                for name in DIALOGUES
            ),
        }
        for column, name in (("Pile", "pile"), ("WikiText", "wikitext")):
            texts = measuring.first(sets.evaluation[name])
            rows = measured_rows(texts, model, tokenizer, INPUT_TOKENS, name)
            values[column] = token_measures(token_scores(model, rows, **options, description=column))[
                "perplexity"
            ]
        not_available = {}
        if self.reasoning:
            accuracies = reasoning_accuracies(
                model, tokenizer, batch_size=measuring.batch_size, limit=measuring.limit
            )
            values["Reasoning"] = mean_over_rows(accuracies.values())
        else:
            not_available["Reasoning"] = "it was not asked for: --reasoning"
        return Measures(values, not_available)

    @staticmethod
    def _dialogue(
        model: CausalLM,
        tokenizer: Any,
        name: str,
        dialogues: Sequence[Sequence[str]],
        measuring: Measuring,
    ) -> float:
        """Return the mean F1 of greedy replies with the last turns."""
        prompts = [
            tokenizer(dialogue_prompt(turns[:-1]), verbose=False)["input_ids"][:INPUT_TOKENS]
            for turns in dialogues
        ]
        replies = generate_greedy(
            model,
            prompts,
            [REPLY_TOKENS] * len(prompts),
            measuring.batch_size,
            progress=measuring.progress,
            description=name,
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True).split("\nUser ")[0] for ids in replies]
        return mean_over_rows(
            dialogue_f1(texts, [normalised_turn(turns[-1]) for turns in dialogues], "knowledge-unlearning")
        )


def dialogue_prompt(turns: Sequence[str]) -> str:
    r"""Return the prompt of the next turn of a dialogue: ``"User 1: ...\nUser 2: ...\nUser 1:"``."""
    lines = [f"User {1 + i % 2}: {normalised_turn(turn)}\n" for i, turn in enumerate(turns)]
    return "".join(lines) + f"User {1 + len(turns) % 2}:"


def normalised_turn(turn: str) -> str:
    """Return a turn with capitals where sentences begin and a mark at its end, by ParlAI's second version.

    It is in small letters but for "I" and the first words of sentences. No space stands before a full stop, a
    comma, a question mark or an exclamation mark, nor around an apostrophe.
    """
    text = turn.lower()
    for apart, mark in _MARKS.items():
        text = text.replace(mark, apart).replace("  ", " ")
    words = text.split(" ")
    for index, word in enumerate(words):
        begins = index == 0 or (index > 1 and words[index - 1] in _SENTENCE_ENDS)
        if begins or word in _FIRST_PERSON:
            words[index] = word[:1].upper() + word[1:]
    text = f" {' '.join(words)} "
    for apart, mark in _MARKS.items():
        text = text.replace(apart, mark)
    text = text.strip().replace("  ", " ")
    return f"{text}." if text and text[-1] not in "!.?)\"'" else text


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(
            f"there is no {file}: --data is a checkout of knowledge-unlearning: git clone {REPOSITORY}"
        )
    return file


def _sequences(folder: Path, name: str) -> Path:
    for part in ("main", "domain_main"):
        file = folder / "data" / part / f"{name}.csv"
        if file.is_file():
            return file
    known = sorted(file.stem for file in (folder / "data" / "main").glob("*.csv"))
    raise ValueError(
        f"{folder} has no data/main/{name}.csv and no data/domain_main/{name}.csv"
        + (f"; it has {', '.join(known)}" if known else f": git clone {REPOSITORY}")
    )


def _texts(file: Path) -> list[str]:
    """Return the texts of a CSV file; rows with an empty cell are left out, as by knowledge-unlearning."""
    rows = [row for row in read_rows(file) if all(value is not None for value in row.values())]
    return texts_of(rows, str(file))


def _dialogues(file: Path) -> list[list[str]]:
    """Return the turns of each dialogue of a file, ``{"text": {"0": [turn, ...]}}`` or a list of rows."""
    content = json.loads(read_text(file))
    if isinstance(content, dict):
        columns = content.get("text")
        dialogues = list(columns.values()) if isinstance(columns, dict) else columns
    else:
        dialogues = [row.get("text") if isinstance(row, dict) else None for row in content]
    if not isinstance(dialogues, list) or not dialogues:
        raise ValueError(f"{file} has no dialogues: it needs turns in 'text'")
    for index, turns in enumerate(dialogues):
        texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
        if not texts or len(turns) < 2:
            raise ValueError(f"dialogue {index} of {file} is no list of two turns or more")
    return dialogues
