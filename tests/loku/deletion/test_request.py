"""A request is read as it is written, and each mistake in it is named with its line."""

import dataclasses
import json
import random
import re
from collections import Counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loku.commands.settings import read_fields
from loku.deletion import request as module
from loku.deletion.request import (
    ATTACKS,
    HOLDOUT,
    Request,
    RetainSource,
    RowSelection,
    read_request,
    request_facts,
    write_template,
)
from loku.deletion.template import REQUEST
from loku.demo import EMBEDDED

BASE = "model: owner/name\nforget: forget.txt\nholdout: holdout.txt\n"

EVERY_FIELD = """\
version: 1
reference: "DSR 12"
requester: Jane Doe
model:
  {name: owner/name, revision: v2, tokenizer: ./model,
   arguments: {dtype: bfloat16, a: [1, 2.5, null], b: 1:30}}
trained_adapter: adapter
forget:
  {data: forget.txt, ids: [7, "x", 07], id_column: number, contains: Doe, matches: '\\bDoe\\b',
   columns: [a, b]}
retain:
  data: retain.txt
  contains: keep
  corpus: {data: corpus.txt, matches: a|b}
  neighbours: 12
  sampled: 0
holdout: holdout.txt
control: owner/retrained
limits: {memorization_accuracy: holdout, extraction_likelihood_5: 0.25}
utility_floor: 0.8
minutes: 2.5
near_duplicates: {similarity: 0.9, include: yes}
training: {learning_rate: 1e-3, lora_rank: 4, target_modules: [q_proj, v_proj], init: pissa}
attacks: [quantise, extract]
serving: {target: vllm, rank: 16}
ledger: records
"""
DAMAGE = b"{}[]:,#&*!|>'\"%@`-?~ \n\t\\09.eaE_\xff\xc3\xa9\x00"


def forgetting(rows):
    """The text of a request for other rows."""
    return BASE.replace("forget.txt", rows)


def with_model(model):
    """The text of a request for another model."""
    return BASE.replace("owner/name", model)


