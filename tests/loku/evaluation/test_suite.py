"""All measures in one call of ``loku evaluate``, by one process and by two."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import loku.evaluation as evaluation
from loku import cli, demo
from loku.commands.evaluate import EL_DEFINITIONS
from loku.data import RowError, tokenize_dataset
from loku.data.files import read_rows
from loku.data.tokens import TextTokenizer
from loku.evaluation.open_unlearning import open_unlearning_log
from loku.evaluation.tofu import SECTIONS

pytestmark = pytest.mark.usefixtures("one_thread")
PERTURBED = ["Never.", "Not at all."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model in float64, so that batching changes nothing, and files of each kind of rows."""
    folder = tmp_path_factory.mktemp("suite")
    _, tokenizer = demo.load_model()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).double().eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    # Texts that the model partly knows: its continuations, one of them with another second half.
    known = evaluation.generate_greedy(model, [[40, 50], [60, 70], [80, 90]], [24] * 3, progress=False)
    texts = [prompt + rest for prompt, rest in zip([[40, 50], [60, 70], [80, 90]], known, strict=True)]
    texts[1] = [*texts[1][:14], *range(200, 212)]
    held_out = [{"input_ids": ids, "labels": [-100] * 2 + ids[2:]} for ids in texts]
    questions, _ = demo.load_rows()
    plain = [{key: row[key] for key in ("question", "answer")} for row in questions[4:9]]
    replies = tokenizer.batch_decode(
        evaluation.generate_greedy(
            model, tokenizer(["Hello there,", "Good day"])["input_ids"], [30, 30], progress=False
        )
    )
    files = {
        "forget": questions[:3],
        "retain": plain,
        "world_facts": [{**plain[0], "perturbed_answer": PERTURBED}],
        "holdout": held_out,
        "chat": [
            {"prompt": "Hello there,", "completion": f"{replies[0]} my friend"},
            {"prompt": "Good day", "completion": "to you"},
        ],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "text.txt").write_text("One line of text.\n\nAnother one.\n", encoding="utf-8")
    return folder


def arguments(folder, out):
    names = ("forget", "retain", "world_facts", "holdout", "chat")
    return [
        *("evaluate", str(folder / "model"), "--ngram", "3", "--stride", "2", "--out", str(out)),
        *("--reference-log", str(folder / "reference.json")),
        *("--data", *(f"{name}={folder}/{name}.jsonl" for name in names), f"text={folder}/text.txt"),
    ]


@pytest.fixture(scope="module")
def parts(folder):
    """The model, the tokenizer and the rows by set, for the measures one by one."""
    _, tokenizer = demo.load_model()
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    files = [*folder.glob("*.jsonl"), folder / "text.txt"]
    return model, tokenizer, {file.stem: read_rows(file) for file in files}


@pytest.fixture(scope="module")
def reference(folder, parts):
    """The log of another model, as if it had never seen the forget set."""
    model, tokenizer, rows = parts
    torch.manual_seed(3)
    other = LlamaForCausalLM(model.config).double().eval()
    log = {
        SECTIONS["forget"]: evaluation.evaluate_tofu_rows(other, tokenizer, rows["forget"], progress=False)
    }
    evaluation.write_report(folder / "reference.json", log)
    return log


@pytest.fixture(scope="module")
def report(folder, reference):
    cli.main([*arguments(folder, folder / "one.json"), "--quiet"])
    return json.loads((folder / "one.json").read_text()), json.loads((folder / "one_log.json").read_text())


