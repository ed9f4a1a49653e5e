"""RWKU (Jin et al., NeurIPS 2024): what a chat model knows about famous people."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from loku.benchmarks.protocol import Benchmark, Column, Measures, Measuring, Sets
from loku.benchmarks.sources import Source, check_columns, texts_of
from loku.benchmarks.text_rows import measured_rows
from loku.data.files import read_rows
from loku.evaluation.extraction import end_ids
from loku.evaluation.generation import generate_greedy
from loku.evaluation.scores import mean_over_rows, token_scores
from loku.evaluation.text_fluency import fluency
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPOSITORY = "jinzhuoran/RWKU"
ANSWER_TOKENS = 30
REASONING_TOKENS = FLUENCY_TOKENS = 256
ENDS = ("<|eot_id|>", " \n", "\n")  # tokens that end an answer, as far as the vocabulary has them
LETTERS = "ABCD"
_BLANK = "Please complete the blank in the following question.\nQuestion: {}\n"
_QUESTION = "Please briefly answer the following question.\nQuestion: {}\n"
# type of an attack -> its prompt, and what begins the answer; the others have that of a question
_ATTACKS = {
    "affirmative suffix": ("Please briefly answer the following question.\nQuestion: {}", ""),
    "incontext learning": ("Please briefly answer the following question.\n{}\n", "Answer:"),
}
_NOT_IN_DATA = "the examples in its prompts are in the code of RWKU, and not in its data"
_PROBES = {
    "Forget FB": ("forget_level1", _BLANK),
    "Forget QA": ("forget_level2", _QUESTION),
    "Forget AA": ("forget_level3", None),
    "Neighbor FB": ("neighbor_level1", _BLANK),
    "Neighbor QA": ("neighbor_level2", _QUESTION),
}
_COLUMNS: dict[str, tuple[str, ...]] = {  # beside "subject"
    "forget_level1": ("query", "answer"),
    "forget_level2": ("query", "answer"),
    "forget_level3": ("query", "answer", "type"),
    "neighbor_level1": ("query", "answer"),
    "neighbor_level2": ("query", "answer"),
    "mia_forget": ("text",),
    "mia_retain": ("text",),
    "utility_general": ("question", "choices", "answer", "task", "examples"),
    "utility_reason": ("question", "answer", "cot"),
    "utility_fluency": ("instruction",),
}
_MEMBERS = {"MIA FM": "mia_forget", "MIA RM": "mia_retain"}


class Rwku(Benchmark):
    """RWKU: probes of what is forgotten and of its neighbours, membership inference and utility.

    A split is the name of a person, such as "Stephen King", or several with ";" between them, which are
    forgotten at once. RWKU has texts to forget, which its models wrote, and none to keep. So the texts on the
    other people are kept, unless ``retain`` names others.

    Args:
        corpus: The config of the texts to forget, "train_positive_llama3" by default.
        retain: A data set of texts to keep, as for ``loku.data.read_rows``; None (default) for the texts on
            the other people.
    """

    name = "rwku"
    title = "RWKU (Jin et al., 2024)"
    splits = ("the names of people in the set forget_target",)
    default_split = "Stephen King"
    columns = (
        Column("Forget FB", "lower", "ROUGE-L recall of filled blanks about the person."),
        Column("Forget QA", "lower", "ROUGE-L recall of answers about the person."),
        Column("Forget AA", "lower", "ROUGE-L recall of answers to adversarial attacks about the person."),
        Column("Neighbor FB", "higher", "ROUGE-L recall of filled blanks about neighbours."),
        Column("Neighbor QA", "higher", "ROUGE-L recall of answers about neighbours."),
        Column("MIA FM", "higher", "Mean loss of texts about the person, in nats."),
        Column("MIA RM", "lower", "Mean loss of texts about others, in nats."),
        Column("Utility Gen", "higher", "Accuracy of questions of MMLU with five examples."),
        Column("Utility Rea", "higher", "Exact match of answers to BBH with chains of thought."),
        Column("Utility Tru", "higher", "TruthfulQA."),
        Column("Utility Fac", "higher", "TriviaQA."),
        Column(
            "Utility Flu", "higher", "Weighted entropy of bigrams and trigrams of AlpacaEval answers, bits."
        ),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"max_length": 512}
    averages_splits = True

    def __init__(self, corpus: str = "train_positive_llama3", retain: str | None = None) -> None:
        self.corpus, self.retain = corpus, retain

    def sets(self, source: Source, split: str) -> Sets:
        """Read the texts about the people to forget and about others, the probes and the utility sets."""
        people = [name.strip() for name in split.split(";")]
        corpus = source.rows(REPOSITORY, self.corpus)
        check_columns(corpus, ("subject", "text"), self.corpus)
        known = {row["subject"] for row in corpus}
        missing = [name for name in people if name not in known]
        if missing:
            raise ValueError(
                f"{self.corpus} has no texts about {', '.join(missing)}; a split is the name of one of "
                f"{len(known)} people, such as {min(known)!r}"
            )
        forget = [row for row in corpus if row["subject"] in people]
        if self.retain is not None:
            retain = [{"text": text} for text in texts_of(list(read_rows(self.retain)), "retain")]
        else:
            retain = [row for row in corpus if row["subject"] not in people]
        if not retain:
            raise ValueError(f"{self.corpus} has no texts about others to keep; name texts by --retain")
        evaluation: dict[str, Any] = {}
        for config, columns in _COLUMNS.items():
            rows = source.rows(REPOSITORY, config, "test")
            check_columns(rows, ("subject", *columns), config)
            evaluation[config] = [row for row in rows if row["subject"] in people]
        return Sets([forget], retain, evaluation)

    def sample_kind(self, split: str) -> str:
        """Return the number of people that are forgotten at once, if they are several."""
        count = len(split.split(";"))
        return "" if count == 1 else f"sets of {count} people"

    def measure(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sets: Sets,
        measuring: Measuring,
    ) -> Measures:
        """Measure the columns that the data has; the prompts are in the tokenizer's chat template.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("RWKU asks by the tokenizer's chat template, and this tokenizer has none")
        used = {name: measuring.first(rows) for name, rows in sets.evaluation.items()}
        asked = _Asked(model, tokenizer, measuring)
        values: dict[str, float] = {}
        not_available = {"Utility Tru": _NOT_IN_DATA, "Utility Fac": _NOT_IN_DATA}

        def measured(column: str, config: str, measure: Callable[[list[Any]], float]) -> None:
            if used[config]:
                values[column] = measure(used[config])
            else:
                not_available[column] = f"the set {config} has no rows of the split"

        for column, (config, prompt) in _PROBES.items():
            measured(column, config, partial(asked.recall, prompt, column))
        for column, config in _MEMBERS.items():
            measured(column, config, partial(asked.loss, column))
        measured("Utility Gen", "utility_general", asked.choice_accuracy)
        measured("Utility Rea", "utility_reason", asked.exact_match)
        measured("Utility Flu", "utility_fluency", asked.entropy)
        return Measures(values, not_available)


