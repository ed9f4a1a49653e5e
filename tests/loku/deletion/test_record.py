"""Records: their schema, their pages and their pictures."""

import ast
import base64
import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from deletion_facts import FACTS, facts

from loku.deletion import pictures
from loku.deletion.record import (
    FIELDS,
    MAX_BYTES,
    OUTCOMES,
    RECORD,
    REQUIRED,
    read_record,
    validate_record,
    without_times,
    write_record,
)
from loku.deletion.statements import OUTCOME_STATEMENTS, PROOF

ROOT = Path(__file__).parents[3]
NAMES = ["record.html", "record.json", "record.md"]
ATTACKS = [f"attack_{name}.png" for name in ("extract", "mia", "quantise", "relearn")]
PICTURES = [*ATTACKS, "measures.png", "training.png"]


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def written(directory, record):
    directory.mkdir()
    write_record(directory, record)
    return contents(directory)


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


# The files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a record of all facts."""
    return written(tmp_path_factory.mktemp("record") / "a", facts())


def test_equal_facts_give_equal_bytes(files, tmp_path):
    in_another_order = dict(reversed(facts().items()))
    in_another_order["request"] = {**facts()["request"], "attacks": ("extract", "mia", "relearn", "quantise")}
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "yellow", "font.size": 20, "savefig.dpi": 30}):
        again = written(tmp_path / "b", in_another_order)  # nor do a user's settings count
    assert [*files] == [*(f"pictures/{name}" for name in PICTURES), *NAMES]
    assert files == again
    assert json.loads(files[RECORD]) == FACTS == read_record(tmp_path / "b")


def test_only_the_times_differ_between_two_runs(files, tmp_path):
    times = {"begin": "2027-01-02T03:04:05+00:00", "end": "2027-01-02T03:08:05+00:00", "seconds": {}}
    later = written(tmp_path / "b", facts(times=times))
    assert {name for name in files if files[name] != later[name]} == set(NAMES)
    assert without_times(json.loads(files[RECORD])) == without_times(json.loads(later[RECORD]))
    assert without_times({"a": [{"seconds": 3, "b": 1}], "times": 4}) == {"a": [{"b": 1}]}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_run_that_stopped_early_has_a_record(tmp_path, outcome):
    """Each part but the required ones may be missing or null, and the pages say that it is."""
    least = {name: facts()[name] for name in REQUIRED} | {"outcome": outcome}
    if outcome == "forgotten":
        least["limits"] = facts()["limits"]
    optional = {field.path for field in FIELDS if "." not in field.path} - least.keys()
    first = written(tmp_path / "a", least)
    second = written(tmp_path / "b", least | dict.fromkeys(optional))
    assert [*first] == NAMES
    assert first["record.md"] == second["record.md"]
    page = first["record.md"].decode()
    name, answer, statement = OUTCOME_STATEMENTS[outcome]
    assert f"**Outcome: {name}.**" in page and f"**{answer}**" in page and statement in page
    assert "The record has no such part" in page and "it was not run" in page


def test_nothing_is_written_for_broken_facts(tmp_path):
    with pytest.raises(ValueError, match="outcome"):
        write_record(tmp_path, facts(outcome="done"))
    assert not contents(tmp_path)


# The pages


def test_the_first_page_answers_the_questions_of_an_officer(files):
    page = files["record.md"].decode()
    first, _, rest = page.partition("## Measures\n")
    for answer in (
        "| Who asks | A. Example |",
        "| Reference number | ER-2026-17 |",
        "8 of 400 rows of /data/rows.jsonl",
        "found: 1 exact, 1 near; 1 of them was forgotten, too",
        "| Rows to keep | 72 rows, of which 58 were trained on |",
        "12 steps; the weights of step 10 were kept (all limits are met)",
        "| share of tokens that are the first guess (MA) | 1 | 0.25 | 0.3 | yes |",
        "kept 96% of its general ability",
        "still forgotten: 1 of 1.",
        "| control | no retrained model was given |",
        "| Extraction, forget.paraphrased | no row has a paraphrase |",
        "word by word | 1 | 0.125 | 0.05 |",
        "**Some way of asking still brings 12.5% of the rows back from the new model, word by word.**",
        "(AUC; 0.5 is a guess) | 0.99 | 0.52 | – |",
        "trained again | – | 0.4 | 0.003 |",
        "after rounding | – | 0.03 | – |",
        "| Relearning, steps to half | no original model was given |",
    ):
        assert answer in first
    assert all(paragraph in first for paragraph in PROOF)
    # The parts of the engineer have every number.
    assert "| mean probability of a token of the answer | 0.998 | 0.997 | 0.004 | 0.003 | 0.95 |" in rest
    assert (
        "| loss | 0.52 |" in rest
        and "steps to half" not in rest
        and "| 10 | 2 | 0.2308 | 0.1808 | 0.95 |" in rest
    )
    assert "vllm serve /models/small --enable-lora \\\n    --max-lora-rank 16\n" in rest