def test_report_has_each_measure_as_it_is_alone(report, reference, parts):
    report, log = report
    model, tokenizer, rows = parts
    sets = report["sets"]
    for name, count in [("forget", 3), ("retain", 5), ("holdout", 3), ("chat", 2), ("text", 2)]:
        assert sets[name]["rows"] == count
        tokens = tokenize_dataset(rows[name], tokenizer)
        scores = evaluation.token_scores(model, tokens, progress=False)
        measured = evaluation.token_measures(scores)
        if name in ("forget", "holdout"):
            likelihood = evaluation.extraction_likelihood(model, tokens, 3, 2, progress=False)
            measured["extraction_likelihood_3"] = likelihood.mean
        assert {key: sets[name][key] for key in measured} == pytest.approx(measured)
    every = evaluation.extraction_likelihood(
        model, tokenize_dataset(rows["holdout"], tokenizer), 3, 1, progress=False
    )
    assert 0.1 < sets["holdout"]["extraction_likelihood_3"] < 1  # the test can fail, and the stride counts
    assert sets["holdout"]["extraction_likelihood_3"] != pytest.approx(every.mean)
    assert "extraction_likelihood_3" not in sets["text"]

    assert log.keys() == {SECTIONS[name] for name in ("forget", "retain", "world_facts")}
    for name in ("forget", "retain", "world_facts"):
        section = evaluation.evaluate_tofu_rows(model, tokenizer, rows[name], progress=False)
        assert log[SECTIONS[name]]["generated_text"] == section["generated_text"]
        assert log[SECTIONS[name]]["avg_gt_loss"] == pytest.approx(section["avg_gt_loss"])
        measured = evaluation.section_metrics(section, name == "world_facts", name == "forget")
        assert {key: sets[name][key] for key in measured} == pytest.approx(measured)
    assert "truth_ratio" in sets["forget"] and "truth_ratio" not in sets["retain"]
    tokens = tokenize_dataset(rows["chat"], tokenizer)
    scores = evaluation.token_scores(model, tokens, progress=False)
    room = max(len(score.losses) for score in scores) + 16
    generated = evaluation.generated_texts(model, tokenizer, tokens, scores, room, progress=False)
    true = [row["completion"] for row in rows["chat"]]
    assert sets["chat"]["dialogue_f1"] == pytest.approx(sum(evaluation.dialogue_f1(generated, true)) / 2)
    assert sets["chat"]["rouge"] == pytest.approx(sum(evaluation.rouge_recalls(generated, true)[1]) / 2)
    deleted = evaluation.dialogue_f1(generated, true, "knowledge-unlearning")
    assert sets["chat"]["dialogue_f1_knowledge_unlearning"] == pytest.approx(sum(deleted) / 2)
    assert 0.1 < sets["chat"]["dialogue_f1"] < 1 and 0.1 < sets["chat"]["rouge"] < 1  # so the test can fail

    expected = evaluation.forget_quality(log, reference)
    assert report["whole"]["forget_quality"] == pytest.approx(expected)
    assert report["whole"]["model_utility"] is None
    assert report["not_available"] == {
        "model_utility": "perturbed answers are missing in retain, real_authors",
        "retain_auc": "no reference report; privleak takes 0.5",
    }
    tokens = {name: tokenize_dataset(rows[name], tokenizer) for name in ("forget", "holdout")}
    min_k = {
        n: evaluation.min_k(evaluation.token_scores(model, t, progress=False)) for n, t in tokens.items()
    }
    assert report["whole"]["membership_auc"] == evaluation.membership_auc(*min_k.values())


