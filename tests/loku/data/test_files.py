"""Rows are read from files of each format, from folders and from the hub; what is not one set is refused."""

import gzip
import json
import sys
from types import ModuleType

import pytest
from character_tokenizer import PLAIN_CHAT, character_tokenizer

from loku.data import RowError, TokenLimits, load_refusals, row_places, tokenize_dataset
from loku.data.files import place_of_row, read_rows


def write(path, text):
    path.write_bytes(text.encode("utf-8"))  # no translation of line ends
    return path


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that must not be asked."""
    hub = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", hub)  # it lacks load_dataset, so that a try fails


def test_json(tmp_path):
    lines = tmp_path / "rows.json"  # TOFU's files have this form
    lines.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert read_rows(lines) == [{"text": "a\u2028b"}, {"text": "c"}]
    assert place_of_row(lines, 1) == f"{lines}, line 3"
    lines.write_text('[{"text": "a"},\n {"text": "b"}]', encoding="utf-8")
    assert read_rows(str(lines)) == [{"text": "a"}, {"text": "b"}]
    assert place_of_row(lines, 1) == str(lines)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is not JSON"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson", "JSONL", "Json"])
def test_suffixes_of_json(tmp_path, suffix, no_hub):
    file = write(tmp_path / f"rows.{suffix}", '\ufeff{"text": "a"}\r\n{"text": "b\u0085c"}\r\n')
    assert read_rows(file) == read_rows(str(file)) == [{"text": "a"}, {"text": "b\u0085c"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a", "text": "b"}', "line 1 is not JSON: the key 'text' is there twice"),
        ('{"text": "a"}\n{"text": NaN}', "line 2 is not JSON: NaN is no JSON value; a missing value is null"),
        ('[{"text": Infinity}]', "not a JSON list: Infinity is no JSON value"),
        ('[{"text": "a", "text": "b"}]', "not a JSON list: the key 'text'"),
        ('{\n "data": [{"text": "a"}]\n}', "one JSON object; write a JSON list of rows"),
        ('{"data": [{"text": "a"}]}', r"one JSON object of columns, \['data'\]; write a JSON list"),
        ('{"question": {"0": "a"}, "answer": {"0": "b"}}', "one JSON object of columns"),  # pandas' to_json
        ('{"question": ["a"], "answer": ["b"]}', "one JSON object of columns"),
        ("", "rows.json is empty"),
        ("\ufeff \n", "rows.json is empty"),
    ],
)
def test_json_that_is_not_rows(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / "rows.json", text))


def test_one_row_of_lists_is_a_row(tmp_path):
    for row in (
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
    ):
        assert read_rows(write(tmp_path / "rows.jsonl", json.dumps(row))) == [row]


def test_lines_of_text(tmp_path):
    """Only the ends of lines that files have are ends: not those that ``str.splitlines`` takes for one."""
    inside = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"
    file = write(tmp_path / "rows.txt", f"\ufeffone\r\n \r\n{inside}\rtwo\n")
    assert read_rows(file) == ["one", inside, "two"]
    assert [place_of_row(file, i) for i in range(3)] == [f"{file}, line {n}" for n in (1, 3, 4)]
    with pytest.raises(ValueError, match="not text in UTF-8"):
        (tmp_path / "rows.txt").write_bytes("é".encode("latin-1"))
        read_rows(tmp_path / "rows.txt")
    with pytest.raises(ValueError, match="NUL"):
        (tmp_path / "rows.txt").write_bytes("one".encode("utf-16-le"))
        read_rows(tmp_path / "rows.txt")


GOOD = '{"text": "ab"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not JSON: .* nested too deeply"),
        ('{"x": ' * 100_000 + "1" + "}" * 100_000, "is not JSON: .* nested too deeply"),
        (f'{{"text": "a", "x": {"9" * 5000}}}', r"is not JSON: an integer has more than \d+ digits"),
        ('{"text": "a", "x": -Infinity}', "is not JSON: -Infinity is no JSON value"),
        ('{"text": "a\0b"}', "is not text in UTF-8: it has NUL characters"),
        ('{"text": "a', "is not JSON: Unterminated string"),
        ('["ab"]', ": row 1 of the forget set: it is a list; a row is"),
        ("3", ": row 1 of the forget set: it is a int"),
        ("null", ": row 1 of the forget set: it is a missing value"),
        ('{"text": "ab\\ud800c"}', r": row 1 of the forget set: its text has '\\ud800' after 2 characters"),
        ('{"question": "a\\udfff", "answer": "b"}', r": row 1 of the forget set: its text has '\\udfff'"),
        ('{"prompt": "a", "completion": "b\\ud83d"}', r": row 1 of the forget set: its text has '\\ud83d'"),
        (
            f'{{"input_ids": [1, {2**63}]}}',
            ": row 1 of the forget set: 'input_ids' has an integer of more than 64",
        ),
        (
            f'{{"input_ids": [1, {"9" * 4000}]}}',
            ": row 1 .*: 'input_ids' has an integer of more than 64 bits",
        ),
        (
            f'{{"input_ids": [1, -{"9" * 4000}]}}',
            ": row 1 .*: 'input_ids' has an integer of more than 64 bits",
        ),
        ('{"input_ids": [1, 2], "labels": [1, 1e400]}', ": row 1 .*: 'labels' must be a .* it has a float"),
        (
            '{"input_ids": [1, true]}',
            ": row 1 .*: 'input_ids' must be a flat list of integers.* it has a bool",
        ),
        ('{"input_ids": [1, -1]}', ": row 1 of the forget set: 'input_ids' has -1"),
        ('{"input_ids": [1, 99]}', ": row 1 of the forget set: it has the token id 99, and the model's"),
        (
            f'{{"input_ids": [1, 2], "seq_lengths": [{10**18}]}}',
            f": row 1 .*2 input_ids but 'seq_lengths' has {10**18}",
        ),
        ('{"input_ids": [1, 2], "seq_lengths": [-1, 2]}', ": row 1 .*'seq_lengths' has -1; .* 0 or greater"),
        (f'{{"text": "{"a " * 100_000}"}}', ": row 1 of the forget set: .*the model's context has 64"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    """Each of these ended a run with another error, ate the memory, or named no file and no line."""
    file = write(tmp_path / "rows.jsonl", f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=f"^{file}, line 3 ?{message}"), row_places({"forget": file}):
        limits = TokenLimits(context=64, inputs=99, outputs=99)
        tokenize_dataset(read_rows(file), character_tokenizer(), limits=limits)


def test_deep_values_that_json_can_read(tmp_path):
    """Python reads them, and it may fail later, where they are looked through."""
    tools = ("[" * 900, "]" * 900)
    chat = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]'
    tokenizer = character_tokenizer(chat_template=PLAIN_CHAT)
    for deep in (f'[{{"x": {tools[0]}{tools[1]}}}]', json.dumps("[" * 100_000 + "]" * 100_000)):
        file = write(tmp_path / "rows.jsonl", f'{GOOD}{{"messages": {chat}, "tools": {deep}}}\n')
        with pytest.raises(RowError, match=f"^{file}, line 2: row 1 of the forget set: "):
            with row_places({"forget": file}):
                tokenize_dataset(read_rows(file), tokenizer)


def test_bytes_that_are_no_text_are_named(tmp_path):
    file = tmp_path / "rows.txt"
    for data, message in [
        (b"one\r\ntwo\rth\xffree\n", "line 3 is not text in UTF-8: .*0xff in position 11"),
        ("one\ntwo".encode("utf-16"), "line 1 is not text in UTF-8"),
        (b"one\ntw\0o", "line 2 is not text in UTF-8: it has NUL"),
    ]:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{file}, {message}"):
            read_rows(file)
        with pytest.raises(ValueError, match=f"^{file}, {message}"):
            load_refusals(file)
    with pytest.raises(ValueError, match=r"the refusal 'I \\ud800' cannot be used: its text has '\\ud800'"):
        load_refusals(["No.", "I \ud800"])


CSV = "\r\n".join(
    [
        "\ufeffquestion,answer,paraphrased_answer",
        "How many?,42,",
        "",
        '"Which, if any?","NA\nnull",0042.0',
        'Last?,"She said ""no""",nan\r\n',
    ]
)


