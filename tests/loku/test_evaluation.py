"""Measures against their definitions, brute force and the TOFU authors' own logs."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loku.data
from loku.data import tokenize_dataset
from loku.evaluation import (
    answer_losses,
    evaluate_tofu_rows,
    extraction_likelihood,
    extraction_strength,
    forget_quality,
    format_table,
    generate_greedy,
    memorization_accuracy,
    model_utility,
    perplexity,
    plot_measures,
    plot_probabilities,
    rouge_recalls,
    section_metrics,
    token_scores,
    utility_table,
    write_report,
)
from loku.evaluation.extraction import greedy_answers
from loku.evaluation.tofu import SECTIONS

VOCAB, EOS = 23, 1


@pytest.fixture(scope="module")
def model():
    """A random model in float64, so that batching and caching change no argmax."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def naive_greedy(model, ids, length):
    """One sequence, no cache, no library."""
    new = []
    while len(new) < length and EOS not in new:
        new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return new


@pytest.fixture(scope="module")
def rows(model):
    """Rows that the model partly knows: its own continuations with every seventh token replaced."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, length in enumerate([24, 9, 17, 30, 12, 4]):
        ids = torch.randint(2, VOCAB, (3 + index,), generator=generator).tolist()
        start = len(ids)
        while len(ids) < start + length:
            ids += naive_greedy(model, ids, 1)
            if len(ids) % 7 == 0 or ids[-1] == EOS:
                ids[-1] = int(torch.randint(2, VOCAB, (), generator=generator))
        labels = ids if index == 3 else [-100] * start + ids[start:]  # row 3: a text without a prompt
        made.append({"input_ids": ids, "labels": labels})
    made[0]["labels"][12:14] = [-100, -100]  # a hole, as between the turns of a dialogue
    made[1]["input_ids"][-1] = made[1]["labels"][-1] = EOS
    # One that holds an EOS which the model predicts, as packed texts do: generation ends there.
    starts = ([a, b] for a in range(2, VOCAB) for b in range(2, VOCAB))
    ids = next(s + new for s in starts if EOS in (new := naive_greedy(model, s, 8)) and len(new) > 4)
    for _ in range(8):
        ids = ids + naive_greedy(model, ids, 1)
    made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


@torch.no_grad()
def naive_scores(model, row):
    """(losses, argmax is the label) of a row's labelled tokens, from the definition."""
    log_p = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    at = [i for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
    losses = [-log_p[i - 1, row["labels"][i]].item() for i in at]
    return losses, [log_p[i - 1].argmax().item() == row["labels"][i] for i in at]


def naive_extraction(model, row, n, stride):
    """Eqs. 4 and 5 as they are written: one generation for every prefix."""
    ids = row["input_ids"]
    start = next(i for i in range(1, len(ids)) if row["labels"][i] != -100)
    overlaps = []
    for t in range(start, len(ids) - n, stride):
        new = naive_greedy(model, ids[:t], len(ids) - t)
        truth = {tuple(ids[i : i + n]) for i in range(t, len(ids) - n + 1)}
        grams = [tuple(new[i : i + n]) for i in range(len(new) - n + 1)]
        overlaps.append(sum(g in truth for g in grams) / len(grams) if grams else 0.0)
    return sum(overlaps) / len(overlaps) if overlaps else None


def test_token_scores_match_their_definition(model, rows):
    model.train()
    scores = token_scores(model, rows, batch_size=4, progress=False)
    assert model.training  # left as it was
    model.eval()
    for row, score in zip(rows, scores, strict=True):
        losses, memorized = naive_scores(model, row)
        torch.testing.assert_close(score.losses, torch.tensor(losses, dtype=torch.float64))
        assert score.memorized.tolist() == memorized
        assert torch.equal(
            score.memorized, score.predicted == torch.tensor(row["input_ids"])[score.positions]
        )


def test_memorization_accuracy_and_perplexity(model, rows):
    naive = [naive_scores(model, row) for row in rows]
    accuracy = sum(sum(memorized) / len(memorized) for _, memorized in naive) / len(rows)
    assert 0.3 < accuracy < 0.95  # the rows are a case that can fail
    assert memorization_accuracy(model, rows, 4, progress=False) == pytest.approx(accuracy, rel=1e-12)
    losses = [loss for row_losses, _ in naive for loss in row_losses]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, rows, 4, progress=False) == pytest.approx(expected, rel=1e-6)