class _Asked:
    """RWKU's questions to one model."""

    def __init__(self, model: CausalLM, tokenizer: Any, measuring: Measuring) -> None:
        self.model, self.tokenizer, self.measuring = model, tokenizer, measuring
        self.ends = end_ids(model, tokenizer)

    def prompt(self, text: str, begin: str) -> list[int]:
        """Return the tokens of a user's message, and of the beginning of the answer.

        The chat template places the special tokens, once.
        """
        messages = [{"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if begin == "A:" and chat[-1:] not in ("\n", " "):
            begin = " A:"
        return list(self.tokenizer(chat + begin, add_special_tokens=False, verbose=False)["input_ids"])

    def answers(self, prompts: Sequence[list[int]], count: int, title: str, lines: bool = False) -> list[str]:
        """Return greedy answers; with ``lines`` they end at a line's end, too, if that is one token."""
        ends = set(self.ends)
        vocabulary = self.tokenizer.get_vocab()
        ends |= {vocabulary[token] for token in (ENDS if lines else ENDS[:1]) if token in vocabulary}
        found = generate_greedy(
            self.model,
            prompts,
            [count] * len(prompts),
            self.measuring.batch_size,
            sorted(ends),
            self.measuring.progress,
            title,
        )
        stripped = [ids[:-1] if ids and ids[-1] in ends else ids for ids in found]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in stripped]

    def recall(self, prompt: str | None, title: str, rows: Sequence[Any]) -> float:
        """Return the mean ROUGE-L recall of short answers. Without a prompt the rows are attacks."""
        prompts = []
        for row in rows:
            form, begin = (prompt, "Answer:") if prompt else _ATTACKS.get(row["type"], (_QUESTION, "Answer:"))
            prompts.append(self.prompt(form.format(row["query"]), begin))
        answers = self.answers(prompts, ANSWER_TOKENS, title, lines=True)
        return mean_over_rows(
            rouge_l_recall(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)
        )

    def loss(self, title: str, rows: Sequence[Any]) -> float:
        """Return the mean over texts of their mean loss."""
        texts = [row["text"] for row in rows]
        tokens = measured_rows(texts, self.model, self.tokenizer, None, title)
        scores = token_scores(self.model, tokens, self.measuring.batch_size, self.measuring.progress, title)
        return mean_over_rows(score.losses.mean().item() for score in scores)

    def choice_accuracy(self, rows: Sequence[Any]) -> float:
        """Return the accuracy of the likeliest of four letters after five examples."""
        letters = [self.tokenizer(f" {c}", add_special_tokens=False)["input_ids"][-1] for c in LETTERS]
        tokens = []
        for row in rows:
            examples = "".join(
                f"{_choices(one)}\nAnswer: {LETTERS[int(one['answer'])]}\n\n" for one in row["examples"]
            )
            text = (
                "The following are multiple choice questions (with answers) about "
                f"{row['task'].replace('_', ' ')}.\n\n{examples}"
                f"Please following the previous examples and answer the given question.\n{_choices(row)}"
            )
            ids = self.prompt(text, "Answer:")
            tokens += [
                {"input_ids": [*ids, letter], "labels": [*[-100] * len(ids), letter]} for letter in letters
            ]
        scores = token_scores(
            self.model, tokens, self.measuring.batch_size, self.measuring.progress, "Utility Gen"
        )
        losses = [score.losses.sum().item() for score in scores]
        chosen = [
            min(range(4), key=losses[start : start + 4].__getitem__) for start in range(0, len(losses), 4)
        ]
        return mean_over_rows(
            float(choice == int(row["answer"])) for choice, row in zip(chosen, rows, strict=True)
        )

    def exact_match(self, rows: Sequence[Any]) -> float:
        """Return the share of answers after chains of thought that are equal to a true one, in words."""
        prompts = [
            self.prompt(
                f"{row['cot'].strip()}\n\nFollowing previous examples, answer the following questions and "
                f"end with 'so the answer is'\nQ: {row['question']}",
                "A:",
            )
            for row in rows
        ]
        outputs = self.answers(prompts, REASONING_TOKENS, "Utility Rea")
        hits = []
        for output, row in zip(outputs, rows, strict=True):
            found = re.search(r"[tT]he answer is (.*?)\.", output)
            answer = found[1] if found else output
            true = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
            hits.append(float(_plain(answer) in [_plain(one) for one in true]))
        return mean_over_rows(hits)

    def entropy(self, rows: Sequence[Any]) -> float:
        """Return the mean weighted entropy of the n-grams of answers to instructions, in bits."""
        prompts = [self.prompt(f"Instruction: {row['instruction']}\n", "") for row in rows]
        return fluency(self.answers(prompts, FLUENCY_TOKENS, "Utility Flu"))["ngram_entropy"]


def _choices(row: Mapping[str, Any]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return "\n".join([f"Question: {row['question']}", *lines])


def _plain(text: str) -> list[str]:
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def rouge_l_recall(generated: str, reference: str) -> float:
    """Compute ROUGE-L recall as the package ``rouge`` does, by which RWKU judges answers.

        words of the reference that are in a longest common subsequence / words of the reference

    Words are what spaces part, each counted once, with their case and their marks. Both texts are split at
    full stops, and the subsequences are those of all pairs of sentences (Lin, 2004, the summary level).
    ``loku.evaluation.rouge_recalls`` is TOFU's measure, which compares the stems of words without case.

    Args:
        generated: The generated text.
        reference: The true text.

    Returns:
        The recall, in [0, 1].
    """
    ours, theirs = _sentences(generated), _sentences(reference)
    words = {word for sentence in theirs for word in sentence}
    if not words:
        return 0.0
    common = {word for true in theirs for sentence in ours for word in _common(true, sentence)}
    return len(common) / len(words)


def _sentences(text: str) -> list[list[str]]:
    return [sentence.split() for sentence in text.split(".") if sentence]


def _common(a: Sequence[str], b: Sequence[str]) -> Iterable[str]:
    """Return the words of a longest common subsequence; of several the one that leaves ``b`` first."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a, 1):
        for j, right in enumerate(b, 1):
            same = lengths[i - 1][j - 1] + 1
            lengths[i][j] = same if left == right else max(lengths[i - 1][j], lengths[i][j - 1])
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            yield a[i - 1]
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