@pytest.mark.parametrize("name", ["rows.csv", "rows.CSV", "rows.csv.gz", "rows.tsv"])
def test_tables_keep_the_text_of_each_cell(tmp_path, name, no_hub):
    """42 is no number, NA and nan are no missing values: they are what stands in the file."""
    text = CSV.replace(",", "\t").replace("Which\t if", "Which\tif") if "tsv" in name else CSV
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    which = "Which\tif any?" if "tsv" in name else "Which, if any?"
    assert read_rows(file) == [
        {"question": "How many?", "answer": "42", "paraphrased_answer": None},
        {"question": which, "answer": "NA\nnull", "paraphrased_answer": "0042.0"},
        {"question": "Last?", "answer": 'She said "no"', "paraphrased_answer": "nan"},
    ]
    assert [place_of_row(file, i) for i in range(3)] == [f"{file}, line {n}" for n in (2, 4, 6)]


def test_a_long_cell(tmp_path):
    long = "word " * 100_000
    assert read_rows(write(tmp_path / "rows.csv", f"text\n{long}\n")) == [{"text": long}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\na,b\na,b,c\n", "line 3 has 3 cells, and the header has 2"),
        ("question,answer\na\n", "line 2 has 1 cells"),
        ('question,answer\n"a\nb",c\n"d,e\n', "line 4: unexpected end of data"),
        ('question,answer\n"a"b,c\n', "line 2: ',' expected"),
        ("question;answer\na;b\n", "columns are apart by ';'"),
        ("text,text\na,b\n", "'text' is there twice"),
        ("question,answer\n", "a header and no rows"),
        ("", "rows.csv is empty"),
    ],
)
def test_tables_that_are_broken(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / "rows.csv", text))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.txt.GZ", "rows.ndjson.gz", "rows.json.gz"])
def test_compressed_files(tmp_path, name, no_hub):
    text = "a\nb\n" if "txt" in name else '{"text": "a"}\n{"text": "b"}\n'
    rows = ["a", "b"] if "txt" in name else [{"text": "a"}, {"text": "b"}]
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()))
    assert read_rows(file) == rows
    assert place_of_row(file, 1) == f"{file}, line 2"
    file.write_bytes(file.read_bytes()[:-9])  # a copy that was cut off
    with pytest.raises(ValueError, match=f"{name} is not a whole gzip file"):
        read_rows(file)
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{name} is not a whole gzip file"):
        read_rows(file)