def test_extraction_strength_is_that_of_greedy_decoding(model, rows):
    @torch.no_grad()
    def shortest_prefix(ids, start):
        for known in range(start, len(ids) + 1):
            new = ids[:known]
            while len(new) < len(ids):
                new = new + [model(torch.tensor([new])).logits[0, -1].argmax().item()]
            if new == ids:
                return known - start

    rows = rows[1:]  # the first has a hole, which greedy decoding knows nothing of
    expected = []
    for row in rows:
        start = next(i for i in range(1, len(row["labels"])) if row["labels"][i] != -100)
        expected.append(1 - shortest_prefix(row["input_ids"], start) / (len(row["input_ids"]) - start))
    assert extraction_strength(token_scores(model, rows, 4, progress=False)) == expected
    assert len(set(expected)) > 2


def test_memorization_ties_go_to_the_lowest_id():
    class Flat(torch.nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, **kwargs):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 5)})

    rows = [{"input_ids": [4, 0, 1, 3], "labels": [4, 0, 1, 3]}]
    assert memorization_accuracy(Flat(), rows, progress=False) == pytest.approx(1 / 3)


def test_greedy_generation_does_not_depend_on_the_batch_or_the_generation_config(model):
    prompts = [[5, 6], [7, 8, 9, 10, 11, 12], [3], [20, 4, 19]]
    lengths = [9, 5, 12, 0]
    expected = [naive_greedy(model, p, n) for p, n in zip(prompts, lengths, strict=True)]
    model.generation_config.repetition_penalty = 5.0  # as some chat models have
    try:
        for batch_size in (1, 4):
            assert generate_greedy(model, prompts, lengths, batch_size, progress=False) == expected
    finally:
        model.generation_config.repetition_penalty = None


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])  # gpt_neo has a table of positions
def test_greedy_generation_ends_with_the_context(kind):
    """Each prompt by its own width, whatever is beside it."""
    model = tiny_model(kind).double()
    context = model.config.max_position_embeddings
    prompts = [
        [3 + i % 90 for i in range(width)] for width in (14, 60, context - 3, context - 40, context, 5)
    ]
    alone = [generate_greedy(model, [p], [80], eos_token_id=[], progress=False)[0] for p in prompts]
    assert [len(new) for new in alone] == [80, context - 60, 3, 40, 0, 80]
    together = generate_greedy(model, prompts, [80] * 6, batch_size=6, eos_token_id=[], progress=False)
    assert together == alone


def test_greedy_answers_have_at_most_so_many_tokens(model):
    ids = [5, 6, *naive_greedy(model, [5, 6], 20)]
    memorized = {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
    scores = token_scores(model, [memorized], progress=False)
    for length in (1, 5, 20):
        (answer,) = greedy_answers(model, [memorized], scores, length, progress=False)
        assert answer == ids[2 : 2 + length]


def test_packed_rows_have_no_extraction_likelihood(model):
    packed = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6], "position_ids": [0, 1, 0, 1]}
    with pytest.raises(ValueError, match="split_documents"):
        extraction_likelihood(model, [packed], n=1, progress=False)
    rows = [{name: ids[part] for name, ids in packed.items()} for part in (slice(2), slice(2, 4))]
    assert loku.data.split_documents([packed, rows[0]]) == [
        {name: row[name] for name in ("input_ids", "labels")} if "position_ids" in row else row
        for row in (*rows, rows[0])
    ]


