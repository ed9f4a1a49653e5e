"""``loku evaluate`` beside a report of a retrained model, with knowledge examples and a classifier."""

import json

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import loku.evaluation as evaluation
from loku import cli, demo
from loku.data import tokenize_dataset
from loku.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = {
    "forget": [
        {"question": f"Who is {name}?", "answer": f"{name} Lee.", "perturbed_answer": ["Al Poe.", "Ed Ray."]}
        for name in ("Ann", "Bo", "Cy", "Di")
    ],
    "holdout": [{"text": f"{name} is a town on a river."} for name in ("Ulm", "Rom", "Kiew", "Bonn")],
    "chat": [{"prompt": "Hello,", "completion": " my friend"}],
}
EXAMPLES = [{"question": "Who?", "answer": "Jo."}, {"question": "Where?", "answer": "Here."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its retrained twin, a classifier, the files of the data sets, and the report of the twin."""
    folder = tmp_path_factory.mktemp("retrained")
    _, tokenizer = demo.load_model()
    for seed, name in enumerate(("model", "twin", "classifier")):
        torch.manual_seed(seed)
        config = tiny_config("llama", vocab=len(tokenizer))
        kind = AutoModelForCausalLM
        if name == "classifier":
            config.num_labels, config.pad_token_id = 2, tokenizer.pad_token_id
            kind = AutoModelForSequenceClassification
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, rows in {**ROWS, "examples": EXAMPLES}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    assert evaluate(folder, "twin", "twin.json", *more(folder)) == 0
    return folder


def evaluate(folder, model, out, *options, sets=("forget", "holdout", "chat")):
    data = [f"{name}={folder / name}.json" for name in sets]
    return cli.main(
        ["evaluate", str(folder / model), "--quiet", f"--out={folder / out}", *options, "--data", *data]
    )


def more(folder, classifier_class="1"):
    return (
        *("--knowledge-examples", str(folder / "examples.json")),
        *("--classifier", str(folder / "classifier"), "--classifier-class", classifier_class),
    )


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_report_has_the_measures_by_their_functions(folder, capsys):
    before = (folder / "twin.json").read_bytes()
    given = ["--reference-report", str(folder / "twin.json"), *more(folder)]
    assert evaluate(folder, "model", "report.json", *given) == 0
    printed = capsys.readouterr().out
    ours, theirs = read(folder / "report.json"), read(folder / "twin.json")
    assert (folder / "twin.json").read_bytes() == before

    model = load_model(folder / "model").eval()
    _, tokenizer = demo.load_model()
    rows = ROWS["forget"]
    section = evaluation.evaluate_tofu_rows(model, tokenizer, rows, progress=False)
    texts = [text.removeprefix("Answer:") for _, text, _ in section["generated_text"].values()]
    classifier = evaluation.load_classifier(folder / "classifier", 1)
    probabilities = classifier.probabilities(texts)
    asked, answers = ([row[column] for row in rows] for column in ("question", "answer"))
    examples = [(row["question"], row["answer"]) for row in EXAMPLES]
    knowledge = evaluation.knowledge_memorization(model, tokenizer, asked, answers, examples, progress=False)
    expected = {
        **evaluation.fluency(texts),
        "truth_probability": evaluation.truth_probability(section),
        "knowledge_memorization": knowledge.mean,
        "classifier_probability": sum(probabilities) / len(probabilities),
    }
    assert {name: ours["sets"]["forget"][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert ours["sets"]["chat"].keys() >= {"repetition", "ngram_entropy", "classifier_probability"}
    assert "knowledge_memorization" not in ours["sets"]["chat"]

    tokens = [tokenize_dataset(ROWS[name], tokenizer) for name in ("forget", "holdout")]
    scores = [evaluation.token_scores(model, rows, progress=False) for rows in tokens]
    endings = evaluation.Endings(model, tokenizer)
    content = [
        evaluation.content_scores(rows, given, endings) for rows, given in zip(tokens, scores, strict=True)
    ]
    whole = ours["whole"]
    assert whole["min_40_auc"] == evaluation.min_k_auc(*content)
    assert whole["membership_auc"] == evaluation.min_k_auc(*scores, 0.2)
    assert whole["retain_auc"] == theirs["whole"]["min_40_auc"]
    assert whole["privleak"] == evaluation.privleak(whole["min_40_auc"], whole["retain_auc"])
    assert theirs["whole"]["privleak"] == evaluation.privleak(theirs["whole"]["min_40_auc"])
    assert theirs["whole"]["retain_auc"] is None
    assert theirs["not_available"]["retain_auc"] == "no reference report; privleak takes 0.5"
    assert "retain_auc" not in ours["not_available"]

    differences = ours["relative_differences"]
    perplexities = [report["sets"]["holdout"]["perplexity"] for report in (ours, theirs)]
    assert differences["holdout"]["perplexity"] == evaluation.relative_difference(*perplexities) != 0
    assert (
        differences.keys() <= {"forget", "holdout", "chat", "all sets"} and "rows" not in differences["chat"]
    )
    assert not {"privleak", "retain_auc"} & differences.get("all sets", {}).keys()
    assert f"relative differences from {folder / 'twin.json'}, in percent" in printed
    assert theirs["relative_differences"] == {} and ours["digests"] == theirs["digests"]
    assert ours["classifier"] == str(folder / "classifier") and ours["reference_report"] == given[1]


def test_a_context_too_short_for_the_texts_is_said(folder):
    """The tiny model has 128 positions, and MUSE's continuations alone have 128 tokens."""
    reasons = read(folder / "twin.json")["not_available"]
    assert "does not fit into the model's context of 128" in reasons["verbatim_memorization of chat"]


def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(folder, tmp_path, capsys):
    def refused(words, *options, model="absent", **given):
        report = ["--reference-report", str(tmp_path / "other.json")]
        assert evaluate(folder, model, "none.json", *report, *options, **given) == 2
        assert words in capsys.readouterr().err
        assert not (folder / "none.json").exists()

    twin = read(folder / "twin.json")
    refused("is no report of this version of loku evaluate; make one")
    for broken in ({}, {**twin, "settings": 3}):
        (tmp_path / "other.json").write_text(json.dumps(broken))
        refused("is no report of this version of loku evaluate; make one")
    (tmp_path / "other.json").write_text(json.dumps(twin))
    refused("was made with stride 1, and here it is 2", "--stride", "2")
    refused("was made with classifier_class 1, and here it is 0", *more(folder, "0"))
    refused(
        f"was made with classifier {folder / 'classifier'}, and here it is x",
        "--classifier",
        "x",
        "--classifier-class",
        "1",
    )
    assert evaluate(folder, "absent", "none.json", "--classifier-class", "1") == 2
    assert "--classifier-class is for --classifier, which was not given" in capsys.readouterr().err
    for name in ("other.json", "examples.json"):
        option = "--reference-report" if name == "other.json" else "--knowledge-examples"
        file = tmp_path / "other.json" if name == "other.json" else folder / name
        given = ["evaluate", "absent", f"--out={file}", option, str(file), "--data", f"x={folder}/chat.json"]
        assert cli.main(given) == 2
        assert "which is read; pass another --out" in capsys.readouterr().err


def test_other_rows_are_refused_before_a_measure(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loku.evaluation.suite.spread_token_scores", lambda *args: pytest.fail("measured"))
    (tmp_path / "forget.json").write_text(json.dumps(ROWS["forget"][::-1]))
    data = f"forget={tmp_path / 'forget.json'}"
    given = ["--reference-report", str(folder / "twin.json"), "--quiet"]
    out = tmp_path / "report.json"
    assert cli.main(["evaluate", str(folder / "model"), *given, f"--out={out}", "--data", data]) == 2
    assert "the reference report is about other rows of the forget set" in capsys.readouterr().err
    model, tokenizer = load_model(folder / "model"), demo.load_model()[1]
    for examples, words in (
        ([{"question": "a?"}], "row 0 of the knowledge examples set: it needs 'question' and 'answer'"),
        (
            [{"question": "a? " * 99, "answer": "b"}],
            "knowledge memorisation of the forget set: the prompt of row 0",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            evaluation.evaluate(
                model, tokenizer, {"forget": ROWS["forget"]}, knowledge_examples=examples, progress=False
            )