def test_a_result_that_cannot_be_served_is_said(tmp_path):
    record = facts(measures=None, training=None, attacks=None)
    record["serving"] |= {"problems": ["vLLM knows no such module"], "lines": None}
    page = written(tmp_path / "a", record)["record.md"].decode()
    assert "| vllm, rank 16, which cannot serve it: vLLM knows no such module |" in page


def test_an_attack_without_success_is_not_made_much_of(tmp_path):
    record = facts(measures=None, training=None)
    record["attacks"]["after"]["extract"]["sets"]["forget"]["any way"]["whole"] = 0.0
    assert "Some way of asking still" not in written(tmp_path / "a", record)["record.md"].decode()


def test_an_earlier_request_that_came_back_is_said(tmp_path):
    earlier = [
        {"reference": "ER-1", "still_forgotten": False},
        {"reference": "ER-2", "still_forgotten": True},
        {"reference": "ER-3", "still_forgotten": None},
    ]
    record = facts(ledger={"earlier": earlier}, measures=None, training=None, attacks=None)
    page = written(tmp_path / "a", record)["record.md"].decode()
    assert "**Rows of earlier requests came back: ER-1.**" in page and "still forgotten: 1 of 3." in page


def test_the_page_is_one_file_without_scripts(files):
    page = Page(files["record.html"].decode())
    known = "html head meta title style body h1 h2 h3 h4 p strong table tr th td pre figure img figcaption"
    assert {tag for tag, _ in page.tags} <= set(known.split())
    assert {name for _, attributes in page.tags for name in attributes} <= set(
        "lang charset http-equiv content name src alt".split()
    )
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    pictures_of_page = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources}
    assert pictures_of_page == {files[f"pictures/{name}"] for name in PICTURES}
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy


HOSTILE = (
    "<script>alert(1)</script> [x](http://evil) **b** `c` | d\n# e\u202egpj.exe\x1b[31m www.evil.org $x$"
)


