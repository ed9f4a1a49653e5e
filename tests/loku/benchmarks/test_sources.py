"""Data of a benchmark by the names of the hub: the files of a folder that are taken, and what is said."""

import json

import pytest

from loku.benchmarks.sources import Source, check_columns, texts_of

ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


def lines(file, rows=ROWS):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "forget01.json",  # as in TOFU's repository
        "forget01.jsonl",
        "TOFU/forget01.json",
        "forget01/train.jsonl",
        "TOFU/data/forget01/train.jsonl",
        "forget01/train-00000-of-00001.jsonl",
    ],
)
def test_a_file_is_found_by_the_names_of_config_and_split(tmp_path, name):
    lines(tmp_path / name)
    assert Source(tmp_path).rows("locuslab/TOFU", "forget01") == ROWS


def test_the_folder_of_the_repository_goes_first(tmp_path):
    lines(tmp_path / "TOFU" / "forget01.json")
    lines(tmp_path / "forget01.json", ROWS[:1])
    assert Source(tmp_path).rows("locuslab/TOFU", "forget01") == ROWS


def test_shards_are_joined_in_their_order(tmp_path):
    for number in range(2):
        lines(tmp_path / "knowmem" / f"forget_qa-0000{number}-of-00002.jsonl", ROWS[number : number + 1])
    lines(tmp_path / "knowmem" / "forget_qa_icl-00000-of-00001.jsonl", [{"other": 1}])
    assert Source(tmp_path).rows("muse-bench/MUSE-News", "knowmem", "forget_qa") == ROWS


def test_parquet_and_saved_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    (tmp_path / "MUSE-News" / "knowmem").mkdir(parents=True)
    data.to_parquet(str(tmp_path / "MUSE-News" / "knowmem" / "forget_qa-00000-of-00001.parquet"))
    data.save_to_disk(str(tmp_path / "MUSE-News" / "knowmem" / "retain_qa"))
    source = Source(tmp_path)
    for split in ("forget_qa", "retain_qa"):
        assert source.rows("muse-bench/MUSE-News", "knowmem", split) == ROWS


def test_a_file_named_as_the_config_is_no_named_split(tmp_path):
    lines(tmp_path / "knowmem.json")
    with pytest.raises(ValueError, match="has no set 'knowmem' \\(split 'forget_qa'\\)"):
        Source(tmp_path).rows("muse-bench/MUSE-News", "knowmem", "forget_qa")


def test_the_head_of_the_readme_names_files(tmp_path):
    lines(tmp_path / "RWKU" / "All" / "forget_mia.json")
    lines(tmp_path / "RWKU" / "All" / "intro.json", [{"target": "x"}])
    head = """---
license: cc-by-4.0
configs:
- config_name: mia_forget
  data_files:
  - split: test
    path: [All/forget_mia.json]
- config_name: forget_target
  data_files: All/intro.json
---
# RWKU
"""
    (tmp_path / "RWKU" / "README.md").write_text(head, encoding="utf-8")
    source = Source(tmp_path)
    assert source.rows("jinzhuoran/RWKU", "mia_forget", "test") == ROWS
    assert source.rows("jinzhuoran/RWKU", "forget_target") == [{"target": "x"}]
    for config, split in (("mia_forget", "train"), ("mia_retain", "test")):
        with pytest.raises(ValueError, match="has no set"):
            source.rows("jinzhuoran/RWKU", config, split)
    (tmp_path / "RWKU" / "README.md").write_text("---\nconfigs: [1]\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the head of .*README.md is not that of a data set"):
        Source(tmp_path).rows("jinzhuoran/RWKU", "mia_forget", "test")


def test_a_missing_set_says_what_is_downloaded_to_where(tmp_path):
    with pytest.raises(ValueError) as caught:
        Source(tmp_path).rows("locuslab/TOFU", "forget05")
    message = str(caught.value)
    assert "has no set 'forget05'" in message and "forget05.jsonl" in message
    download = f"hf download locuslab/TOFU --repo-type dataset --local-dir {tmp_path}/TOFU"
    assert download in message and f"--data {tmp_path}" in message
    with pytest.raises(ValueError, match="is not a directory"):
        Source(tmp_path / "absent")


def test_the_hub_is_asked_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, *, split, trust_remote_code):
        asked.append((name, config, split, trust_remote_code))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert Source().rows("locuslab/TOFU", "forget01_perturbed") == ROWS
    Source().rows("muse-bench/MUSE-News", "knowmem", "forget_qa")
    Source().rows("cais/wmdp-bio-forget-corpus", None)
    assert asked == [
        ("locuslab/TOFU", "forget01_perturbed", "train", False),
        ("muse-bench/MUSE-News", "knowmem", "forget_qa", False),
        ("cais/wmdp-bio-forget-corpus", None, "train", False),
    ]


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'locuslab/TOFU' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError) as caught:
        Source().rows("locuslab/TOFU", "forget01")
    message = str(caught.value)
    assert "ConnectionError: Couldn't reach" in message
    assert (
        "hf download locuslab/TOFU --repo-type dataset --local-dir FOLDER/TOFU; then --data FOLDER" in message
    )


def test_a_set_of_several_splits_is_read_once(tmp_path):
    lines(tmp_path / "retain_perturbed.json")
    source = Source(tmp_path)
    first = source.rows("locuslab/TOFU", "retain_perturbed")
    (tmp_path / "retain_perturbed.json").unlink()
    assert source.rows("locuslab/TOFU", "retain_perturbed") is first


def test_columns_and_texts_are_checked():
    check_columns(ROWS, ("question", "answer"), "forget")
    for rows, message in (
        ([], "the set forget is empty"),
        (
            [*ROWS, {"question": "a", "answer": None}],
            "row 2 of the set forget has no 'question' and 'answer'",
        ),
        (["text"], "row 0 of the set forget has no 'question' and 'answer'; it has str"),
    ):
        with pytest.raises(ValueError, match=message):
            check_columns(rows, ("question", "answer"), "forget")
    assert texts_of(["a", {"text": "b"}], "raw") == ["a", "b"]
    with pytest.raises(ValueError, match="row 1 of the set raw is no text"):
        texts_of(["a", {"title": "b"}], "raw")
    with pytest.raises(ValueError, match="the set raw is empty"):
        texts_of([], "raw")