def test_generated_answers_end_before_a_stop_string(parts):
    model, tokenizer, rows = parts
    sets = {"forget": rows["forget"], "chat": rows["chat"]}
    whole = evaluation.evaluate(model, tokenizer, sets, progress=False)
    texts = {i: text[1] for i, text in whole.log[SECTIONS["forget"]]["generated_text"].items()}
    stop = texts["0"][30:33]
    options = {"stop_strings": [stop, "never in any text"], "progress": False}
    found = evaluation.evaluate(model, tokenizer, sets, **options)
    section = found.log[SECTIONS["forget"]]
    for i, text in texts.items():
        answer = text.removeprefix("Answer:")
        assert section["generated_text"][i][1] == "Answer:" + answer.split(stop)[0]
    assert len(section["generated_text"]["0"][1]) < len(texts["0"])
    section = evaluation.evaluate_tofu_rows(
        model, tokenizer, rows["forget"], stop_strings=[stop], progress=False
    )
    assert section["generated_text"] == found.log[SECTIONS["forget"]]["generated_text"]

    # Completions too: the first text of several ends it, wherever it stands in the list.
    generated = "one two three four"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loku.evaluation.extraction.greedy_answers", lambda *args: [[1], [1]])
        patch.setattr(tokenizer, "decode", lambda ids, **kwargs: generated)
        cut = evaluation.generated_texts(model, tokenizer, [], [], 5, stop_strings=["three", "two"])
        assert cut == ["one ", "one "]
    for wrong in ("stop", [""], [3], None):
        with pytest.raises(ValueError, match="stop_strings must be a list of texts that are not empty"):
            evaluation.evaluate(model, tokenizer, sets, stop_strings=wrong)


def test_generated_answers_have_at_most_so_many_tokens(parts):
    model, tokenizer, rows = parts
    sets = {"retain": rows["retain"], "chat": rows["chat"]}
    found = evaluation.evaluate(model, tokenizer, sets, max_new_tokens=3, progress=False)
    section = evaluation.evaluate_tofu_rows(
        model, tokenizer, rows["retain"], max_new_tokens=3, progress=False
    )
    assert found.log[SECTIONS["retain"]]["generated_text"] == section["generated_text"]
    longest = evaluation.evaluate(model, tokenizer, sets, progress=False)
    assert found.log != longest.log and found.sets["chat"]["rouge"] < longest.sets["chat"]["rouge"]
    with pytest.raises(ValueError, match="max_new_tokens must be an integer >= 1, got 0"):
        evaluation.evaluate(model, tokenizer, sets, max_new_tokens=0)


def test_the_options_of_measures_reach_them(folder, parts, tmp_path):
    model, tokenizer, rows = parts
    options = ["--no-count-end", "--el-definition", "knowledge-unlearning", "--max-new-tokens", "4"]
    places = [str(folder / "model"), "--data", f"holdout={folder}/holdout.jsonl", f"chat={folder}/chat.jsonl"]
    out = tmp_path / "report.json"
    stops = ["--stop-strings", "th", "e"]
    assert (
        cli.main(["evaluate", *places, *options, *stops, "--ngram", "3", "--out", str(out), "--quiet"]) == 0
    )
    report = json.loads(out.read_text())
    expected = evaluation.evaluate(
        model,
        tokenizer,
        {name: rows[name] for name in ("holdout", "chat")},
        n=3,
        count_end=False,
        el_definition="knowledge-unlearning",
        max_new_tokens=4,
        stop_strings=["th", "e"],
        progress=False,
    )
    for name, measures in expected.sets.items():
        assert report["sets"][name] == pytest.approx(measures)
    plain = evaluation.evaluate(model, tokenizer, {"holdout": rows["holdout"]}, n=3, progress=False)
    likelihood = "extraction_likelihood_3"
    assert report["sets"]["holdout"][likelihood] != pytest.approx(plain.sets["holdout"][likelihood])
    assert report["settings"]["stop_strings"] == ["th", "e"] and report["settings"]["count_end"] is False
    tokens = tokenize_dataset(rows["chat"], tokenizer)
    scores = evaluation.token_scores(model, tokens, progress=False)
    content = evaluation.content_scores(tokens, scores, evaluation.Endings(model, tokenizer))
    assert [len(part.losses) for part in content] == [len(score.losses) - 1 for score in scores]  # the EOS
    measured = evaluation.token_measures(scores, content=content)
    assert measured["min_k"] != pytest.approx(evaluation.token_measures(scores)["min_k"])
    assert {key: report["sets"]["chat"][key] for key in measured} == pytest.approx(measured)
    assert EL_DEFINITIONS == evaluation.extraction.EL_DEFINITIONS
    for wrong in (["--max-new-tokens", "0"], ["--stop-strings", ""], ["--el-definition", "el"]):
        try:
            assert cli.main(["evaluate", *places, *wrong, "--out", str(out)]) == 2
        except SystemExit as end:  # argparse knows the choices
            assert end.code == 2