def test_what_strangers_wrote_is_shown_as_text(tmp_path):
    record = facts()
    record["request"] |= {"requester": HOSTILE, "reference": HOSTILE, HOSTILE: HOSTILE}
    record["inputs"]["model"]["files"] = {HOSTILE: "b" * 64}
    record["serving"]["lines"] = [f"```\n{HOSTILE}"]
    record["measures"]["before"][HOSTILE] = {HOSTILE: 0.5}
    record["training"]["history"][0][HOSTILE] = 0.5
    files = written(tmp_path / "a", record)
    page = Page(files["record.html"].decode())
    assert "script" not in {tag for tag, _ in page.tags} and "a" not in {tag for tag, _ in page.tags}
    seen = "<script>alert(1)</script> [x](http://evil) **b** `c` | d # e\N{REPLACEMENT CHARACTER}gpj.exe"
    assert page.text.count(seen) >= 5
    text = files["record.md"].decode()
    assert not re.search("[\u202e\x1b]", text + files["record.html"].decode())
    outside = re.sub(r"^````\n.*?^````$", "", text, flags=re.S | re.M)  # the lines of the server
    assert outside != text
    for markup in (r"(?<!\\)<script", r"(?<!\\)\[x\]", "http://", r"(?<!\\)\*\*b", "www[.]evil", r"^# e"):
        assert not re.search(markup, outside, re.M), markup
    assert r"\<script\>alert(1)\</script\> \[x\](http\://evil)" in outside
    for line in outside.splitlines():  # every row has the cells of its table
        if line.startswith("| Who asks"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_a_long_table_is_cut_on_the_page_alone(tmp_path):
    record = facts(measures=None, attacks=None)
    record["training"]["history"] = [{"step": step, "probability": 0.5} for step in range(1000)]
    record["rows"]["indices"] = [*range(50)]
    files = written(tmp_path / "a", record)
    page = files["record.md"].decode()
    assert "800 further rows are in record.json" in page and "| 199 | 0.5 |\n" in page
    assert "18, 19 and 30 more" in page
    assert len(json.loads(files[RECORD])["training"]["history"]) == 1000


def test_the_figures_of_the_fixed_paragraph_are_those_of_the_result():
    rows = json.loads((ROOT / "experiments/results/robustness_cpu.json").read_text())["rows"]
    figure = {(row["what"], row["name"]): row for row in rows}
    relearned = "relearning: half of the forget set"
    rest = "forget_rest_probability"
    rounded = [
        row["forget_probability"]
        for row in rows
        if row["what"] == "rounded: unlearned" and row["name"] != "not rounded"
    ]
    expected = [
        f"{figure[relearned, 'step 0'][rest]:.3f}",
        "20",
        f"{figure[relearned, 'step 20'][rest]:.2f}",
        f"{figure['relearning: as many retain rows', 'step 20'][rest]:.3f}",
        f"{figure[f'{relearned}, by the control', 'step 20'][rest]:.3f}",
        "8",
        "4",
        f"{figure['rounded: unlearned', 'not rounded']['forget_probability']:.4f}",
        f"{max(rounded):.4f}",
    ]
    told = next(paragraph for paragraph in PROOF if paragraph.startswith("Our own figures"))
    assert re.findall(r"\d+(?:\.\d+)?", told) == expected
    assert not any(re.search(r"\d\.\d", paragraph) for paragraph in PROOF if paragraph != told)


# The pictures


@pytest.fixture()
def drawn(tmp_path, monkeypatch):
    """Draw the pictures of facts, and return the figures by their names."""
    figures = {}
    write = pictures._write

    def keep(figure, file):
        figures[file.stem] = figure
        write(figure, file)

    monkeypatch.setattr(pictures, "_write", keep)

    def draw(record):
        pictures.draw_pictures(tmp_path, record)
        return figures

    return draw


def test_the_pictures_have_the_figures(drawn):
    figures = drawn(facts())
    panels = {axes.get_title().replace("\n", " "): axes for axes in figures["measures"].axes}
    assert len(panels) == 6  # the number of rows is no measure
    accuracy = panels["share of tokens that are the first guess (MA)"]
    heights = [[bar.get_height() for bar in bars] for bars in accuracy.containers]
    assert heights[:2] == [[1.0, 1.0, 0.3], [0.25, 0.98, 0.28]]
    assert heights[2][0] == 0.24 and all(map(math.isnan, heights[2][1:]))  # the control
    assert [line.get_ydata()[0] for line in accuracy.lines] == [0.3]
    assert accuracy.get_ylim() == (0, 1.1)
    assert panels["perplexity of the answer"].get_yscale() == "log"
    assert not panels["perplexity of the answer"].lines  # it has no limit

    accuracy, strength, utility = figures["training"].axes
    assert list(accuracy.lines[0].get_xdata()) == [*range(0, 13, 2)]
    assert list(utility.lines[0].get_ydata()) == [1 - step / 200 for step in range(0, 13, 2)]
    assert [axes.lines[1].get_ydata()[0] for axes in (accuracy, strength, utility)] == [0.3, 0.05, 0.9]
    assert [axes.lines[-1].get_xdata()[0] for axes in (accuracy, strength, utility)] == [10, 10, 10]
    for name, expected in (
        ("attack_extract", [[0.5, 1.0], [0.0625, 0.125], [0.025, 0.05]]),
        ("attack_quantise", [[0.9, 0.03, 0.02], [0.8, 0.79, 0.7]]),
        ("attack_mia", [[0.99], [0.52]]),  # a score that is not defined has no bar
    ):
        (axes,) = figures[name].axes
        assert [[bar.get_height() for bar in bars] for bars in axes.containers] == expected
    (rest,) = figures["attack_relearn"].axes
    assert {line.get_label(): list(line.get_ydata()) for line in rest.lines} == {
        "unlearned": [0.003, 0.1, 0.4],
        "control": [0.002, 0.0025, 0.003],
    }


def test_nothing_is_drawn_without_numbers(drawn):
    empty = facts(
        measures={"before": {"forget": {"probability": None}}, "after": {}},
        training={"history": [{"step": 0, "utility": None}]},
        attacks={"after": {"extract": {"sets": []}, "mia": {"scores": {"loss": 3}}, "relearn": None}},
    )
    assert drawn(empty) == {}


# The schema


def replaced(path, value):
    """The facts with another value at a path."""
    found = copy.deepcopy(FACTS)
    *parents, name = path.split(".")
    part = found
    for parent in parents:
        part = part[int(parent) if isinstance(part, list) else parent]
    part[int(name) if isinstance(part, list) else name] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema of the record must be 1"),
        ("schema", True, "schema of the record must be 1"),
        ("outcome", "done", "outcome must be one of"),
        ("request", None, "has no 'request'"),
        ("measurements", {}, "unknown field, 'measurements'"),
        ("request.reference", 17, r"request\.reference must be a text"),
        ("times.begin", "2026-01-02T03:04:05", r"times\.begin must be a time"),
        ("times.begin", "yesterday", r"times\.begin must be a time"),
        ("times.begin", None, "must have a begin and an end"),
        ("times.end", "2026-01-02T03:04:04+00:00", "is before"),
        ("inputs.model.files.x", "A" * 64, r"inputs\.model\.files\.x must be a SHA-256"),
        ("rows.total", -1, r"rows\.total must be a whole number"),
        ("rows.total", True, r"rows\.total must be a whole number"),
        ("measures.later", {}, "measures has an unknown field, 'later'"),
        ("measures.after.forget.probability", float("nan"), r"probability must be a finite number"),
        ("measures.after.forget.probability", "0.5", r"probability must be a finite number"),
        ("measures.after.forget.probability", True, r"probability must be a finite number"),
        ("attacks.after.phishing", {}, r"attacks\.after has an unknown field, 'phishing'"),
        (
            "attacks.after.mia.scores.loss.auc",
            float("inf"),
            r"mia\.scores\.loss\.auc is not a value of JSON",
        ),
        ("training.history.0", 3, r"training\.history\.0 must be an object"),
        ("training.history.0.loss", Path("x"), r"loss is not a value of JSON"),
        ("training.note", {1: 2}, r"training\.note has a key that is no text"),
        ("serving.lines", "vllm serve", r"serving\.lines must be a list"),
        ("not_tested.mia", 0, r"not_tested\.mia must be a text"),
        ("rows.near_duplicates.duplicates.0.index", "7", r"duplicates\.0\.index must be a whole number"),
        ("limits.memorization_accuracy.met", False, "met is False, but 0.25 is after"),
        ("limits.memorization_accuracy.after", 0.4, "met is True, but 0.4 is after"),
        ("limits.memorization_accuracy", {"met": False}, "outcome is 'forgotten', but limits"),
        ("limits", {}, "outcome is 'forgotten', but there are no limits"),
    ],
)
def test_broken_facts_are_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message):
        validate_record(replaced(path, value))


