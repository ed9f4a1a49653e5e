"""What goes wrong around a deletion request: other data, other models, other places. No model is trained."""

import json
from types import SimpleNamespace

import pytest
from deletion_requests import FORGET_ROWS, rows_of_authors, write_request, write_rows

from loku.cli import main
from loku.deletion import ledger, serve
from loku.deletion.procedure import forget
from loku.deletion.record import read_record
from loku.deletion.request import read_request
from loku.deletion.run import Run
from loku.deletion.seal import verify
from loku.demo import EMBEDDED


def run(request, output=None):
    return forget(read_request(request), output, progress=False)


@pytest.fixture()
def unknown(monkeypatch):
    """Runs end before a model is loaded, with the outcome "not known"."""
    monkeypatch.setattr(
        "loku.deletion.run.Run._measure_before", lambda self: {"outcome": "not known", "limits": {}}
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_holdout_row_that_is_to_be_forgotten_is_refused(tmp_path, unknown):
    request = write_request(tmp_path)
    known, unseen = rows_of_authors()
    write_rows(tmp_path / "holdout.jsonl", [*unseen[:4], known[-1]])
    with pytest.raises(ValueError, match=r"holdout: 1 of its 5 rows are also in forget: row 4 is row 2"):
        run(request, tmp_path / "out")


def test_rows_that_are_the_same_but_for_their_case_neither_train_nor_set_the_limits(tmp_path, unknown):
    request = write_request(tmp_path)
    known, unseen = rows_of_authors()
    same = {"question": known[-1]["question"].upper(), "answer": known[-1]["answer"] + " "}
    write_rows(tmp_path / "retain.jsonl", [*known[:5], same])
    write_rows(tmp_path / "holdout.jsonl", [*unseen[:5], same])
    (tmp_path / "work").mkdir()
    this = Run(read_request(request), tmp_path / "out", tmp_path / "work", False)
    assert this.rows.holdout == unseen[:5]
    this.models.held = lambda place: None  # no text is sampled
    told = this._keep()
    assert told["left_out"] == 1
    kept = this._retain
    assert same not in [*kept["trained"], *kept["measured"]["retain"]]
    assert len(this.rows.forget) == FORGET_ROWS
    write_rows(tmp_path / "holdout.jsonl", [same])
    with pytest.raises(ValueError, match="holdout: all of its rows"):
        run(request, tmp_path / "out")


def test_neither_near_duplicates_that_are_included_nor_the_holdout_come_from_the_corpus(tmp_path):
    known, unseen = rows_of_authors()
    near = {**known[-1], "answer": known[-1]["answer"].replace(" the ", " that ", 1) + " Too"}
    retain = {"data": "retain.jsonl", "corpus": "corpus.jsonl", "sampled": 0}
    request = write_request(tmp_path, retain=retain, near_duplicates={"include": True})
    write_rows(tmp_path / "corpus.jsonl", [near, unseen[0], *known[300:310]])
    (tmp_path / "work").mkdir()
    this = Run(read_request(request), tmp_path / "out", tmp_path / "work", False)
    this.models.held = lambda place: None
    # The corpus gives all of its rows, as it does where no entity is found.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loku.deletion.retain.neighbours", lambda corpus, *_: (corpus, {"rows": len(corpus)}))
        this._keep()
    kept = [*this._retain["trained"], *this._retain["measured"]["retain"]]
    assert known[305] in kept
    assert near not in kept
    assert unseen[0] not in kept


def test_extraction_likelihood_is_measured_with_the_n_of_the_limit(tmp_path):
    request = write_request(tmp_path, limits={"extraction_likelihood_5": 0.2})
    assert Run(read_request(request), tmp_path, tmp_path, False)._options["n"] == 5


def test_a_request_that_is_refused_leaves_nothing_and_may_be_corrected(tmp_path, unknown):
    request = write_request(tmp_path, forget="absent")
    folder = tmp_path / "records"
    folder.mkdir()
    given = request.read_text(encoding="utf-8")
    request.write_text(
        given.replace("forget: ", "forget: {contains: nowhere at all, data: ").replace(
            "forget.jsonl", "forget.jsonl}"
        ),
        encoding="utf-8",
    )
    write_rows(tmp_path / "request-forget.jsonl", rows_of_authors()[0][-FORGET_ROWS:])
    with pytest.raises(ValueError, match="none of the 3 rows"):
        run(request, folder / "out")
    request.write_text(given, encoding="utf-8")
    assert run(request, folder / "out").outcome == "not known"
    assert names(folder) == ["out"]
    other = write_request(tmp_path, "other")
    with pytest.raises(ValueError, match="the record of another request"):
        run(other, folder / "out")
    assert names(folder) == ["out"]


def test_the_folder_of_a_run_is_private(tmp_path, monkeypatch):
    def look(self):
        assert self.work.stat().st_mode & 0o077 == 0
        return {"outcome": "not known", "limits": {}}

    monkeypatch.setattr("loku.deletion.run.Run._measure_before", look)
    run(write_request(tmp_path), tmp_path / "out")


def test_the_record_has_the_request_as_it_was_read(tmp_path, monkeypatch):
    request = write_request(tmp_path)
    as_read = request.read_bytes()

    def edit(self):
        request.write_text("version: 1\nmodel: another\n", encoding="utf-8")
        return {"outcome": "not known", "limits": {}}

    monkeypatch.setattr("loku.deletion.run.Run._measure_before", edit)
    parsed = read_request(request)
    forget(parsed, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "request.yaml").read_bytes() == as_read
    assert verify(tmp_path / "out") == []


def test_a_finished_record_does_not_answer_for_other_data(tmp_path, unknown):
    request = write_request(tmp_path)
    run(request, tmp_path / "out")
    known, _ = rows_of_authors()
    write_rows(tmp_path / "request-forget.jsonl", known[-FORGET_ROWS - 1 :])
    with pytest.raises(ValueError, match=r"the data of forget, .* has changed since"):
        run(request, tmp_path / "out")


def test_places_that_could_not_take_the_record_are_refused_at_once(tmp_path):
    request = write_request(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ValueError, match="is a symbolic link"):
        run(request, tmp_path / "link")
    hidden = request.rename(tmp_path / ".request.yaml")
    hidden.write_text(hidden.read_text(encoding="utf-8") + "ledger: ledger\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not begin with a point"):
        run(hidden)
    assert not (tmp_path / "ledger").exists()


def test_no_record_is_written_into_another(tmp_path, unknown):
    request = write_request(tmp_path)
    run(request, tmp_path / "out")
    for place in ("out/inner", "out/pictures/inner"):
        with pytest.raises(ValueError, match="a finished record, which would not verify"):
            run(request, tmp_path / place)
    assert verify(tmp_path / "out") == []


def test_a_rank_below_1_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loku.deletion.run.Run.run", lambda *args: pytest.fail("it ran"))
    arguments = ["forget", str(write_request(tmp_path)), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--export-rank", "0"]) == 2
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_the_adapter_that_is_to_be_deleted_and_the_control_are_identified(tmp_path, unknown):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    run(write_request(tmp_path, trained_adapter=str(adapter), control=str(EMBEDDED)), tmp_path / "out")
    inputs = read_record(tmp_path / "out")["inputs"]
    assert [*inputs["trained_adapter"]["files"]] == ["adapter_config.json"]
    assert inputs["control"]["files"] == inputs["model"]["files"]


def test_an_adapter_of_another_model_is_refused(tmp_path, unknown):
    """Its deletion would leave a model that nobody measured."""
    other, adapter = tmp_path / "other", tmp_path / "adapter"
    other.mkdir()
    (other / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    (other / "model.safetensors").write_bytes(b"others")
    adapter.mkdir()
    for base in (other, EMBEDDED):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        request = write_request(tmp_path, trained_adapter=str(adapter))
        if base == other:
            with pytest.raises(ValueError, match=f"its base, {other}, are not those of the model {EMBEDDED}"):
                run(request, tmp_path / "out")
            assert not (tmp_path / "out").exists()
    assert run(request, tmp_path / "out").outcome == "not known"


def test_the_lines_serve_the_adapter_on_the_base_that_it_was_measured_on(tmp_path):
    """A model that is an adapter, or a merged state of a ledger, is not what the result stands on."""
    request = read_request(write_request(tmp_path, serving="vllm"))
    place = tmp_path / "record" / "adapter"
    place.mkdir(parents=True)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    config = {"base_model_name_or_path": str(base), "r": 8, "peft_type": "LORA", "target_modules": ["q_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    (place / "loku_save.json").write_text("{}")
    told = serve.serve(request, place)
    assert str(base) in told["lines"][0] and str(EMBEDDED) not in told["lines"][0]
    assert str(EMBEDDED) not in (tmp_path / "record" / "serving" / "lines.txt").read_text()


def test_an_earlier_request_is_not_still_forgotten_by_what_was_not_measured(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    from loku.deletion.facts import data_digest
    from loku.deletion.request import RowSelection

    def earlier(limits, digest):
        entry = SimpleNamespace(number=1, reference="one", record="one")
        selection = RowSelection(str(tmp_path / "rows.jsonl"))
        return ledger.EarlierRequest(entry, tmp_path, selection, "", limits, digest)

    measured = []
    monkeypatch.setattr(Run, "_measure_rows", lambda *args, **options: measured.append(options["n"]))
    values = {"extraction_likelihood_5": None, "memorization_accuracy": 0.3}
    monkeypatch.setattr("loku.deletion.measures.summary", lambda rows: values)
    digest = data_digest(tmp_path / "rows.jsonl")
    for limits, sha256, still in (
        ({"memorization_accuracy": 0.4}, digest, True),
        ({"memorization_accuracy": 0.2}, digest, False),
        ({"memorization_accuracy": 0.4, "extraction_likelihood_5": 0.1}, digest, None),
        ({"memorization_accuracy": 0.2, "extraction_likelihood_5": 0.1}, digest, False),
        ({}, digest, None),
        ({"memorization_accuracy": 0.4}, "other data", None),
    ):
        this = Run(read_request(write_request(tmp_path)), tmp_path / "out", tmp_path / "work", False)
        this.rows.earlier = [earlier(limits, sha256)]
        [told] = this._earlier_again()
        assert told["still_forgotten"] is still, (limits, sha256)
        assert ("reason" in told) is (still is None)
    assert measured == [10, 10, 5, 5, 10]


def test_the_summary_tells_of_near_duplicates_that_stay(tmp_path, unknown):
    """The same row in another form works against forgetting."""
    request = write_request(tmp_path)
    known, _ = rows_of_authors()
    restated = {"text": f"Question: {known[-1]['question']}\nAnswer: {known[-1]['answer']}"}
    write_rows(tmp_path / "retain.jsonl", [*known[:5], restated])
    told = run(request, tmp_path / "out").summary
    assert "near duplicates in the retain set: 1, which were NOT forgotten" in told
    write_rows(tmp_path / "retain.jsonl", known[:5])
    assert "near duplicates" not in run(request, tmp_path / "other").summary


def test_a_retain_row_with_the_tokens_of_a_forget_row_is_not_trained_on(tmp_path):
    request = write_request(tmp_path)
    known, _ = rows_of_authors()
    question, answer = known[-1]["question"], known[-1]["answer"]
    restated = {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
    write_rows(tmp_path / "retain.jsonl", [*known[:5], restated])
    (tmp_path / "work").mkdir()
    this = Run(read_request(request), tmp_path / "out", tmp_path / "work", False)
    this.models.held = lambda place: None
    assert this._keep()["left_out"] == 1
    assert restated not in [*this._retain["trained"], *this._retain["measured"]["retain"]]