def test_the_log_of_open_unlearning_is_read_and_written(folder, parts, reference, tmp_path):
    model, tokenizer, rows = parts
    theirs, out = tmp_path / "TOFU_EVAL.json", tmp_path / "report.json"
    theirs.write_text(json.dumps(open_unlearning_log(reference)))
    command = ["evaluate", str(folder / "model"), "--data", f"forget={folder}/forget.jsonl", "--quiet"]
    command += ["--reference-log", str(theirs), "--log-format", "open-unlearning", "--out", str(out)]
    command += ["--stride", "50", "--no-count-end"]
    assert cli.main(command) == 0 == cli.main(command)  # an earlier report is overwritten
    report, log, summary = (
        json.loads((tmp_path / f"report{name}.json").read_text()) for name in ("", "_log", "_summary")
    )
    found = evaluation.evaluate(
        model,
        tokenizer,
        {"forget": rows["forget"]},
        reference_log=json.loads(theirs.read_text()),
        stride=50,
        count_end=False,
        progress=False,
    )
    expected = open_unlearning_log(found.log, reference, found.rows["forget"])
    assert log.keys() == expected.keys() and report["sha256"].keys() == {"log", "picture", "summary"}
    assert summary == pytest.approx({name: value["agg_value"] for name, value in expected.items()})
    quality = found.whole["forget_quality"]
    assert summary["forget_quality"] == report["whole"]["forget_quality"] == pytest.approx(quality)
    assert report["sets"]["forget"]["memorization_accuracy"] == pytest.approx(summary["exact_memorization"])
    tokens = tokenize_dataset(rows["forget"], tokenizer)
    assert found.rows["forget"]["tokens"] == [
        sum(label != -100 for label in row["labels"]) - 1 for row in tokens
    ]
    assert log["extraction_strength"]["value_by_index"]["1"]["score"] == pytest.approx(
        max(found.rows["forget"]["extraction_strength"][1], 1 / found.rows["forget"]["tokens"][1])
    )


