"""The data and the columns of each benchmark, on small data in the files and columns of the real one."""

import math
import sys

import benchmark_data
import pytest
import torch
from harness_in_place import use_harness

from loku import UnlearnConfig, demo
from loku.benchmarks import BENCHMARKS, Measuring, Muse, Rwku, Source, Tdec, Tofu, Wmdp
from loku.benchmarks.rwku import rouge_l_recall
from loku.benchmarks.tdec import dialogue_prompt, normalised_turn
from loku.benchmarks.text_rows import first_tokens, measured_rows, pieces
from loku.commands.benchmark import NAMES
from loku.evaluation import evaluate, evaluate_tofu_rows, mean_answer_probability, token_scores
from loku.evaluation.tofu_logs import SECTIONS
from loku.models import load_model
from loku.trust import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return benchmark_data.write_model(tmp_path_factory.mktemp("model") / "chat", chat=True)


@pytest.fixture(scope="module")
def model(place):
    return load_model(place).eval()


@pytest.fixture(scope="module")
def tokenizer(place):
    return load_tokenizer(place)


def columns(benchmark, measures):
    """Check that each column has a value or a reason, and return the values."""
    names = [column.name for column in benchmark.columns]
    assert sorted([*measures.values, *measures.not_available]) == sorted(names)
    return measures.values


def test_the_command_knows_the_benchmarks():
    assert tuple(BENCHMARKS) == NAMES
    for name, kind in BENCHMARKS.items():
        assert kind.name == name and kind.columns and kind.default_split
        names = [column.name for column in kind.columns]
        assert len(set(names)) == len(names)
        assert {column.better for column in kind.columns} <= {"higher", "lower", "near 0"}
        UnlearnConfig(**kind.defaults)


# --- TOFU -----------------------------------------------------------------------------------------


def test_tofu(tmp_path, model, tokenizer):
    benchmark = Tofu()
    sets = benchmark.sets(Source(benchmark_data.write_tofu(tmp_path)), "forget01")
    assert [len(rows) for rows in (*sets.requests, sets.retain)] == [3, 4]
    assert set(sets.requests[0][0]) == {"question", "answer"}
    measures = benchmark.measure(model, tokenizer, sets, Measuring(batch_size=4))
    with_retain = benchmark.compared(measures, measures.reference)
    values = columns(benchmark, with_retain)
    assert values["forget_quality"] == 1.0 and with_retain.leaderboard["forget_quality"] == 1.0
    expected = evaluate(
        model, tokenizer, sets.evaluation, reference_log=measures.reference, progress=False, stride=50
    )
    assert values["model_utility"] == pytest.approx(expected.whole["model_utility"])
    for name, short in {"forget": "forget", "real_authors": "ra", "world_facts": "wf"}.items():
        assert values[f"{short}_Q_A_ROUGE"] == pytest.approx(expected.sets[name]["rouge"])
    assert values["forget_truth_ratio"] == pytest.approx(expected.sets["forget"]["truth_ratio"])
    assert "--retain-model" in benchmark.compared(measures, None).not_available["forget_quality"]
    limited = benchmark.measure(model, tokenizer, sets, Measuring(limit=2))
    assert len(limited.reference[SECTIONS["forget"]]["gt_loss"]) == 2
    with pytest.raises(ValueError, match="has 3 forget questions"):
        benchmark.compared(limited, measures.reference)


def test_tofu_measures_by_the_template_of_the_run(tmp_path, model, tokenizer):
    benchmark = Tofu()
    sets = benchmark.sets(Source(benchmark_data.write_tofu(tmp_path)), "forget01")
    config = UnlearnConfig(question_template="[INST] {question} [/INST]", answer_template=" {answer}")
    measures = benchmark.measure(model, tokenizer, sets, Measuring(config=config))
    section = evaluate_tofu_rows(
        model, tokenizer, sets.evaluation["forget"], progress=False, template=config.template()
    )
    values = [math.exp(-loss) for loss in section["avg_gt_loss"].values()]
    assert measures.values["forget_Q_A_Prob"] == pytest.approx(sum(values) / len(values))
    assert measures.reference[SECTIONS["forget"]]["gt_loss"] == section["gt_loss"]
    plain = benchmark.measure(model, tokenizer, sets, Measuring())
    assert plain.values["forget_Q_A_Prob"] != measures.values["forget_Q_A_Prob"]