def test_a_small_file_that_would_fill_the_memory(tmp_path, monkeypatch):
    file = tmp_path / "rows.txt.gz"
    file.write_bytes(gzip.compress(b"a" * 2**20))
    assert read_rows(file) == ["a" * 2**20]  # a MiB is no harm
    monkeypatch.setattr("loku.data.files.LARGE", 2**10)
    with pytest.raises(ValueError, match=rf"^{file} has more than \d+ bytes when it is decompressed"):
        read_rows(file)


ROWS = [{"question": "a", "answer": "42", "perturbed_answer": ["b", "c"]}]


@pytest.fixture
def parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(name, rows=ROWS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / name)
        return tmp_path / name

    return write


def test_parquet(parquet, tmp_path, monkeypatch):
    for name in ("rows.parquet", "rows.PARQUET"):
        assert read_rows(parquet(name)) == ROWS
    assert place_of_row(tmp_path / "rows.parquet", 0) == str(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"broken.parquet is not a Parquet file"):
        read_rows(write(tmp_path / "broken.parquet", "no"))
    whole = parquet("rows.parquet", [{"text": "a word that is seldom"}] * 9).read_bytes()
    at = whole.index(b"seldom")
    changed = (
        whole[:-9],
        whole[: at - 20] + b"\xff" * 9 + whole[at - 11 :],
        whole[:at] + b"\xff" + whole[at + 1 :],
    )
    for data in changed:
        (tmp_path / "broken.parquet").write_bytes(data)
        with pytest.raises(ValueError, match=r"broken.parquet is not a Parquet file"):
            read_rows(tmp_path / "broken.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_rows(tmp_path / "rows.parquet")


def test_folder_of_shards(parquet, tmp_path, no_hub):
    folder = parquet("set/train-00001-of-00002.parquet", [{"text": "c"}]).parent
    parquet("set/train-00000-of-00002.parquet", [{"text": "a"}, {"text": "b"}])
    (folder / "README.md").write_text("about")
    assert [row["text"] for row in read_rows(folder)] == ["a", "b", "c"]
    assert place_of_row(folder, 2) == str(folder / "train-00001-of-00002.parquet")
    parquet("set/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"several data sets: test-00000-of-00001.parquet, train-"):
        read_rows(folder)
    texts = tmp_path / "texts"
    texts.mkdir()
    with pytest.raises(ValueError, match="folder without data"):
        read_rows(str(texts))
    for number, text in enumerate(["a\n", "b\n\nc\n"]):
        (texts / f"part-{number}.txt").write_text(text)
    assert read_rows(texts) == ["a", "b", "c"]
    assert place_of_row(texts, 2) == f"{texts / 'part-1.txt'}, line 3"


def test_saved_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    monkeypatch.setattr(datasets, "load_dataset", None)  # the hub is not asked
    for place in ("one", "both/train", "both/test"):
        assert list(read_rows(tmp_path / place)) == ROWS
    assert place_of_row(tmp_path / "one", 0) == str(tmp_path / "one")
    with pytest.raises(ValueError, match=r"has the splits train, test; name the folder of one.*both/train"):
        read_rows(tmp_path / "both")
    with pytest.raises(FileNotFoundError, match="it takes no CONFIG or SPLIT"):
        read_rows(f"{tmp_path / 'both'}:train")


def test_an_existing_file_never_goes_to_the_hub(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "rows.xlsx", "rows.parquet.gz"):
        (tmp_path / name).write_text("a\n")
        with pytest.raises(ValueError, match=f"{name} has no known format; .*[.]csv"):
            read_rows(name)


@pytest.mark.parametrize(
    "name", ["none.txt", "none.CSV.gz", "none.xlsx", "./none", "/none/none", "a/b/c", "~/none", "data/none"]
)
def test_a_path_to_nothing_never_goes_to_the_hub(tmp_path, monkeypatch, no_hub, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match=f"there is no file {name}"):
        read_rows(name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_rows(tmp_path / "some" / "set")


def test_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locuslab").mkdir()
    hub = ModuleType("datasets")
    no_code = {"trust_remote_code": False}  # datasets 3 would ask
    hub.load_dataset = lambda name, config, split, **more: more == no_code and (name, config, split)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_rows("locuslab/TOFU:forget10_perturbed") == ("locuslab/TOFU", "forget10_perturbed", "train")
    assert read_rows("wikitext:wikitext-2-v1:test") == ("wikitext", "wikitext-2-v1", "test")
    assert read_rows("some/set") == ("some/set", None, "train")
    assert read_rows("some/set-2.5") == ("some/set-2.5", None, "train")
    assert read_rows("locuslab/TOFU:") == ("locuslab/TOFU", None, "train")  # as the error of a path says
    with pytest.raises(FileNotFoundError, match="for a data set on the hub write locuslab/TOFU:"):
        read_rows("locuslab/TOFU")
    with pytest.raises(ValueError, match="CONFIG"):
        read_rows("a:b:c:d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_rows("some/set")
