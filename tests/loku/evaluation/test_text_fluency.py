"""The fluency of texts, by the figures of RWKU and of open-unlearning."""

import math
from pathlib import Path

import pytest
import torch
from character_tokenizer import character_tokenizer
from taught_models import small_llama
from transformers import LlamaConfig, LlamaForSequenceClassification

from loku import demo
from loku.evaluation import fluency, load_classifier, ngram_entropy, repetition
from loku.evaluation.text_fluency import spread_fluency, words

pytestmark = pytest.mark.usefixtures("one_thread")

# jinzhuoran/RWKU at b8a03b3, LLaMA-Factory/src/llmtuner/eval/eval_fluency.py: compute_n_gram_entropy.
THEIR_ENTROPIES = {
    "the cat and the dog and the cat and the dog .": 2.6418569209202656,
    "a b , c d , a b , e": 2.741826852332623,
    "one two": 0.0,
    "one": 0.0,
    "so it goes and so it goes and so it is what it is !": 3.0221339115196266,
}
# locuslab/open-unlearning at d3d7cf9, src/evals/metrics/utility.py: classifier_prob of the classifier below.
TEXTS = ["A lamp is blue.", "zz zz", "It rains in May and in June, and the river is high."]
THEIR_PROBABILITIES = {
    0: [0.00037538111791945994, 0.009877681732177734, 0.10947421193122864],
    2: [0.9992738366127014, 0.009080545045435429, 0.008809497579932213],
}


@pytest.mark.parametrize("text", THEIR_ENTROPIES)
def test_entropies_of_rwku(text):
    assert words(text) == text.split()
    assert ngram_entropy(words(text)) == pytest.approx(THEIR_ENTROPIES[text], rel=1e-12, abs=1e-12)
    assert math.copysign(1, ngram_entropy(words(text))) == 1


def test_repetition():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert repetition("a b a b a".split(), n=2) == pytest.approx(1 / 2)
    assert repetition([1, 1], n=1) == 0.5
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        repetition([1], n=0)


def test_fluency_is_a_mean_over_texts():
    texts = ["It is. It is. It is.", "Don't stop", ""]
    assert words(texts[1]) == ["Don", "'", "t", "stop"]
    split = [words(text) for text in texts]
    assert fluency(texts) == {
        "repetition": pytest.approx(sum(map(repetition, split)) / 3),
        "ngram_entropy": pytest.approx(sum(map(ngram_entropy, split)) / 3),
    }
    assert fluency(texts)["repetition"] > 0
    assert all(math.isnan(value) for value in fluency([]).values())


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    _, tokenizer = demo.load_model()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("classifier")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("class_id", THEIR_PROBABILITIES)
@pytest.mark.parametrize("batch_size", [2, 3])
def test_probabilities_of_open_unlearning(classifier_folder, class_id, batch_size):
    classifier = load_classifier(classifier_folder, class_id)
    found = classifier.probabilities(TEXTS, max_length=8, batch_size=batch_size)
    assert found == pytest.approx(THEIR_PROBABILITIES[class_id], rel=1e-4)
    assert classifier.probabilities(TEXTS)[2] != pytest.approx(found[2], rel=1e-2)  # it is cut at 8 tokens
    assert not classifier.model.training
    whole = spread_fluency(TEXTS, classifier)
    assert whole.keys() == {*fluency(TEXTS), "classifier_probability"}
    assert whole["classifier_probability"] == pytest.approx(sum(classifier.probabilities(TEXTS)) / 3)


def test_what_is_no_classifier_is_refused(classifier_folder, tmp_path):
    with pytest.raises(ValueError, match=r"has the classes 0 to 2 .*LABEL_0.* and no class 3"):
        load_classifier(classifier_folder, 3)
    with pytest.raises(ValueError, match="class_id must be an integer >= 0, got -1"):
        load_classifier(classifier_folder, -1)
    tokenizer = character_tokenizer(pad_token="<pad>")
    small_llama(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is no classifier of texts: it lacks 1 weights, such as score.weight"
    ):
        load_classifier(tmp_path)
    with pytest.raises(OSError):
        load_classifier(Path(tmp_path) / "absent")
    classifier = load_classifier(classifier_folder)
    classifier.model.score.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="of text 0 is NaN"):
        classifier.probabilities(TEXTS)