def test_good_facts_pass():
    validate_record(FACTS)
    validate_record(facts(outcome="not forgotten", limits=replaced("limits.x", {"met": False})["limits"]))
    validate_record(replaced("training.of_another_version", {"deep": [1, None, {"x": "y"}]}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[]", "must be an object"),
        (b'{"schema": 1, "schema": 1}', "comes twice"),
        (b'{"schema": NaN}', "not a number of JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "unknown|no 'schema'|not JSON"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
    ids=["cut", "bytes", "list", "twins", "nan", "deep list", "deep object", "long number"],
)
def test_a_hostile_record_is_refused(tmp_path, text, message):
    (tmp_path / RECORD).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path)


def test_deep_facts_are_refused():
    deep = {}
    for _ in range(900):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="more than 32 levels"):
        validate_record(facts(retain=deep))


def test_a_record_is_a_regular_file_of_some_size(tmp_path):
    import os

    huge = tmp_path / RECORD
    with open(huge, "wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="bytes, more than"):
        read_record(tmp_path)
    huge.unlink()
    os.mkfifo(huge)
    with pytest.raises(ValueError, match="not a regular file"):
        read_record(tmp_path)
    huge.unlink()
    huge.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        read_record(tmp_path)


def test_the_documented_schema_is_that_of_the_code():
    text = (ROOT / "docs/deletion.md").read_text(encoding="utf-8")
    section = text.partition("\n## The record\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.*]+)` \| (\w+) \| (.*) \|$", section, re.M)
    assert rows == [(field.path, field.kind, field.meaning) for field in FIELDS]


def test_the_facts_of_the_tests_know_every_field():
    """The pages are tested with all of them."""
    for field in FIELDS:
        if field.path == "serving.problems.*":  # a test of its own
            continue
        level = [FACTS]
        for name in field.path.split("."):
            level = [
                item
                for part in level
                for item in (
                    (part.values() if isinstance(part, dict) else part)
                    if name == "*"
                    else [part[name]]
                    if name in part
                    else []
                )
            ]
        assert level, field.path


def test_no_heavy_import():
    """A verifier does not wait for torch."""
    for name in ("record", "seal", "ledger"):
        tree = ast.parse((ROOT / f"loku/deletion/{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] not in ("torch", "transformers", "matplotlib"), name
