"""``loku forget`` from a request to a record: outcomes, kills, ledgers and refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deletion_requests import FORGET_ROWS, rows_of_authors, write_request, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loku.cli import main
from loku.data import collate, tokenize_dataset
from loku.deletion.ledger import read_ledger, verify_ledger
from loku.deletion.procedure import forget
from loku.deletion.record import read_record, without_times
from loku.deletion.request import read_request
from loku.deletion.seal import verify
from loku.demo import EMBEDDED

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = (
    *("rows", "measures_before", "retain", "utility_before", "probe_before", "unlearning", "measures_after"),
    *("probe_after", "serving"),
)


def run(request, output=None):
    return forget(read_request(request), output, progress=False)


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory):
    """A folder with a request, and its record in ``record``."""
    folder = tmp_path_factory.mktemp("request")
    return folder, run(write_request(folder), folder / "record")


def test_a_request_is_forgotten_and_its_record_verifies(forgotten):
    folder, result = forgotten
    assert (result.outcome, result.done) == ("forgotten", True)
    assert f"to serve it, in {folder / 'record'}:" in result.summary  # the lines have paths from there
    assert verify(folder / "record") == []
    record = read_record(folder / "record")
    assert all(limit["met"] and limit["before"] > limit["limit"] for limit in record["limits"].values())
    assert record["training"]["utility"]["kept"] >= 0.5
    assert sorted(path.name for path in (folder / "record").iterdir()) == [
        *("SHA256SUMS", "adapter", "pictures", "record.html", "record.json", "record.md", "request.yaml"),
        "serving",
    ]
    assert not list(folder.glob(".*"))


def test_what_is_served_is_what_was_measured(forgotten):
    folder, result = forgotten
    from loku.deletion.measures import measure_sets

    known, _ = rows_of_authors()
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype="auto")
    served = PeftModel.from_pretrained(base, result.served)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    measured = measure_sets(served, tokenizer, {"forget": known[-FORGET_ROWS:]})["forget"]
    assert measured == pytest.approx(read_record(folder / "record")["measures"]["after"]["forget"], rel=1e-5)


def test_no_file_of_a_record_holds_the_text_of_a_row(forgotten):
    folder, _ = forgotten
    known, unseen = rows_of_authors()
    texts = [text for row in (*known[-FORGET_ROWS:], *unseen[:24]) for text in row.values()]
    for file in (folder / "record").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(text.encode() in content for text in texts), file


def test_a_changed_byte_in_any_file_is_found(forgotten):
    folder, _ = forgotten
    for file in sorted((folder / "record").rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert verify(folder / "record") != [], file
            file.write_bytes(content)
    assert verify(folder / "record") == []


def test_a_finished_request_is_not_done_again(forgotten, monkeypatch):
    folder, result = forgotten
    monkeypatch.setattr("loku.deletion.procedure.Run.run", lambda *args: pytest.fail("it ran again"))
    assert run(folder / "request.yaml", folder / "record") == result


def test_a_run_that_is_killed_at_any_stage_goes_on_to_the_same_record(forgotten, tmp_path):
    folder, _ = forgotten
    killed = Path(__file__).parents[2] / "helpers" / "killed_requests.py"
    command = [sys.executable, killed, folder / "request.yaml", tmp_path, *STAGES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends.pop("left") is False, done.stderr
    assert ends == {**dict.fromkeys((*STAGES, "seal", "place", "clean"), -9), "ledger": 0, "last": 0}, (
        done.stderr
    )
    unkilled, resumed = (
        without_times(read_record(place)) for place in (folder / "record", tmp_path / "killed")
    )
    assert resumed == unkilled
    weights = [
        (place / "adapter" / "adapter_model.safetensors").read_bytes()
        for place in (folder / "record", tmp_path / "killed")
    ]
    assert weights[0] == weights[1]


def test_rows_that_the_model_does_not_know_are_said_to_be_unknown(tmp_path, capsys):
    _, unseen = rows_of_authors()
    request = write_request(tmp_path, forget=unseen[24:30])
    assert main(["forget", str(request), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert "nothing to delete" in capsys.readouterr().out
    record = read_record(tmp_path / "out")
    assert record["outcome"] == "not known"
    assert "training" not in record
    assert not (tmp_path / "out" / "adapter").exists()
    assert verify(tmp_path / "out") == []


def test_a_model_that_loses_its_utility_is_undone(tmp_path, capsys):
    training = {"max_steps": 20, "learning_rate": 0.5, "fisher_samples": 8, "target_modules": "qv"}
    request = write_request(tmp_path, training=training, utility_floor=0.99)
    assert main(["forget", str(request), "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert "NOTHING was changed" in capsys.readouterr().out
    assert read_record(tmp_path / "out")["outcome"] == "undone"
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_adapter_that_alone_knows_the_rows_is_to_be_deleted(tmp_path):
    _, unseen = rows_of_authors()
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype="float32")
    adapter = _adapter_that_learns(base, tmp_path / "adapter", unseen[-FORGET_ROWS:])
    request = write_request(tmp_path, forget=unseen[-FORGET_ROWS:], trained_adapter=str(adapter))
    result = run(request, tmp_path / "out")
    assert (result.outcome, result.served) == ("delete the adapter", None)
    assert "delete the adapter" in result.summary
    record = read_record(tmp_path / "out")
    assert record["measures"]["before"]["forget"]["extracted"] == 0


def _adapter_that_learns(base, place, rows):
    torch.manual_seed(0)
    peft_model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    tokens = tokenize_dataset(rows, AutoTokenizer.from_pretrained(EMBEDDED))
    batch = collate(tokens, pad_token_id=0)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    for _ in range(60):
        loss = peft_model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft_model.save_pretrained(place)
    return place


def test_near_duplicates_are_listed_and_taken_along(tmp_path):
    known, _ = rows_of_authors()
    near = {**known[-1], "answer": known[-1]["answer"].replace(" the ", " that ", 1) + "!"}
    request = write_request(tmp_path, near_duplicates={"include": True})
    write_rows(tmp_path / "retain.jsonl", [*known[:600:40], near])
    result = run(request, tmp_path / "out")
    record = read_record(tmp_path / "out")
    found = record["rows"]["near_duplicates"]
    assert [one["set"] for one in found["duplicates"]] == ["retain"]
    assert found["forget_rows"] == {"asked": FORGET_ROWS, "with_near_duplicates": FORGET_ROWS + 1}
    assert record["measures"]["before"]["forget"]["rows"] == FORGET_ROWS + 1
    assert result.done


def test_three_requests_of_a_ledger_keep_all_forgotten_or_say_which_came_back(tmp_path):
    known, _ = rows_of_authors()
    for number in range(3):
        end = len(known) - 20 * number
        name = f"request{number}"
        request = write_request(tmp_path, name, known[end - FORGET_ROWS : end], ledger="ledger")
        result = run(request)
        assert result.directory == tmp_path / "ledger" / f"{name}-record"
    entries = read_ledger(tmp_path / "ledger").entries
    assert [entry.reference for entry in entries] == ["request0", "request1", "request2"]
    assert verify_ledger(tmp_path / "ledger") == []
    last = read_record(tmp_path / "ledger" / "request2-record")
    earlier = last["ledger"]["earlier"]
    assert [entry["reference"] for entry in earlier] == ["request0", "request1"]
    for entry in earlier:
        within = all(entry["measures"][name] <= limit for name, limit in entry["limits"].items())
        assert entry["still_forgotten"] is within
        assert (entry["reference"] in result.came_back) is not within
    # The last adapter holds the sum of all three, for the untouched model.
    config = json.loads((tmp_path / "ledger/request2-record/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(EMBEDDED)
    assert config["r"] == 3 * 16


def test_a_folder_with_something_else_is_refused(tmp_path):
    request = write_request(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no finished record"):
        run(request, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_another_request_does_not_go_on_from_a_folder(forgotten, tmp_path):
    folder, _ = forgotten
    request = write_request(tmp_path, "other")
    with pytest.raises(ValueError, match="the record of another request"):
        run(request, folder / "record")


def test_a_run_whose_inputs_have_changed_is_refused(tmp_path, monkeypatch):
    request = write_request(tmp_path)
    monkeypatch.setattr("loku.deletion.run.Run._measure_before", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(request, tmp_path / "out")
    known, _ = rows_of_authors()
    write_rows(tmp_path / "retain.jsonl", known[:600:50])
    with pytest.raises(ValueError, match="since it began data has changed"):
        run(request, tmp_path / "out")


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        run(write_request(tmp_path), tmp_path / "out")
