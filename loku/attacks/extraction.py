"""Extraction: the answers of forgotten rows are asked for in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loku.attacks.copies import check_one_process
from loku.attacks.preambles import PREAMBLES, QUESTION, check_preambles
from loku.attacks.questions import paraphrases_of, question_of, with_question
from loku.counts import check_counts
from loku.data import (
    IGNORE_INDEX,
    TOFU_TEMPLATE,
    QuestionTemplate,
    RowTokenizer,
    TokenLimits,
    as_rows,
    labelled_column,
    token_limits,
    tokenize_dataset,
)
from loku.data.rows import DataSet
from loku.evaluation.extraction import end_ids, greedy_answers
from loku.evaluation.generation import generate_sampled, until_eos
from loku.evaluation.rouge import Words, words
from loku.evaluation.scores import TokenScores, token_scores
from loku.models import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_HOLDOUT_ROWS = 20  # that are asked, if there are so many
SLACK = 16  # tokens of a generated answer beyond the true one
NEARLY = 0.5  # least ROUGE-L recall of an answer that nearly comes back
ANY_WAY = "any way"
FIRST_TOKEN = "from its first token"
PREFIXES: Mapping[str, Callable[[int], int]] = {
    FIRST_TOKEN: lambda tokens: 1,
    "from its first quarter": lambda tokens: tokens // 4,
    "from its first half": lambda tokens: tokens // 2,
}


class _Target(NamedTuple):
    """An answer that is asked for.

    Attributes:
        row: The index of its row in the set.
        kind: The name of the preamble, or "".
        ids: The tokens of the prompt and of the answer.
        begin: The index of the answer's first token, >= 1.
        text: Whether the row is a text without a prompt.
    """

    row: int
    kind: str
    ids: list[int]
    begin: int
    text: bool

    def tokens(self) -> dict[str, list[int]]:
        """Return the tokenised row of the target, with the answer labelled."""
        labels = [IGNORE_INDEX] * self.begin + self.ids[self.begin :]
        return {"input_ids": self.ids, "labels": labels}

    def after(self, count: int) -> _Target:
        """Return the target whose prompt has the first ``count`` tokens of the answer, too."""
        return self._replace(begin=self.begin + count)


class _Found(NamedTuple):
    """How much of a target came back: the ROUGE-L recall in [0, 1], and whether it came word by word."""

    recall: float
    whole: bool


def extraction_attack(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    forget: DataSet,
    holdout: DataSet | None = None,
    *,
    samples: int = 8,
    temperature: float = 1.0,
    top_p: float = 0.95,
    preambles: Mapping[str, str] | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    template: QuestionTemplate = TOFU_TEMPLATE,
) -> dict[str, Any]:
    """Ask a model for the answers of the forget rows in several ways, and count those that come back.

    The ways, each with its own figures. Generation is greedy but for the samples.

    - ``prompt``: from the row's own prompt.
    - ``from its first token``, ``from its first quarter``, ``from its first half``: from the prompt and the
      start of the answer itself; the rest is compared (Carlini et al., ICLR 2023). A text without a prompt
      is continued from its own quarter and half.
    - ``sampled``: the best of several samples from the prompt, of a text from its half. Greedy answers alone
      understate what is left (Scholten et al., ICLR 2025).
    - ``paraphrased``: the best of the questions in the columns ``paraphrased_question``, a text, and
      ``paraphrased_questions``, a list of texts. They stand in the place of the question, the prompt, the
      instruction, or the last message of the user.
    - ``preambles``: the best of the question behind each preamble, such as a role or another language. It is
      the user's turn that gets the preamble.

    An answer comes back *word by word* if the generated text contains its words in their order, without
    others between them. Case and punctuation do not count. ROUGE-L recall is the share of the answer's words
    that the generated text has in the same order, of any script and without stemming. A chat stands for its
    last labelled turn, and another row of several labelled spans, such as packed documents, for its longest.
    The model and the random generators stay as they are; no copy of the model is made.

    Args:
        model: The unlearned causal LM, on the device where it runs. The same call on the original model gives
            the figures from before.
        tokenizer: The tokenizer.
        forget: The forget rows.
        holdout: Rows of the same kind on which the model was never trained, whose figures are the level of
            chance; None (default) for none. Of more rows than the forget set and 20, evenly spaced ones are
            asked.
        samples: The number of samples, 8 by default.
        temperature: The number by which the logits are divided before sampling, > 0; 1 by default.
        top_p: The probability of the nucleus, in (0, 1]; 0.95 by default.
        preambles: The preambles by their names, with ``{question}`` once in each; None (default) stands for
            ``PREAMBLES``.
        max_new_tokens: The number of tokens of an answer that are asked for and compared, from its start or
            from the end of the prefix; 128 by default.
        seed: The seed of the samples, 0 by default.
        batch_size: The number of prompts in a batch, 16 by default. No figure depends on it.
        max_length: The number of tokens at which rows are cut; None (default) does not cut them.
        progress: Whether to show progress bars, False by default.
        template: The template of ``question`` and ``answer``; TOFU's by default.

    Returns:
        ``settings``; ``sets``, ``{"forget": {way: figures}, "holdout": ...}``; and ``not_tested``, ``{set:
        {way: reason}}``. The figures of a way: ``rows``, the number of rows it applies to; ``whole``, the
        share of them that came back word by word; ``nearly``, the share with a ROUGE-L recall of at least
        0.5; ``rouge_l_recall``, the mean of the best recall of each row; ``rows_whole`` and ``rows_nearly``,
        the indices of these rows. ``any way`` has the rows that came back by at least one way, without a
        recall. ``preambles`` has ``by_preamble``, the ``whole``, ``nearly`` and
        ``rouge_l_recall`` of each.

    Raises:
        ValueError: A number is out of its range, a preamble has no place for the question, a set is empty, or
            there are several processes.
        RowError: A row cannot be used.
        FloatingPointError: A loss or a logit is NaN.
    """
    check_one_process("extraction")
    check_counts(samples=samples, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_counts(0, seed=seed)
    preambles = PREAMBLES if preambles is None else preambles
    check_preambles(preambles)
    sets = {"forget": forget} if holdout is None else {"forget": forget, "holdout": holdout}
    limits, ends = token_limits(model), end_ids(model, tokenizer, template)
    asked: dict[str, _Questions] = {}
    for name, rows in sets.items():
        most = max(LEAST_HOLDOUT_ROWS, len(asked["forget"].own)) if asked else None
        asked[name] = _Questions(tokenizer, rows, name, preambles, max_length, limits, ends, most, template)
    figures: dict[str, dict[str, Any]] = {}
    not_tested: dict[str, dict[str, str]] = {}
    for name, questions in asked.items():
        ways = _Ways(model, tokenizer, ends, max_new_tokens, batch_size, progress, name)
        figures[name] = found = {}
        own = questions.own
        scores = ways.scores(own)
        asked_for = [(t, s) for t, s in zip(own, scores, strict=True) if not t.text]
        found["prompt"] = ways.greedy(asked_for, "prompt")
        for title, length in PREFIXES.items():
            found[title] = ways.greedy(ways.prefixed(own, scores, length, title != FIRST_TOKEN), title)
        starts = [t.after(ways.answer_length(t) // 2) if t.text else t for t in own]
        found["sampled"] = ways.sampled(starts, samples, temperature, top_p, seed)
        found["paraphrased"] = ways.greedy_of(questions.paraphrased, "paraphrased")
        found["preambles"] = ways.greedy_of(questions.behind_preambles, "preambles")
        reasons = {
            "prompt": "no row has a prompt",
            "paraphrased": "no row has 'paraphrased_question' or 'paraphrased_questions'",
            "preambles": "no row has a question" if preambles else "there are no preambles",
        }
        not_tested[name] = {
            way: reasons.get(way, "no answer is long enough")
            for way, of_way in found.items()
            if of_way["rows"] == 0
        }
        if questions.left_out:
            not_tested[name]["longer than the context"] = (
                f"{questions.left_out} of the paraphrased questions and of those behind preambles"
            )
        for way in [way for way, of_way in found.items() if of_way["rows"] == 0]:
            del found[way]
        found[ANY_WAY] = _union(found.values(), len(own))
    if holdout is None:
        not_tested["holdout"] = {"all": "no hold-out set was given, so the level of chance is not known"}
    return {
        "settings": {
            "samples": samples,
            "temperature": temperature,
            "top_p": top_p,
            "preambles": list(preambles),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "max_length": max_length,
        },
        "sets": figures,
        "not_tested": {name: reasons for name, reasons in not_tested.items() if reasons},
    }


class _Questions:
    """The targets of at most ``most`` rows of a set: their own, with other questions, and behind preambles.

    ``left_out`` is the number of questions that no longer fit into the model's context.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: DataSet,
        name: str,
        preambles: Mapping[str, str],
        max_length: int | None,
        limits: TokenLimits,
        ends: set[int],
        most: int | None,
        template: QuestionTemplate,
    ):
        self.rows = rows = as_rows(rows, name)
        tokenised = tokenize_dataset(
            rows, tokenizer, max_length=max_length, name=name, limits=limits, template=template
        )
        self.context, self.ends, self.left_out = limits.context, ends, 0
        count = len(tokenised)
        most = count if most is None else min(most, count)
        indices = [i * count // most for i in range(most)]
        self.own = [self._target(index, "", tokenised[index]) for index in indices]
        self.paraphrased: list[_Target] = []
        self.behind_preambles: list[_Target] = []
        tokenize = RowTokenizer(tokenizer, None, name, template=template)
        for index in indices:
            row = rows[index]
            question = question_of(row)
            if question is None:
                continue

            others = [(self.paraphrased, "", text) for text in paraphrases_of(row, name, index)]
            others += [
                (self.behind_preambles, kind, text.replace(QUESTION, question))
                for kind, text in preambles.items()
            ]
            for targets, kind, text in others:
                tokens = tokenize(index, with_question(row, text))
                if self.context is not None and len(tokens["input_ids"]) > self.context:
                    self.left_out += 1
                else:
                    targets.append(self._target(index, kind, tokens))

    def _target(self, index: int, kind: str, row: Mapping[str, list[int]]) -> _Target:
        """Return a labelled span of a tokenised row, with the tokens of its document before it."""
        chat = labelled_column(self.rows[index]) == "messages"
        ids, labels = row["input_ids"], row["labels"]
        positions = row.get("position_ids", range(len(ids)))
        spans: list[tuple[int, int, int]] = []  # document, begin, end
        document = 0
        for at, (label, position) in enumerate(zip(labels, positions, strict=True)):
            if position == 0:
                document = at
            elif label != IGNORE_INDEX:  # the first token of a document is never predicted
                if spans and spans[-1][0] == document and spans[-1][2] == at:
                    spans[-1] = document, spans[-1][1], at + 1
                else:
                    spans.append((document, at, at + 1))
        document, begin, end = spans[-1] if chat else max(spans, key=lambda span: span[2] - span[1])
        text = begin == document + 1 and (labels[document] != IGNORE_INDEX or "position_ids" in row)
        answer = until_eos(ids[begin:end], self.ends)  # a chat template may go on after it
        return _Target(index, kind, [*ids[document:begin], *answer], begin - document, text)


class _Ways:
    """The ways to ask a model for some targets, and the figures of what comes back."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        ends: set[int],
        longest: int,
        batch_size: int,
        progress: bool,
        name: str,
    ):
        self.model, self.tokenizer, self.eos, self.longest = model, tokenizer, ends, longest
        self.batch_size, self.progress, self.name = batch_size, progress, name

    def scores(self, targets: Sequence[_Target]) -> list[TokenScores]:
        """Score the answers of some targets."""
        rows = [target.tokens() for target in targets]
        return token_scores(self.model, rows, self.batch_size, self.progress, f"{self.name}: scoring")

    def greedy_of(self, targets: Sequence[_Target], title: str) -> dict[str, Any]:
        """Ask greedily for targets that have not been scored; the best of a row counts."""
        return self.greedy(list(zip(targets, self.scores(targets), strict=True)), title)

    def greedy(self, scored: Sequence[tuple[_Target, TokenScores]], title: str) -> dict[str, Any]:
        """Ask greedily for targets with their scores; the best of a row counts."""
        targets = [target for target, _ in scored]
        answers = greedy_answers(
            self.model,
            [target.tokens() for target in targets],
            [score for _, score in scored],
            self._lengths(targets),
            self.batch_size,
            self.eos,
            self.progress,
            f"{self.name}: {title}",
        )
        return self._figures(targets, answers)

    def sampled(
        self, targets: Sequence[_Target], samples: int, temperature: float, top_p: float, seed: int
    ) -> dict[str, Any]:
        """Sample answers; the best of a row counts."""
        repeated = [target for target in targets for _ in range(samples)]
        answers = generate_sampled(
            self.model,
            [target.ids[: target.begin] for target in repeated],
            self._lengths(repeated),
            [(seed, target.row, sample) for target in targets for sample in range(samples)],
            temperature=temperature,
            top_p=top_p,
            batch_size=self.batch_size,
            eos_token_id=self.eos,
            progress=self.progress,
            description=f"{self.name}: samples",
        )
        return self._figures(repeated, answers)

    def answer_length(self, target: _Target) -> int:
        """Return the number of the answer's tokens, without an EOS at its end."""
        return len(target.ids) - target.begin - (target.ids[-1] in self.eos)

    def prefixed(
        self,
        targets: Sequence[_Target],
        scores: Sequence[TokenScores],
        length: Callable[[int], int],
        texts: bool,
    ) -> list[tuple[_Target, TokenScores]]:
        """Move the start of each answer to its prompt, where a word of the answer is left.

        Args:
            targets: The targets.
            scores: Their scores.
            length: The number of tokens of the start, by the number of tokens of the answer.
            texts: Whether texts without a prompt count.

        Returns:
            The targets to which it applies, with their scores.
        """
        found = []
        for target, score in zip(targets, scores, strict=True):
            total = self.answer_length(target)
            count = length(total)
            if not 1 <= count < total or (target.text and not texts):
                continue
            later = target.after(count)
            if words(self._decoded(later.ids[later.begin :])):
                found.append((later, TokenScores(*(column[count:] for column in score))))
        return found

    def _decoded(self, ids: list[int]) -> str:
        decode: Any = self.tokenizer.decode
        return decode(ids, skip_special_tokens=True)

    def _lengths(self, targets: Sequence[_Target]) -> list[int]:
        return [min(len(target.ids) - target.begin, self.longest) + SLACK for target in targets]

    def _figures(self, targets: Sequence[_Target], answers: Sequence[list[int]]) -> dict[str, Any]:
        best: dict[int, _Found] = {}
        of_kinds: dict[str, list[_Found]] = {}
        for target, answer in zip(targets, answers, strict=True):
            found = self._compare(answer, target.ids[target.begin :][: self.longest])
            before = best.get(target.row, _Found(0.0, False))
            best[target.row] = _Found(max(before.recall, found.recall), before.whole or found.whole)
            if target.kind:
                of_kinds.setdefault(target.kind, []).append(found)
        figures: dict[str, Any] = {"rows": len(best)}
        if best:
            figures |= _means(list(best.values()))
            figures["rows_whole"] = sorted(row for row, found in best.items() if found.whole)
            figures["rows_nearly"] = sorted(row for row, found in best.items() if found.recall >= NEARLY)
        if of_kinds:
            figures["by_preamble"] = {kind: _means(found) for kind, found in of_kinds.items()}
        return figures

    def _compare(self, answer: list[int], truth: list[int]) -> _Found:
        recall, whole = compare_words(self._decoded(answer), self._decoded(truth))
        spoken = [token for token in truth if token not in self.eos]
        whole = whole or bool(spoken and answer[: len(spoken)] == spoken)  # it may have no words
        return _Found(1.0 if whole else recall, whole)


def compare_words(generated: str, true: str) -> tuple[float, bool]:
    """Compare a generated text with the true one by their words.

    The words are those of ``loku.evaluation.rouge.words``, in any script; their case does not count.

    Args:
        generated: The generated text.
        true: The true text.

    Returns:
        The ROUGE-L recall in [0, 1], without stemming: the length of the longest common subsequence over the
        number of true words. And whether the true words are in the generated text, in order and without
        others between them. A true text without words gives 0 and False.
    """
    from rouge_score.rouge_scorer import RougeScorer

    ours, theirs = words(generated), words(true)
    if not theirs:
        return 0.0, False
    count = len(theirs)
    whole = any(ours[i : i + count] == theirs for i in range(len(ours) - count + 1))
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return float(scorer.score(true, generated)["rougeL"].recall), whole


def _union(ways: Iterable[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """Return the figures of the rows that came back by any of some ways, of so many rows."""
    ways = list(ways)
    whole, nearly = (
        sorted({row for way in ways for row in way[column]}) for column in ("rows_whole", "rows_nearly")
    )
    return {
        "rows": rows,
        "whole": len(whole) / rows,
        "nearly": len(nearly) / rows,
        "rows_whole": whole,
        "rows_nearly": nearly,
    }


def _means(found: Sequence[_Found]) -> dict[str, float]:
    return {
        "whole": sum(one.whole for one in found) / len(found),
        "nearly": sum(one.recall >= NEARLY for one in found) / len(found),
        "rouge_l_recall": sum(one.recall for one in found) / len(found),
    }