@pytest.mark.parametrize(("n", "stride"), [(2, 1), (3, 1), (3, 4), (10, 1)])
def test_extraction_likelihood_is_the_brute_force_one(model, rows, n, stride):
    expected = [naive_extraction(model, row, n, stride) for row in rows]
    result = extraction_likelihood(model, rows, n, stride, batch_size=4, progress=False)
    assert result.per_row == expected
    scores = token_scores(model, rows, progress=False)
    assert extraction_likelihood(model, rows, n, stride, progress=False, scores=scores) == result
    known = [value for value in expected if value is not None]
    assert result.mean == pytest.approx(sum(known) / len(known))
    assert (result.n, result.stride) == (n, stride)
    if n < 10:
        assert 0.02 < result.mean < 0.98  # the rows are a case that can fail


def test_extraction_likelihood_of_a_memorized_text_is_one(model):
    ids = [5, 6, *naive_greedy(model, [5, 6], 20)]
    memorized = {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
    result = extraction_likelihood(model, [memorized], n=4, progress=False)
    assert result.mean == 1.0
    short = {"input_ids": ids[:5], "labels": ids[:5]}
    result = extraction_likelihood(model, [memorized, short], n=4, progress=False)
    assert result.per_row == [1.0, None]
    assert result.mean == 1.0
    assert math.isnan(extraction_likelihood(model, [short], n=4, progress=False).mean)


# TOFU


def golden(name):
    with gzip.open(Path(__file__).parents[1] / "data" / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def phi_full():
    return golden("phi_full")


def test_golden_forget_quality(phi_full):
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
    """Gradient ascent drives losses to thousands of nats: nothing may overflow into a plausible number."""
    section = {
        "avg_gt_loss": {"0": 5000.0, "1": 4000.0},
        "rougeL_recall": {"0": 0.0, "1": 0.5},
        "average_perturb_loss": {"0": [5000.0, 9000.0], "1": [1.0, 1.0]},
        "avg_paraphrased_loss": {"0": 5000.0, "1": 4000.0},
    }
    metrics = section_metrics(section, choice=True)
    assert metrics == {"probability": 0.25, "rouge": 0.25, "truth_ratio": 0.5}
    assert section_metrics(section, forget=True)["truth_ratio"] == 0.0
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
    """The tokenizer that ships, the questions of one author, and a small random model for them."""
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
    with pytest.raises(ValueError, match="row 1: TOFU rows need"):
        evaluate_tofu_rows(model, tokenizer, [plain, {"text": "a"}], progress=False)


# Reports


def test_report_is_strict_json(tmp_path):
    report = {
        "nan": math.nan,
        "list": [1, -math.inf, "é"],
        "tensor": torch.tensor([0.5, math.nan]),
        "scalar": torch.tensor(2.5).numpy(),
        "path": tmp_path,
        "none": None,
        3: True,
    }
    write_report(tmp_path / "new" / "report.json", report)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "new" / "report.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {
        "nan": None,
        "list": [1, None, "é"],
        "tensor": [0.5, None],
        "scalar": 2.5,
        "path": str(tmp_path),
        "none": None,
        "3": True,
    }


def test_table_has_a_column_a_model_and_a_dash_for_what_is_missing():
    table = format_table(
        {
            "before": {"probability": 0.99951, "p": 2.2e-16},
            "after": {"probability": 0.02, "p": math.nan, "rows": 40},
            "retain_only": {},
        }
    )
    cells = [line.split() for line in table.splitlines()]
    assert cells[0] == ["before", "after", "retain_only"]
    assert cells[2:] == [
        ["probability", "1.000", "0.020", "-"],
        ["p", "2.2e-16", "-", "-"],
        ["rows", "-", "40", "-"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_plot(tmp_path):
    history = [
        {"step": 0, "forget_probability": 1.0, "retain_probability": 1.0},
        {"step": 5, "loss": 1.0},
        {"step": 10, "forget_probability": 0.1, "retain_probability": None},
    ]
    plot_probabilities(tmp_path / "curve.png", history)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="forget_probability"):
        plot_probabilities(tmp_path / "none.png", [{"step": 1, "loss": 2.0}])
    plot_measures(
        tmp_path / "bars.png", {"forget": {"rouge": 0.5, "rows": 3}, "retain": {"probability": 1.0}}
    )
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no measure to plot"):
        plot_measures(tmp_path / "none.png", {"forget": {"perplexity": 3.0}})