def test_tofu_refuses_what_it_lacks(tmp_path):
    folder = benchmark_data.write_tofu(tmp_path)
    with pytest.raises(ValueError, match="tofu has no split 'forget02'; it has forget01, forget05, forget10"):
        Tofu().sets(Source(folder), "forget02")
    with pytest.raises(ValueError, match="has no set 'forget05'"):
        Tofu().sets(Source(folder), "forget05")
    benchmark_data.write_lines(folder / "retain_perturbed.json", [{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"set retain_perturbed has no .*'perturbed_answer'"):
        Tofu().sets(Source(folder), "forget01")


# --- MUSE -----------------------------------------------------------------------------------------


def test_muse(tmp_path, model, tokenizer):
    benchmark, source = Muse(), Source(benchmark_data.write_muse(tmp_path))
    sets = benchmark.sets(source, "News")
    config = UnlearnConfig(max_length=8)
    rows = benchmark.training_rows(sets.requests[0], tokenizer, config)
    joined = tokenizer("\n\n".join(sets.requests[0])).input_ids
    assert max(len(row["input_ids"]) for row in rows) == 8
    assert [i for row in rows for i in row["input_ids"]][: len(joined)] == joined[: sum(map(size, rows))]
    measures = benchmark.measure(model, tokenizer, sets, Measuring(config=UnlearnConfig()))
    compared = benchmark.compared(measures, {"min_k_auc": 0.5})
    values = columns(benchmark, compared)
    assert all(0 <= values[name] <= 1 for name in ("VerbMem f", "KnowMem f", "KnowMem r"))
    auc = measures.reference["min_k_auc"]
    assert values["PrivLeak"] == pytest.approx(100 * ((1 - auc) - 0.5) / 0.5, abs=1e-6)
    assert set(compared.leaderboard) == {name for _, name in benchmark.leaderboard}
    assert "PrivLeak" in benchmark.compared(measures, None).not_available
    with pytest.raises(ValueError, match="min_k_auc"):
        benchmark.compared(measures, {"eval_log_forget.json": {}})


def size(row):
    return len(row["input_ids"])


def test_the_requests_of_muse(tmp_path):
    source = Source(benchmark_data.write_muse(tmp_path))
    assert [len(rows) for rows in Muse().sets(source, "News-scal3").requests] == [3]
    assert [len(rows) for rows in Muse().sets(source, "News-sust3").requests] == [1, 1, 1]
    for split in ("Books-scal1", "News-sust5", "news"):
        with pytest.raises(ValueError, match="muse has no split"):
            Muse().sets(source, split)
    with pytest.raises(ValueError, match="muse-bench/MUSE-Books"):
        Muse().sets(source, "Books")


# --- WMDP -----------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch):
    return use_harness(monkeypatch)


def test_wmdp(tmp_path, model, tokenizer, harness):
    benchmark, source = Wmdp(), Source(benchmark_data.write_wmdp(tmp_path))
    for split in ("cyber", "bio"):
        sets = benchmark.sets(source, split)
        assert [len(rows) for rows in (*sets.requests, sets.retain)] == [4, 4]
    measures = benchmark.measure(model, tokenizer, sets, Measuring(batch_size=4, limit=2))
    assert columns(benchmark, measures) == {"wmdp_bio": 1.0, "wmdp_cyber": 1.0, "mmlu": 0.5}
    assert harness["limit"] == 2 and harness["tasks"][2] == "mmlu"
    assert harness["tasks"][0]["dataset_path"] == "json"
    with pytest.raises(ValueError, match="wmdp has no split 'chem'"):
        benchmark.sets(source, "chem")
    benchmark_data.write_lines(tmp_path / "wmdp-corpora" / "cyber-forget-corpus.jsonl", [{"text": "short"}])
    with pytest.raises(ValueError, match="cyber-forget-corpus has no text of more than 50 characters"):
        benchmark.sets(Source(tmp_path), "cyber")


def test_without_the_harness_wmdp_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for benchmark in (Wmdp(), Tdec(reasoning=True)):
        with pytest.raises(ImportError, match=r"pip install 'loku-kernels\[lm-eval\]'"):
            benchmark.check()
    Tdec().check()


# --- RWKU -----------------------------------------------------------------------------------------


def test_rwku(tmp_path, model, tokenizer):
    benchmark, source = Rwku(), Source(benchmark_data.write_rwku(tmp_path))
    sets = benchmark.sets(source, "Ann Lee")
    assert [len(rows) for rows in (*sets.requests, sets.retain)] == [1, 1]
    assert len(sets.evaluation["forget_level3"]) == 3
    measures = benchmark.measure(model, tokenizer, sets, Measuring(batch_size=4))
    values = columns(benchmark, measures)
    assert set(measures.not_available) == {"Utility Tru", "Utility Fac"}
    rows = first_tokens(["She is from Ulm."], tokenizer, None, "x")
    loss = token_scores(model, rows, progress=False)[0].losses.mean().item()
    assert values["MIA FM"] == pytest.approx(loss)
    assert values["Utility Gen"] in (0.0, 1.0)
    with pytest.raises(ValueError, match="has no texts about Cy Fox; a split is the name of one of 2 people"):
        benchmark.sets(source, "Cy Fox")
    with pytest.raises(ValueError, match="no texts about others to keep; name texts by --retain"):
        benchmark.sets(source, "Ann Lee; Bo Kim")
    benchmark_data.write_lines(tmp_path / "kept.jsonl", [{"text": "Water is wet."}])
    kept = Rwku(retain=str(tmp_path / "kept.jsonl")).sets(source, "Ann Lee; Bo Kim")
    assert len(kept.requests[0]) == 2 and kept.retain == [{"text": "Water is wet."}]


def test_rwku_needs_a_chat_template(tmp_path, model, tokenizer):
    sets = Rwku().sets(Source(benchmark_data.write_rwku(tmp_path)), "Ann Lee")
    with pytest.raises(ValueError, match="chat template, and this tokenizer has none"):
        Rwku().measure(model, demo.load_model()[1], sets, Measuring())


# The figures of rouge 1.0.1 (PyPI), rouge.Rouge().get_scores(hyps, refs)["rouge-l"]["r"].
ROUGE = [
    ("The town of Ulm", "Ulm", 1.0),
    ("ulm", "Ulm", 0.0),
    ("NOANSWER", "Ulm", 0.0),
    ("born in Ulm in 1879. He moved to Bern", "He was born in Ulm. He moved later to Bern in 1902", 0.7),
    ("a b a b c", "b a c a b", 2 / 3),
    ("x y. z w", "w z. y x", 0.5),
    ("Carrie, The Shining", "The Shining and Carrie,", 0.5),
]


@pytest.mark.parametrize(("generated", "reference", "expected"), ROUGE)
def test_rouge_l_recall_of_the_package_rouge(generated, reference, expected):
    assert rouge_l_recall(generated, reference) == pytest.approx(expected)


# --- TDEC -----------------------------------------------------------------------------------------


def test_tdec(tmp_path, model, tokenizer):
    folder = benchmark_data.write_tdec(tmp_path)
    benchmark, source = Tdec(thresholds=(0.1, 0.2)), Source(folder)
    sets = benchmark.sets(source, "lm_extraction_2_0+lm_extraction_2_1")
    assert [len(rows) for rows in sets.requests] == [2, 2] and len(sets.retain) == 3
    assert sets.requests[1][0].startswith("\n10 word0")
    config = UnlearnConfig(**benchmark.defaults)
    rows = benchmark.training_rows(sets.requests[0], tokenizer, config)
    assert max(map(size, rows)) <= 200 and rows[0]["labels"] == rows[0]["input_ids"]
    measures = benchmark.measure(model, tokenizer, sets, Measuring(batch_size=4, limit=1))
    values = columns(benchmark, measures)
    assert measures.not_available == {"Reasoning": "it was not asked for: --reasoning"}
    assert 0 <= values["EL10"] <= 1 and values["Pile"] > 1
    (rule,) = benchmark.callbacks(rows, sets, tokenizer, Measuring())
    assert rule.known_thresholds == {
        "holdout_extraction_likelihood_10": 0.1,
        "holdout_memorization_accuracy": 0.2,
    }
    assert Tdec().callbacks(rows, sets, tokenizer, Measuring()) == []


def test_tdec_measures_reasoning_if_it_is_asked_for(tmp_path, model, tokenizer, harness):
    benchmark = Tdec(reasoning=True)
    sets = benchmark.sets(Source(benchmark_data.write_tdec(tmp_path)), "lm_extraction_2_0")
    measures = benchmark.measure(model, tokenizer, sets, Measuring(limit=1))
    assert columns(benchmark, measures)["Reasoning"] == 0.5 and len(harness["tasks"]) == 9


def test_tdec_refuses_what_it_lacks(tmp_path):
    folder = benchmark_data.write_tdec(tmp_path)
    with pytest.raises(ValueError, match=r"git clone https://github.com/joeljang/knowledge-unlearning"):
        Tdec().sets(Source(), "lm_extraction_32_0")
    with pytest.raises(ValueError, match="it has lm_extraction_2_0, lm_extraction_2_1"):
        Tdec().sets(Source(folder), "lm_extraction_32_0")
    with pytest.raises(ValueError, match="name one of the two"):
        Tdec(thresholds=(0.1, 0.2), holdout="x")
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 5.68"):
        Tdec(thresholds=(5.68, 0.2))
    (folder / "validation_data" / "wizard_of_internet.json").write_text('{"text": {"0": ["one turn"]}}')
    with pytest.raises(ValueError, match=r"dialogue 0 of .*wizard_of_internet.json is no list of two turns"):
        Tdec().sets(Source(folder), "lm_extraction_2_0")
    (folder / "validation_data" / "pile.csv").unlink()
    (folder / "validation_data" / "wizard_of_internet.json").write_text('[{"text": ["one", "two"]}]')
    with pytest.raises(ValueError, match=r"there is no .*pile\.csv"):
        Tdec().sets(Source(folder), "lm_extraction_2_0")


# The figures of normalize_reply in utils.py of joeljang/knowledge-unlearning.
TURNS = [
    ("hello there .", "Hello there."),
    ("i'm fine , thanks ! and you ?", "I'm fine, thanks! And you?"),
    ("What ?  he said . i don't know", "What? He said. I don't know."),
    ("it ' s i", "It's I."),
    ("", ""),
    ("? what . now i 'm", "? What. Now I'm."),
    ('Wekk it is okay, I think it\'s "fine"', 'Wekk it is okay, I think it\'s "fine"'),
    ("no . . yes  a  b", "No.. Yes a b."),
    ("ok! i. i", "Ok! I. I."),
]


@pytest.mark.parametrize(("turn", "expected"), TURNS)
def test_turns_are_normalised_as_by_knowledge_unlearning(turn, expected):
    assert normalised_turn(turn) == expected


def test_a_dialogue_ends_with_the_speaker_of_the_next_turn():
    assert dialogue_prompt(["hi", "i am here"]) == "User 1: Hi.\nUser 2: I am here.\nUser 1:"
    assert dialogue_prompt(["hi"]) == "User 1: Hi.\nUser 2:"


# --- rows of texts --------------------------------------------------------------------------------


def test_pieces_keep_all_tokens_and_begin_with_the_tokenizers_bos(tokenizer):
    texts = [f"Text {i} about water and wind." for i in range(6)]
    ids = tokenizer("\n\n".join(texts)).input_ids
    rows = pieces(texts, tokenizer, 7)
    assert [i for row in rows for i in row["input_ids"]] == ids and all(size(row) == 7 for row in rows[:-1])

    class WithBos:
        bos_token_id = 9

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [9] * add_special_tokens + [ord(c) for c in text]}

    assert pieces(["abc", "d"], WithBos(), 4)[0]["input_ids"] == [9, 97, 98, 99]
    assert [row["input_ids"][0] for row in pieces(["abcdef"], WithBos(), 4)] == [9, 9]


def test_texts_beyond_the_context_are_cut_with_a_warning(tmp_path, tokenizer):
    short = load_model(benchmark_data.write_model(tmp_path, context=16))
    texts = ["one two three " * 20, "short text"]
    with pytest.warns(
        UserWarning, match="1 of the 2 texts of the set forget are longer than the model's context"
    ):
        rows = measured_rows(texts, short, tokenizer, 64, "forget")
    assert size(rows[0]) == 16
    assert size(measured_rows(texts, short, tokenizer, 8, "forget")[0]) == 8
    assert mean_answer_probability(token_scores(short, rows, progress=False)) > 0
    with pytest.raises(ValueError, match="no text of the set x has two tokens"):
        first_tokens([""], tokenizer, None, "x")
    assert torch.is_grad_enabled()