def test_two_processes_give_the_report_of_one(report, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(evaluation.__file__).parents[2]),  # the tested package
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run(
        [*command, "-m", "loku", *arguments(folder, folder / "two.json")],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("forget_quality") == 1  # by the main process alone
    assert "forget: scoring" in run.stderr and "100%" in run.stderr  # a progress bar
    for expected, name in zip(report, ("two.json", "two_log.json"), strict=True):
        expected, found = flat(expected), flat(json.loads((folder / name).read_text()))
        assert found.keys() == expected.keys()
        for digests in (found, expected):  # of the log and the picture, with all digits of the numbers
            digests.pop("/sha256/log", None), digests.pop("/sha256/picture", None)
        numbers = {key for key, value in expected.items() if isinstance(value, float)}
        assert {k: v for k, v in found.items() if k not in numbers} == {
            k: v for k, v in expected.items() if k not in numbers
        }
        assert {k: found[k] for k in numbers} == pytest.approx({k: expected[k] for k in numbers}, rel=1e-9)


def flat(value, path=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return flat(dict(enumerate(value)), path)
    return {path: value}


def test_table_and_figure(report, folder, adapter, capsys, tmp_path):
    assert (folder / "one.png").read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "text.json"
    cli.main(
        [
            *("evaluate", str(folder / "model"), "--adapter", str(adapter), "--out", str(out), "--quiet"),
            *("--data", f"text={folder}/text.txt"),
        ]
    )
    printed = capsys.readouterr().out
    assert "not available: no reference log" in printed and "perplexity" in printed
    assert "not available: no forget and no holdout set" in printed
    missing = [name for name, value in json.loads(out.read_text())["whole"].items() if value is None]
    assert sorted(json.loads(out.read_text())["not_available"]) == sorted(missing)
    assert not (tmp_path / "text_log.json").exists()  # there are no questions
    adapted = json.loads(out.read_text())["sets"]["text"]
    assert adapted["perplexity"] != pytest.approx(report[0]["sets"]["text"]["perplexity"])


def test_errors_come_before_the_work(parts, capsys, monkeypatch):
    model, tokenizer, rows = parts
    with pytest.raises(ValueError, match="no forget section"):
        evaluation.evaluate(model, tokenizer, rows, reference_log={})
    log = {SECTIONS["forget"]: {"average_perturb_loss": {"0": [1.0]}, "avg_paraphrased_loss": {"0": 1.0}}}
    with pytest.raises(ValueError, match="forget set of questions and answers, with 'perturbed_answer'"):
        evaluation.evaluate(model, tokenizer, {"forget": rows["retain"]}, reference_log=log)
    with pytest.raises(ValueError, match="forget set of questions and answers"):
        mixed = [*rows["forget"], *rows["chat"]]
        evaluation.evaluate(model, tokenizer, {"forget": mixed}, reference_log=log)
    monkeypatch.setattr(LlamaForCausalLM, "forward", None)  # the model must not run
    sets = {"text": ["A text."], "long": [{"input_ids": [5] * 600}]}
    with pytest.raises(
        RowError, match="row 0 of the long set: it has 600 tokens, and the model's context has"
    ):
        evaluation.evaluate(model, tokenizer, sets)
    sets = {"text": ["A text."], "long": [{"question": "A?", "answer": "b " * 600}]}
    with pytest.raises(RowError, match=r"long set: a question with its answer has .* context is 512.*drop"):
        evaluation.evaluate(model, tokenizer, sets)
    sets = {"retain": [{"question": "A?", "answer": "b", "perturbed_answer": ["c", "d " * 600]}]}
    with pytest.raises(RowError, match="row 0 of the retain set: a question with its answer has"):
        evaluation.evaluate(model, tokenizer, sets)
    for wrong, problem in [("Never.", "is a str"), (["a", None], "is a NoneType"), (["a", ""], "is empty")]:
        sets = {"text": ["A text."], "retain": [{**rows["retain"][0], "perturbed_answer": wrong}]}
        with pytest.raises(RowError, match=f"row 0 of the retain set: 'perturbed_answer.*{problem}"):
            evaluation.evaluate(model, tokenizer, sets)
    with pytest.raises(ValueError, match="odd set is empty"):
        evaluation.evaluate(model, tokenizer, {"odd": []})
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        evaluation.evaluate(model, tokenizer, rows, batch_size=0)
    assert cli.main(["evaluate", "model", "--data", "x=forget.jsonl", "--out", "report.png"]) == 2
    assert "--out report.png must be the file of a JSON report" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "model", "--data", "forget.jsonl"])
    assert "'forget.jsonl' is not NAME=SOURCE" in capsys.readouterr().err


def test_model_utility_is_available_where_every_row_has_wrong_answers(parts):
    model, tokenizer, rows = parts
    data = {"retain": rows["forget"], "real_authors": rows["forget"], "world_facts": rows["world_facts"]}
    whole = evaluation.evaluate(model, tokenizer, data, progress=False)
    assert whole.whole["model_utility"] == evaluation.model_utility(whole.log) is not None
    assert "model_utility" not in whole.not_available
    data["real_authors"] = [*rows["forget"], rows["retain"][0]]
    part = evaluation.evaluate(model, tokenizer, data, progress=False)
    assert part.whole["model_utility"] is None
    assert part.not_available["model_utility"] == "perturbed answers are missing in real_authors"
    assert (
        "truth_ratio" not in part.sets["real_authors"]
        and part.sets["world_facts"] == whole.sets["world_facts"]
    )


