"""The fluency of generated texts: repetition, the entropy of n-grams, and a classifier of texts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from loku.counts import check_counts
from loku.distributed import spread
from loku.evaluation.scores import mean_over_rows
from loku.models import evaluating, model_device
from loku.trust import load_tokenizer, loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPEATED = 4  # n of the n-grams of ``repetition``
ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of bigrams and trigrams, as RWKU's
_WORD = re.compile(r"\w+|[^\w\s]")


def repetition(tokens: Sequence[Hashable], n: int = REPEATED) -> float:
    """Compute the share of a text's n-grams that occurred before in it (seq-rep-n, Welleck et al., 2020).

        1 - number of different n-grams / number of n-grams

    Args:
        tokens: The ids or words of the text.
        n: The length of the n-grams, >= 1; 4 by default.

    Returns:
        The share, in [0, 1); 0.0 for a text of fewer than n tokens. Less is better.

    Raises:
        ValueError: ``n`` is less than 1.
    """
    check_counts(n=n)
    grams = _ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ngram_entropy(tokens: Sequence[Hashable]) -> float:
    """Compute the weighted mean of the entropies of a text's bigrams and trigrams, in bits.

        (2/3 H_2 + 4/3 H_3) / 2,   H_n = - sum over the different n-grams of f log2 f

    f is the share of an n-gram among all n-grams of the text. It is the fluency of RWKU (Jin et al., NeurIPS
    2024), after Meng et al. (NeurIPS 2022). RWKU takes the words of ``nltk.word_tokenize``.

    Args:
        tokens: The words or ids of the text.

    Returns:
        The entropy, >= 0, in bits; 0.0 for a text of fewer than three tokens. More is better: a text that
        repeats itself has little. Longer texts can have more.
    """
    entropies = []
    for n, weight in ENTROPY_WEIGHTS.items():
        counts = torch.tensor([*Counter(_ngrams(tokens, n)).values()], dtype=torch.float64)
        shares = counts / counts.sum()
        entropies.append(-weight * (shares * shares.log2()).sum().item())
    return sum(entropies) / len(entropies)


def words(text: str) -> list[str]:
    r"""Return the words and the marks of a text: the matches of ``\w+`` and of ``[^\w\s]``, in order."""
    return _WORD.findall(text)


def fluency(texts: Iterable[str]) -> dict[str, float]:
    """Compute ``repetition`` and ``ngram_entropy`` of the words of some texts, each a mean over the texts.

    Args:
        texts: The generated texts.

    Returns:
        ``repetition``, in [0, 1), and ``ngram_entropy``, in bits; both are NaN without texts. An empty text
        has 0 of both, so read them together.
    """
    split = [words(text) for text in texts]
    return {
        "repetition": mean_over_rows(map(repetition, split)),
        "ngram_entropy": mean_over_rows(map(ngram_entropy, split)),
    }


def spread_fluency(texts: list[str], classifier: TextClassifier | None = None) -> dict[str, float]:
    """Compute ``fluency``, and the mean probability of a classifier, with the texts shared out.

    All processes must call this, with all texts.

    Args:
        texts: The generated texts.
        classifier: The classifier, whose mean probability is ``classifier_probability``; None by default.
    """
    measures = fluency(texts)
    if classifier is not None:
        probabilities: list[float] = spread(classifier.probabilities, texts)
        measures["classifier_probability"] = mean_over_rows(probabilities)
    return measures


class TextClassifier(NamedTuple):
    """A classifier of texts.

    Attributes:
        model: A transformers model for sequence classification.
        tokenizer: Its tokenizer.
        class_id: The class whose probability counts, from 0.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    class_id: int = 0

    def probabilities(
        self, texts: Sequence[str], *, max_length: int = 512, batch_size: int = 32
    ) -> list[float]:
        """Compute the probability of the class for each text, as open-unlearning's ``classifier_prob``.

        Args:
            texts: The texts.
            max_length: The number of tokens at which texts are cut, >= 1; 512 by default.
            batch_size: The number of texts in a batch, 32 by default.

        Returns:
            The probabilities, in [0, 1].

        Raises:
            ValueError: ``max_length`` or ``batch_size`` is less than 1.
            FloatingPointError: A probability is NaN.
        """
        check_counts(max_length=max_length, batch_size=batch_size)
        device = model_device(self.model)
        found: list[float] = []
        with evaluating(self.model):
            for begin in range(0, len(texts), batch_size):
                chosen = list(texts[begin : begin + batch_size])
                encoded: Any = self.tokenizer(
                    chosen, return_tensors="pt", padding=True, truncation=True, max_length=max_length
                )
                logits = self.model(**encoded.to(device)).logits
                found += logits.double().softmax(-1)[:, self.class_id].tolist()
        for index, probability in enumerate(found):
            if probability != probability:
                raise FloatingPointError(f"the classifier's probability of text {index} is NaN")
        return found


def load_classifier(place: str | os.PathLike, class_id: int = 0) -> TextClassifier:
    """Load a classifier of texts from safetensors; no code of its repository runs.

    Args:
        place: The folder or hub name of a transformers model for sequence classification.
        class_id: The class whose probability counts, from 0; 0 by default. Take one that means a good text:
            class 0 of the classifier of open-unlearning, a detector of gibberish, is "clean".

    Raises:
        ValueError: The files are damaged, or need code of their own; the model lacks weights, such as the
            head of the classifier; or it has no class ``class_id``.
        OSError: There is no such model.
    """
    from transformers import AutoModelForSequenceClassification

    check_counts(0, class_id=class_id)
    with loading(place):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    if report["missing_keys"]:  # transformers draws them at random
        raise ValueError(
            f"{place} is no classifier of texts: it lacks {len(report['missing_keys'])} weights, such as "
            f"{sorted(report['missing_keys'])[0]}"
        )
    if class_id >= model.config.num_labels:
        raise ValueError(
            f"{place} has the classes 0 to {model.config.num_labels - 1} ({model.config.id2label}), and no "
            f"class {class_id}"
        )
    return TextClassifier(model.eval(), load_tokenizer(place), class_id)


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
