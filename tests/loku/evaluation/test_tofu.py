"""TOFU's measures against the authors' published logs, and against their definitions."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from naive_measures import naive_scores
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loku.data
import loku.demo
from loku.data import tokenize_dataset
from loku.evaluation import (
    answer_losses,
    evaluate_tofu_rows,
    forget_quality,
    generate_greedy,
    model_utility,
    rouge_recalls,
    section_metrics,
    utility_table,
)
from loku.evaluation.tofu_logs import SECTIONS, check_reference


def golden(name):
    with gzip.open(Path(__file__).parents[2] / "data" / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def phi_full():
    return golden("phi_full")


def test_golden_forget_quality(phi_full):
    with pytest.warns(UserWarning, match="a log lacks 'generated_text'"):  # the committed part of it
        assert forget_quality(phi_full, golden("phi_retain90")) == pytest.approx(2.1943e-16, rel=1e-4)
    assert forget_quality(phi_full, phi_full) == 1.0


def test_golden_model_utility(phi_full):
    assert model_utility(phi_full) == pytest.approx(0.52207, abs=5e-6)
    rounded = {
        name: [round(metrics[key], 2) for key in ("rouge", "probability", "truth_ratio")]
        for name, metrics in utility_table(phi_full).items()
    }
    assert rounded == {
        "retain": [0.93, 0.93, 0.48],
        "real_authors": [0.42, 0.38, 0.46],
        "world_facts": [0.78, 0.41, 0.49],
        "forget": [0.92, 0.93, 0.48],
    }


@pytest.mark.parametrize("section", SECTIONS.values())
def test_golden_rouge_from_the_generated_texts(phi_full, section):
    log = phi_full[section]
    generated, references = zip(*(texts[1:] for texts in log["generated_text"].values()), strict=True)
    rouge1, rougeL = rouge_recalls(generated, references)
    assert rouge1 == pytest.approx(list(log["rouge1_recall"].values()), abs=1e-6)
    assert rougeL == pytest.approx(list(log["rougeL_recall"].values()), abs=1e-6)


def test_metrics_survive_a_collapsed_model(phi_full):
    """Losses of thousands of nats, as after gradient ascent, never overflow into a plausible number."""
    section = {
        "avg_gt_loss": {"0": 5000.0, "1": 4000.0},
        "rougeL_recall": {"0": 0.0, "1": 0.5},
        "average_perturb_loss": {"0": [5000.0, 9000.0], "1": [1.0, 1.0]},
        "avg_paraphrased_loss": {"0": 5000.0, "1": 4000.0},
    }
    metrics = section_metrics(section, choice=True)
    assert metrics == {"probability": 0.25, "rouge": 0.25, "truth_ratio": 0.5}
    assert section_metrics(section, forget=True)["truth_ratio"] == 0.0
    texts = {i: ["Question: Who?\n", "", "Nobody."] for i in ("0", "1")}
    section["generated_text"] = texts
    log = {SECTIONS["forget"]: section, SECTIONS["retain"]: section}
    assert forget_quality(log, log) == 1.0
    assert model_utility(log, sets=["retain"]) == 0.0


def test_a_paraphrased_loss_that_is_missing_is_named():
    section = {"average_perturb_loss": {"0": [1.0], "1": [2.0]}, "avg_paraphrased_loss": {"0": 1.0}}
    with pytest.raises(ValueError, match=r"unlearned log's forget section: rows \['1'\]"):
        forget_quality({SECTIONS["forget"]: section}, {SECTIONS["forget"]: section})


def test_missing_sections_are_named(phi_full):
    with pytest.raises(ValueError, match="no real_authors section"):
        model_utility({SECTIONS["retain"]: phi_full[SECTIONS["retain"]]})
    bare = {k: v for k, v in phi_full[SECTIONS["forget"]].items() if "loss" not in k or "gt" in k}
    with pytest.raises(ValueError, match="the retain log's forget section"):
        forget_quality(phi_full, {SECTIONS["forget"]: bare})
    with pytest.raises(ValueError, match="no forget section"):
        forget_quality({}, phi_full)


@pytest.fixture(scope="module")
def embedded():
    """The embedded tokenizer, the questions of one author, and a small random model for them."""
    folder = Path(loku.__file__).parent / "embedded"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with open(folder / "tofu.jsonl", encoding="utf-8") as file:
        questions = [json.loads(line) for line in file][-4:]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).double().eval(), tokenizer, questions


def test_answer_losses_are_those_of_the_answer_and_eos(embedded):
    model, tokenizer, questions = embedded
    prompts = [f"Question: {row['question']}\nAnswer:" for row in questions]
    means, counts = answer_losses(
        model, tokenizer, prompts, [f" {row['answer']}" for row in questions], 3, progress=False
    )
    for row, mean, count in zip(tokenize_dataset(questions, tokenizer), means, counts, strict=True):
        losses, _ = naive_scores(model, row)
        assert count == len(losses)
        assert mean.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_tofu_log_of_a_model(embedded):
    model, tokenizer, questions = embedded
    plain = {key: questions[0][key] for key in ("question", "answer")}
    choice = {**plain, "perturbed_answer": ["Never.", "Not at all."]}
    rows = [plain, questions[1], choice]
    section = evaluate_tofu_rows(model, tokenizer, rows, 8, progress=False)
    assert set(section) == {
        *("avg_gt_loss", "gt_loss", "num_token_gt", "generated_text", "rouge1_recall", "rougeL_recall"),
        *("average_perturb_loss", "avg_paraphrased_loss", "truth_ratio", "paraphrased_loss", "perturb_loss"),
        *("num_token_paraphrased", "num_token_perturb"),
    }
    assert list(section["avg_gt_loss"]) == ["0", "1", "2"]
    assert list(section["truth_ratio"]) == ["1", "2"]  # the rows with wrong answers
    assert len(section["average_perturb_loss"]["1"]) == len(questions[1]["perturbed_answer"])
    assert section["avg_paraphrased_loss"]["2"] == pytest.approx(section["avg_gt_loss"]["2"])
    wrong = section["average_perturb_loss"]["1"]
    ratio = math.exp(section["avg_paraphrased_loss"]["1"] - sum(wrong) / len(wrong))
    assert section["truth_ratio"]["1"] == pytest.approx(ratio)
    assert section["gt_loss"]["1"] == pytest.approx(
        section["avg_gt_loss"]["1"] * section["num_token_gt"]["1"]
    )
    json.dumps(section, allow_nan=False)

    asked, answered, answer = section["generated_text"]["0"]
    assert asked == f"Question: {plain['question']}\n"
    assert answer == plain["answer"]
    (row,) = tokenize_dataset([{"prompt": f"{asked}Answer:", "completion": " a"}], tokenizer)
    prompt = row["input_ids"][: row["labels"].count(-100)]
    room = max(section["num_token_gt"].values()) + 16
    (new,) = generate_greedy(model, [prompt], [room], 1, progress=False)
    assert answered == "Answer:" + tokenizer.decode(new, skip_special_tokens=True)

    log = {SECTIONS["forget"]: section}
    assert forget_quality(log, log) == 1.0
    without = evaluate_tofu_rows(model, tokenizer, [plain], 8, progress=False)
    assert "truth_ratio" not in without
    assert set(section_metrics(without)) == {"probability", "rouge"}
    with pytest.raises(
        ValueError, match="row 1 of the TOFU set: TOFU's measures need 'question' and 'answer'"
    ):
        evaluate_tofu_rows(model, tokenizer, [plain, {"text": "a"}], progress=False)


def test_the_embedded_twin_is_about_the_demos_questions():
    forget, _ = loku.demo.load_rows()
    twin = json.loads((Path(loku.__file__).parent / "embedded" / "retain_only.json").read_text())["log"]
    check_reference(twin, forget, "the twin's log")
    with pytest.raises(ValueError, match="about other questions"):
        check_reference(twin, [{**row, "question": "Who was it?"} for row in forget], "the log")