def test_wrong_answers_may_be_arrays_or_missing(parts, reference):
    model, tokenizer, rows = parts
    data = {"real_authors": rows["forget"], "forget": rows["forget"]}
    expected = evaluation.evaluate(model, tokenizer, data, reference_log=reference, progress=False)
    arrays = {
        name: [{**row, "perturbed_answer": np.array(row["perturbed_answer"], dtype=object)} for row in rows]
        for name, rows in data.items()
    }
    found = evaluation.evaluate(model, tokenizer, arrays, reference_log=reference, progress=False)
    assert found.sets == expected.sets and found.whole == expected.whole
    sets = {"real_authors": [{**row, "perturbed_answer": float("nan")} for row in rows["forget"]]}
    measures = evaluation.evaluate(model, tokenizer, sets, progress=False).sets["real_authors"]
    assert "truth_ratio" not in measures
    with pytest.raises(ValueError, match="forget set of questions and answers, with 'perturbed_answer'"):
        missing = {"forget": sets["real_authors"]}
        evaluation.evaluate(model, tokenizer, missing, reference_log=reference, progress=False)


def test_a_cut_completion_is_compared_with_what_is_left_of_it(parts):
    model, tokenizer, _ = parts
    row = {"prompt": "Once", "completion": " upon a time there was a river in the country. " * 20}
    (ids,) = tokenize_dataset([row], tokenizer, max_length=12)
    left = tokenizer.decode([label for label in ids["labels"] if label != -100])
    generated = f"{left} and then"
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="were cut"):
        patch.setattr("loku.evaluation.suite.generated_texts", lambda *args, **kwargs: [generated])
        sets = evaluation.evaluate(model, tokenizer, {"x": [row]}, max_length=12, progress=False).sets
    assert sets["x"]["rouge"] == 1


def test_documents_of_packed_rows_are_rows_of_their_own(parts):
    model, tokenizer, _ = parts
    packed = {"input_ids": [30, 40, 50, 60, 70, 80], "position_ids": [0, 1, 2, 0, 1, 2]}
    packed["labels"] = packed["input_ids"]
    single = [{"input_ids": ids} for ids in ([30, 40, 50], [60, 70, 80])]
    sets = evaluation.evaluate(model, tokenizer, {"holdout": [packed]}, n=1, progress=False).sets
    expected = evaluation.evaluate(model, tokenizer, {"holdout": single}, n=1, progress=False).sets
    assert sets["holdout"] == {**expected["holdout"], "rows": 1}


def test_max_length_cuts_texts_and_refuses_longer_questions(parts):
    model, tokenizer, rows = parts
    whole = evaluation.evaluate(model, tokenizer, {"text": rows["text"]}, progress=False).sets
    with pytest.warns(UserWarning, match="rows of the text set were cut"):
        cut = evaluation.evaluate(model, tokenizer, {"text": rows["text"]}, max_length=3, progress=False).sets
    assert cut["text"] != whole["text"]
    longest = max(len(row["input_ids"]) for row in tokenize_dataset(rows["retain"], tokenizer))
    few = {"retain": rows["retain"][:2]}
    assert evaluation.evaluate(model, tokenizer, few, max_length=longest, progress=False).sets
    with pytest.raises(
        RowError, match=f"retain set: a question .* and max_length is {longest - 1}[.] Answers"
    ):
        sets = {"retain": rows["retain"]}
        evaluation.evaluate(model, tokenizer, sets, max_length=longest - 1, progress=False)