@pytest.fixture
def folder(tmp_path):
    """A folder with the data sets of a request, a model and an adapter."""
    for name in ("forget", "retain", "holdout", "corpus"):
        (tmp_path / f"{name}.txt").write_text(f"A text of {name}.\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def read(folder):
    """A function that reads the text, or the bytes, of a request."""

    def read_text(text):
        path = folder / "request.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_request(path)

    return read_text


def test_the_shortest_request_has_the_defaults(read, folder):
    """Every field but the model, the rows and what judges them has a default."""
    request = read(BASE)
    given = {"model": "owner/name", "path": folder / "request.yaml"}
    given |= {name: RowSelection(str(folder / f"{name}.txt")) for name in ("forget", "holdout")}
    assert request == Request(**given)
    assert request.lines == {"model": 1, "forget": 2, "holdout": 3}


def test_every_field_is_read(read, folder):
    request = read(EVERY_FIELD)
    path = str(folder)
    assert request == Request(
        path=folder / "request.yaml",
        reference="DSR 12",
        requester="Jane Doe",
        model="owner/name",
        revision="v2",
        tokenizer=f"{path}/model",
        model_arguments={"dtype": "bfloat16", "a": [1, 2.5, None], "b": "1:30"},
        trained_adapter=f"{path}/adapter",
        forget=RowSelection(f"{path}/forget.txt", ("7", "x", "07"), "number", "Doe", r"\bDoe\b", ("a", "b")),
        retain=RetainSource(
            given=RowSelection(f"{path}/retain.txt", contains="keep"),
            corpus=RowSelection(f"{path}/corpus.txt", matches="a|b"),
            neighbours=12,
            sampled=0,
        ),
        holdout=RowSelection(f"{path}/holdout.txt"),
        control="owner/retrained",
        limits={"memorization_accuracy": HOLDOUT, "extraction_likelihood_5": 0.25},
        utility_floor=0.8,
        minutes=2.5,
        near_duplicate_similarity=0.9,
        include_near_duplicates=True,
        training={
            "learning_rate": 1e-3,
            "lora_rank": 4,
            "target_modules": ["q_proj", "v_proj"],
            "init": "pissa",
        },
        attacks=("extract", "quantise"),
        target="vllm",
        rank=16,
        ledger=f"{path}/records",
    )
    assert request.lines["retain.corpus.matches"] == 14


@pytest.mark.parametrize("written", ["0042", "no", "2026-01-31", "1e3", "0x10", "1_000", "Null", "12:30"])
def test_a_text_is_taken_as_it_is_written(read, written):
    """YAML would read each of them as something else."""
    request = read(BASE + f"reference: {written}\nrequester: {written}\n")
    assert request.reference == request.requester == written
    quoted = f"'{written}'" if written == "Null" else written  # which could mean no condition
    selected = read(forgetting(f"{{data: forget.txt, contains: {quoted}, ids: [{written}]}}"))
    assert selected.forget.contains == written
    assert selected.forget.ids == (written,)


# Noncharacters are no characters of YAML, and it folds ends of lines.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc", "Cn", "Zl", "Zp"])


@settings(max_examples=50, deadline=None)
@given(text=st.text(CHARACTERS, min_size=1).filter(str.strip))
def test_a_text_in_quotes_comes_back(tmp_path_factory, text):
    """Texts of all languages reach the request unchanged."""
    folder = tmp_path_factory.mktemp("request")
    for name in ("forget", "holdout"):
        (folder / f"{name}.txt").write_text("A text.")
    single = text.replace("'", "''")
    path = folder / "request.yaml"
    path.write_text(
        BASE + f"requester: '{single}'\nreference: {json.dumps(text, ensure_ascii=False)}\n", encoding="utf-8"
    )
    request = read_request(path)
    assert request.reference == request.requester == text


def test_a_mark_of_utf8_and_line_ends_of_windows_are_accepted(read):
    assert read(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode()).model == "owner/name"


def test_a_null_is_the_default_where_the_default_is_none(read):
    request = read(BASE + "minutes: null\ncontrol: ~\nledger: null\ntrained_adapter: null\n")
    assert request == read(BASE)


def test_hub_names_stay_and_paths_become_absolute(read, folder, monkeypatch):
    (folder / "owner").mkdir()
    with pytest.raises(ValueError, match=r"line 1: model: there is no folder .*/owner/name; a relative path"):
        read(BASE)
    (folder / "owner" / "name").mkdir()
    assert read(BASE).model == str(folder / "owner" / "name")
    request = read("model: gpt2\nforget: locuslab/TOFU:forget01\nholdout: ~/holdout.txt\n".replace("~", "."))
    assert request.model == "gpt2"
    assert request.forget.data == "locuslab/TOFU:forget01"
    assert request.holdout.data == str(folder / "holdout.txt")
    monkeypatch.setenv("HOME", str(folder))
    assert read(with_model("~/model")).model == str(folder / "model")


def test_a_name_of_the_current_directory_is_no_name_of_the_hub(read, tmp_path_factory, monkeypatch):
    """It would be read from there, whatever the request meant."""
    other = tmp_path_factory.mktemp("other")
    (other / "gpt2").mkdir()
    monkeypatch.chdir(other)
    with pytest.raises(ValueError, match=r"line 1: model: gpt2 is in the current directory and not in"):
        read(with_model("gpt2"))


MISTAKES = [
    # of the file
    ("", "request.yaml is empty"),
    ("# nothing\n", "request.yaml is empty"),
    ("- a\n", "line 1: the file must have fields"),
    ("words\n", "line 1: the file must have fields"),
    ("forget: forget.txt\n", "request.yaml has no model; `loku forget --init DIR` writes an example"),
    ("model: gpt2\n", "request.yaml has no forget"),
    (BASE + "model: gpt2\n", "line 4: the field 'model' is there twice"),
    (BASE + "retained: a\n", "line 4: there is no field 'retained'; did you mean retain?"),
    (BASE + "zzz: a\n", "line 4: there is no field 'zzz'; the fields are version, reference, "),
    (BASE + "[a]: b\n", "line 4: a field has the name a list"),
    (BASE + "<<: {minutes: 3}\n", "line 4: there is no field '<<'"),
    (BASE + "minutes:\n", "line 4: minutes: has no value; give it one, or take the line out"),
    (BASE + "version: 2\n", "line 4: version: is '2'; this loku reads version 1"),
    (BASE + "version: [1]\n", "line 4: version: is a list; it must be a text"),
    # of YAML
    (BASE + "minutes:\t3\n", "line 4 is not YAML: .*indent with spaces"),
    (BASE + "retain:\n\tdata: a\n", "line 5 is not YAML: .*indent with spaces"),
    (BASE + 'requester: "\\d"\n', "line 4 is not YAML: .*in single quotes"),
    (BASE + "requester: a: b\n", "line 4 is not YAML: .*quote a text with a colon"),
    (BASE + "---\n" + BASE, "line 4 is not YAML: .*one request"),
    (BASE + "limits: {probability: 1\nminutes: 3\n", r"line 5 is not YAML: .*begins in line 4\)"),
    (BASE + "limits: &a {probability: 1}\ntraining: *a\n", "line 5 is not YAML: an alias"),
    (BASE + f"training: {'[' * 40}{']' * 40}\n", "line 4 is not YAML: nested too deeply"),
    (BASE + "requester: !!python/name:os.system x\n", "line 4: requester: has the tag .*without a tag"),
    (BASE + "requester: !!binary aGk=\n", "line 4: requester: has the tag"),
    (b"model: gpt2\nrequester: \xff\n", "line 2 is not text in UTF-8"),
    (BASE.encode("utf-16"), "line 1 is not text in UTF-8"),
    (BASE + "requester: a\0b\n", r"line 4: YAML takes no character U\+0000"),
    (BASE + "requester: " + "a" * 2**20, "has more than 1048576 bytes"),
    # of places
    (with_model("./absent"), "line 1: model: there is no folder .*a relative path begins at"),
    (with_model("forget.txt"), "line 1: model: forget.txt is a file; name the folder"),
    (forgetting("absent.jsonl"), "line 2: forget: there is no file absent.jsonl; a relative"),
    (BASE + "trained_adapter: model\n", "line 4: trained_adapter: the folder .* has no adapter_config.json"),
    (BASE + "trained_adapter: absent\n", "line 4: trained_adapter: there is no folder"),
    (BASE + "control: ./absent\n", "line 4: control: there is no folder"),
    (BASE + "ledger: forget.txt\n", "line 4: ledger: .* is a file; name the folder"),
    (with_model("{revision: a}"), "line 1: model: has no name"),
    (with_model("{name: model, revision: a}"), "line 1: model.revision: a model in a folder"),
    (with_model("{name: gpt2, arguments: [a]}"), "line 1: model.arguments: is a list"),
    (with_model("{name: gpt2, arguments: {token: hf_a}}"), "line 1: model.arguments.token: a secret"),
    (with_model("{name: gpt2, arguments: {a: .nan}}"), "line 1: model.arguments.a: .nan is not finite"),
    (with_model("{name: gpt2, arguments: {a: 1, a: 2}}"), "line 1: .*'a' is there twice"),
    # of selections
    (forgetting("[a]"), "line 2: forget: is a list; it must be a text"),
    (forgetting('" "'), "line 2: forget: is blank"),
    (forgetting("{contains: a}"), "line 2: forget: has no data"),
    (forgetting("{data: forget.txt, contain: a}"), "line 2: .*'contain'; did you mean contains?"),
    (forgetting("{data: forget.txt, ids: 7}"), "line 2: forget.ids: is the text '7'; it must be a list"),
    (forgetting("{data: forget.txt, ids: []}"), "line 2: forget.ids: is an empty list"),
    (forgetting("{data: forget.txt, ids: [7, 7]}"), "line 2: forget.ids: '7' is there twice"),
    (forgetting("{data: forget.txt, ids: [[7]]}"), "line 2: forget.ids: is a list; it must be a text"),
    (forgetting("{data: forget.txt, contains: ''}"), "line 2: forget.contains: is blank"),
    (forgetting("{data: forget.txt, id_column: n}"), "line 2: forget.id_column: there are no ids"),
    (forgetting("{data: forget.txt, columns: [n]}"), "line 2: forget.columns: they are searched by"),
    (forgetting("\n  data: forget.txt\n  matches: '(a'"), r"line 4: forget.matches: '\(a' is no regular"),
    (
        forgetting("{data: forget.txt, contains: null}"),
        "line 2: forget.contains: write 'null' in quotes for the word",
    ),
    (forgetting("{data: forget.txt, matches: ~}"), "line 2: forget.matches: write '~' in quotes"),
    (forgetting("~nobody-here/forget.txt"), "line 2: forget: it can be no path: "),
    (with_model("a" * 5000), "line 1: model: it can be no path: .*too long"),
    # of the retain set
    (BASE + "retain: {contains: a}\n", "line 4: retain.contains: there is no data that it selects from"),
    (BASE + "retain: {neighbours: 3}\n", "line 4: retain.neighbours: they are taken from a corpus"),
    (
        BASE + "retain: {corpus: corpus.txt, neighbours: 0}\n",
        "line 4: retain.neighbours: is 0; it must be at least 1",
    ),
    (BASE + "retain: {sampled: 0}\n", "line 4: retain: there is nothing to keep"),
    (BASE + "retain: {sampled: many}\n", "line 4: retain.sampled: is 'many'; it must be a whole number"),
    (BASE + "retain:\n  corpus:\n    matches: a\n", "line 6: retain.corpus: has no data"),
    # of the judgement
    ("model: gpt2\nforget: forget.txt\n", "line 2: forget: there is no holdout"),
    (
        "model: gpt2\nforget: forget.txt\nlimits: {probability: 0.1, extracted: holdout}\n",
        "line 3: limits: there is no holdout",
    ),
    (
        "model: gpt2\nforget: forget.txt\nlimits: {probability: 0.1}\nattacks: [mia]\n",
        "line 4: attacks: mia compares with the holdout",
    ),
    (BASE + "limits: [a]\n", "line 4: limits: is a list; it must be a mapping"),
    (BASE + "limits: {probabilty: 0}\n", "line 4: limits: there is no field 'probabilty'; did you mean prob"),
    (BASE + "limits: {perplexity: 3}\n", "line 4: limits.perplexity: it grows by forgetting"),
    (BASE + "limits: {probability: 2}\n", "line 4: limits.probability: is 2; it must be >= 0 and <= 1"),
    (
        BASE + "limits: {probability: hold-out}\n",
        "line 4: limits.probability: is 'hold-out'; it must be a number",
    ),
    (
        BASE + "limits: {extraction_likelihood_5: 0, extraction_likelihood_9: 0}\n",
        "line 4: limits: has extraction_likelihood_5 and extraction_likelihood_9",
    ),
    (BASE + "utility_floor: 0\n", "line 4: utility_floor: is 0; it must be > 0 and <= 1"),
    (BASE + "utility_floor: 90%\n", "line 4: utility_floor: is '90%'; it must be a number"),
    (BASE + "minutes: -1\n", "line 4: minutes: is -1; it must be > 0"),
    (BASE + "minutes: 1:30\n", "line 4: minutes: is '1:30'; it must be a number"),
    (BASE + "minutes: .inf\n", "line 4: minutes: is '.inf'; it must be a number"),
    (BASE + "minutes: nan\n", "line 4: minutes: is nan; it must be > 0"),
    (BASE + "near_duplicates: true\n", "line 4: near_duplicates: is the text 'true'; it must be a mapping"),
    (BASE + "near_duplicates: {similarity: 1.5}\n", "line 4: near_duplicates.similarity: is 1.5"),
    (
        BASE + "near_duplicates: {include: maybe}\n",
        "line 4: near_duplicates.include: is 'maybe'; it must be true",
    ),
    # of what is done
    (BASE + "attacks: extract\n", "line 4: attacks: is the text 'extract'; it must be a list"),
    (BASE + "attacks: [extract, quantize]\n", "line 4: attacks: is 'quantize'; .* did you mean quantise?"),
    (BASE + "attacks: [mia, mia]\n", "line 4: attacks: 'mia' is there twice"),
    (BASE + "serving: tgi\n", "line 4: serving: is 'tgi'; it must be one of peft, vllm, gguf, merged"),
    (BASE + "serving: {target: vllm, rank: 0}\n", "line 4: serving.rank: is 0; it must be at least 1"),
    (BASE + "serving: {target: merged, rank: 8}\n", "line 4: serving.rank: a merged model has no adapter"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[str(number) for number in range(len(MISTAKES))])
def test_a_mistake_is_named_with_its_line(read, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(text)
    assert "request.yaml" in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("{lr: 1}", "there is no field 'lr'; did you mean learning_rate?"),
        ("{lora_rnk: 1}", "there is no field 'lora_rnk'; did you mean lora_rank?"),
        ("{output_dir: a}", "training.output_dir: a request does not set it: the procedure keeps"),
        (
            "{eval_strategy: epoch}",
            "training.eval_strategy: a request does not set it: the procedure sets it",
        ),
        ("{eval_limits: {}}", "training.eval_limits: a request does not set it: the procedure sets it"),
        ("{prediction_loss_only: true}", "training.prediction_loss_only: a request does not set it"),
        ("{hub_token: a}", "training.hub_token: a request does not set it: a secret"),
        ("{model_init_kwargs: {}}", "training.model_init_kwargs: .*model.arguments"),
        ("{lora_rank: many}", "training.lora_rank: 'many' is not a whole number"),
        ("{init: no}", "training.init: 'no' is not one of fila"),
        ("{beta: -1}", "training.beta: beta must be > 0"),
        ("{method: sgd}", "training.method: method must be one of"),
        ("{tuning: full}", "training: tuning full leaves no adapter for peft; write `serving: merged`"),
        ("[a]", "training: is a list"),
        ("{lora_rank: 010}", "training.lora_rank: 010 is octal in YAML; write it without the leading 0"),
    ],
)
def test_a_wrong_setting_of_training_is_named_with_its_line(read, training, message):
    with pytest.raises(
        ValueError, match=f"request.yaml, line 4: .*{message}|request.yaml, line 4: {message}"
    ):
        read(BASE + f"training: {training}\n")


def test_the_settings_that_a_request_may_not_make_exist():
    """A name that transformers renames would otherwise be let through."""
    from loku import UnlearnConfig

    assert set(module.NO_TRAINING) <= read_fields(UnlearnConfig).keys()


def test_a_damaged_request_is_read_or_refused_by_name(read):
    """Whatever stands in the file: no other error, and nothing that takes long."""
    rng = random.Random(0)
    whole = re.sub("(?m)^training.*\n", "", EVERY_FIELD).encode()  # its check would take most of the time
    outcomes = Counter()
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(len(damaged))
            damaged[place : place + rng.randrange(4)] = rng.choices(DAMAGE, k=rng.randrange(1, 4))
        try:
            read(bytes(damaged))
            outcomes["read"] += 1
        except ValueError as error:
            assert "request.yaml" in str(error)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 2


def test_without_a_holdout_limits_are_numbers_and_no_membership_is_tested(read):
    request = read("model: gpt2\nforget: forget.txt\nlimits: {probability: 0.1}\n")
    assert request.holdout is None
    assert request.attacks == tuple(name for name in ATTACKS if name != "mia")


def test_no_attacks_are_an_empty_list(read):
    assert read(BASE + "attacks: []\n").attacks == ()


def test_full_tuning_is_served_merged(read):
    assert read(BASE + "serving: merged\ntraining: {tuning: full}\n").training == {"tuning": "full"}


def test_a_folder_or_an_absent_file_is_no_request(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name the file of the request"):
        read_request(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file .*absent\.yaml"):
        read_request(tmp_path / "absent.yaml")


def test_the_facts_are_json_and_hold_no_query(read):
    """A query for a person's name would keep in the record what is to be deleted."""
    request = read(
        BASE.replace(
            "forget.txt", "{data: forget.txt, contains: Jane, matches: Doe, ids: [4711], columns: [a]}"
        )
    )
    facts = request_facts(request)
    text = json.dumps(facts, allow_nan=False)
    assert json.loads(text) == facts
    assert not re.search("Jane|Doe|4711", text)
    assert facts["forget"]["contains"] and facts["forget"]["matches"] and facts["forget"]["ids"] == 1
    names = {field.name for field in dataclasses.fields(Request)} - {"lines"}
    assert facts.keys() == names | {"version", "digest"}


def test_the_digest_of_the_facts_tells_queries_apart(read):
    """The facts of two queries are the same but for it, and a comment changes nothing."""
    first, again, other = (
        request_facts(read(forgetting(f"{{data: forget.txt, contains: {name}}}") + comment))
        for name, comment in (("Jane", ""), ("Jane", "# a comment\n"), ("John", ""))
    )
    assert first == again
    assert first.pop("digest") != other.pop("digest")
    assert first == other


def test_a_rank_that_is_set_later_is_checked_too(read):
    with pytest.raises(ValueError, match="a merged model has no adapter, and so no rank"):
        dataclasses.replace(read(BASE + "serving: merged\n"), rank=8)


def test_the_example_runs_as_it_is_written(tmp_path):
    paths = write_template(tmp_path / "new")
    assert [path.name for path in paths] == ["request.yaml", "forget.jsonl", "retain.jsonl", "holdout.jsonl"]
    request = read_request(paths[0])
    assert request.model == str(EMBEDDED)
    core = [line for line in paths[0].read_text().splitlines() if line and not line.startswith("#")]
    assert len(core) <= 15
    rows = {path.stem: [json.loads(line) for line in path.open()] for path in paths[1:]}
    assert {name: len(of) for name, of in rows.items()} == {"forget": 8, "retain": 127, "holdout": 40}
    known = {json.loads(line)["question"] for line in (EMBEDDED / "tofu.jsonl").open()}
    for name, inside in (("forget", True), ("retain", True), ("holdout", False)):
        assert all((row["question"] in known) is inside for row in rows[name])


def test_an_example_overwrites_nothing(tmp_path):
    (tmp_path / "retain.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"has retain\.jsonl already; name another folder"):
        write_template(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["retain.jsonl"]
    assert (tmp_path / "retain.jsonl").read_text() == "mine"


def test_the_example_shows_every_field_with_its_default(tmp_path):
    """A line that is commented out says the default; read, it changes nothing."""
    path, *_ = write_template(tmp_path)
    request = read_request(path)
    text = path.read_text()
    shown = set(re.findall(r"^#?([a-z_]+):", text, re.MULTILINE))
    assert shown == set(module.FIELDS)
    for line in re.findall(r"^#([a-z_]+:.*)$", text, re.MULTILINE):
        name = line.partition(":")[0]
        if name in ("reference", "requester"):
            assert yaml.safe_load(line)[name] == getattr(Request(tmp_path, "", RowSelection("")), name)
            continue
        path.write_text(f"{text}\n{line}\n")
        changed = read_request(path)
        if name == "limits":  # the paper's rule, written out
            assert set(changed.limits.values()) == {HOLDOUT}
            changed = dataclasses.replace(changed, limits={})
        assert changed == request
    assert REQUEST.count("{model}") == 1