def test_a_set_may_be_a_path(parts, folder, tmp_path):
    model, tokenizer, rows = parts
    expected = evaluation.evaluate(model, tokenizer, {"text": rows["text"]}, progress=False).sets
    for place in (folder / "text.txt", str(folder / "text.txt")):
        assert evaluation.evaluate(model, tokenizer, {"text": place}, progress=False).sets == expected
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\nA?,42\nB?,\n")
    with pytest.raises(RowError, match=r"rows.csv, line 3: row 1 of the odd set"):
        evaluation.evaluate(model, tokenizer, {"odd": file})


@pytest.fixture(scope="module")
def broken(parts):
    """The model with a NaN in one word's vector, which not every row has, and with a NaN everywhere.

    Its weights are finite, as if the dtype overflowed.
    """
    model, _, _ = parts

    def make(word):
        other = LlamaForCausalLM(model.config).double().eval()

        def overflow(module, args, output):
            where = torch.full_like(args[0], True) if word is None else args[0] == word
            return output.masked_fill(where.bool()[..., None], torch.nan)

        other.model.embed_tokens.register_forward_hook(overflow)
        return other

    return make


def test_a_nan_model_is_no_model_that_has_forgotten(parts, broken):
    model, tokenizer, rows = parts
    sets = {"retain": rows["retain"][:2]}
    other = LlamaForCausalLM(model.config).eval()
    other.model.norm.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"1 of the 16 values of model\.norm\.weight are NaN or Inf"):
        evaluation.evaluate(other, tokenizer, {"retain": [3]})  # before the rows are looked at
    with pytest.raises(
        FloatingPointError, match=r"retain: scoring: row 0: the model's loss is NaN at token \d+, so"
    ):
        evaluation.evaluate(broken(None), tokenizer, sets, progress=False)
    word = tokenizer(" zebra")["input_ids"][0]
    sets["retain"][1] = {**rows["retain"][1], "perturbed_answer": ["zebra zebra"]}
    assert all(
        word not in row["input_ids"] for row in tokenize_dataset(rows["retain"][:2], tokenizer)
    )  # so that the true answers have no NaN
    with pytest.raises(FloatingPointError, match="retain: row 1, a perturb answer: the model's loss is NaN"):
        evaluation.evaluate(broken(word), tokenizer, sets, progress=False)
    tokens = tokenize_dataset(["A text.", " zebra zebra"], tokenizer)
    for measure in (
        evaluation.token_scores,
        evaluation.memorization_accuracy,
        evaluation.extraction_likelihood,
    ):
        with pytest.raises(FloatingPointError, match="row 1: the model's loss is NaN"):
            measure(broken(word), tokens, progress=False)


def test_answers_are_tokenised_once(parts, monkeypatch):
    model, tokenizer, rows = parts
    texts = Counter()
    whole = TextTokenizer.__call__
    monkeypatch.setattr(
        TextTokenizer,
        "__call__",
        lambda self, text, *most: texts.update([text.text]) or whole(self, text, *most),
    )
    evaluation.evaluate(model, tokenizer, {"retain": rows["retain"][:2]}, progress=False)
    assert list(texts.values()) == [1, 1]


def test_a_reference_log_of_other_questions_is_refused(parts, reference):
    model, tokenizer, rows = parts
    section = reference[SECTIONS["forget"]]

    def measure(section, forget=rows["forget"]):
        log = {SECTIONS["forget"]: section}
        sets = {"forget": forget}
        return evaluation.evaluate(model, tokenizer, sets, reference_log=log, stride=50, progress=False)

    expected = measure(section).whole["forget_quality"]
    order = ("2", "0", "1")  # the test takes no notice of the order
    other = {
        name: {str(new): values[old] for new, old in enumerate(order)} for name, values in section.items()
    }
    assert measure(other).whole["forget_quality"] == expected
    texts = {
        i: [f"[INST] {q.removeprefix('Question: ').strip()} [/INST]", "", a]
        for i, (q, _, a) in section["generated_text"].items()
    }  # another evaluator's template
    assert measure({**section, "generated_text": texts}).whole["forget_quality"] == expected

    for part, change in ((0, "Question: Who?\n"), (2, "Nobody.")):
        texts = {i: [*given] for i, given in section["generated_text"].items()}
        texts["1"][part] = change
        with pytest.raises(ValueError, match="reference log is about other questions: it lacks 1 of the 3"):
            measure({**section, "generated_text": texts})
    fewer = {name: {i: v for i, v in values.items() if i != "2"} for name, values in section.items()}
    with pytest.raises(ValueError, match=r"reference log has 2 forget questions .* forget set has 3"):
        measure(fewer)
    with pytest.raises(ValueError, match="retain log has 2 forget questions"):
        evaluation.forget_quality({SECTIONS["forget"]: section}, {SECTIONS["forget"]: fewer})
    with pytest.raises(ValueError, match=r"the losses of rows .'1'. are no numbers"):
        measure({**section, "avg_paraphrased_loss": {**section["avg_paraphrased_loss"], "1": None}})
    without = {name: values for name, values in section.items() if name != "generated_text"}
    with pytest.warns(UserWarning, match="a log lacks 'generated_text'"):
        assert measure(without).whole["forget_quality"] == expected


@pytest.fixture(scope="module")
def adapter(folder):
    """The folder of an adapter, which names the model of ``folder`` as its base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder / "adapter"


def evaluate_text(folder, out, *arguments):
    return cli.main(
        ["evaluate", *map(str, arguments), "--quiet", "--out", str(out), "--data", f"text={folder}/text.txt"]
    )


def test_an_adapter_is_measured_on_its_base(folder, adapter, tmp_path, capsys):
    assert evaluate_text(folder, tmp_path / "a.json", adapter) == 0
    assert f"{adapter} is an adapter; its base is {folder / 'model'}" in capsys.readouterr().err
    assert evaluate_text(folder, tmp_path / "b.json", folder / "model", "--adapter", adapter) == 0
    found, expected = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert found == expected and found["adapter"] == str(adapter)
    bare = (
        json.loads((folder / "one.json").read_text())["sets"]["text"]
        if (folder / "one.json").exists()
        else {}
    )
    assert found["sets"]["text"] != bare


def test_an_adapter_without_its_base_says_which(folder, adapter, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/none/base"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert evaluate_text(folder, tmp_path / "a.json", moved) == 2
    error = capsys.readouterr().err
    assert f"{moved} is an adapter for '/none/base', which cannot be loaded" in error
    assert f"Or name the base: loku evaluate BASE --adapter {moved}" in error
    assert evaluate_text(folder, tmp_path / "a.json", moved, "--adapter", adapter) == 2
    assert f"MODEL must be the base of {adapter}: loku evaluate BASE" in capsys.readouterr().err
    config["base_model_name_or_path"] = None
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert evaluate_text(folder, tmp_path / "a.json", moved) == 2
    assert f"Or name the base: loku evaluate BASE --adapter {moved}" in capsys.readouterr().err
    tensors = load_file(moved / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, moved / "adapter_model.safetensors")
    assert evaluate_text(folder, tmp_path / "a.json", folder / "model", "--adapter", moved) == 2
    assert "does not fit its base" in capsys.readouterr().err


def test_options_take_underscores_and_errors_name_the_line(folder, tmp_path, capsys):
    model = folder / "model"
    assert evaluate_text(folder, tmp_path / "a.json", model, "--max_length", "3", "--batch_size", "2") == 0
    assert "2 rows of the text set were cut" in capsys.readouterr().err
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert settings["max_length"] == 3 and settings["batch_size"] == 2
    file = tmp_path / "odd.jsonl"
    file.write_text('{"text": "a b c"}\n\n{"text": 3}\n')
    assert cli.main(["evaluate", str(model), "--data", f"odd={file}", "--out", str(tmp_path / "b.json")]) == 2
    assert f"{file}, line 3: row 1 of the odd set: 'text' is a int" in capsys.readouterr().err
