"""A directory holds the last save, whatever was saved to it before, and files of others are safe."""

import errno
import json
import os
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import transformers
from fila_models import initialized, logits, make_base, train
from killed_writers import killed_at
from peft import PeftModel
from sentencepiece_tokenizers import trained_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, ByT5Tokenizer, CTRLTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import loku
from loku.demo import EMBEDDED
from loku.file_digests import file_digest
from loku.saving.destinations import (
    LIST,
    WRITTEN,
    check_destination,
    destination,
    refuse_overlap,
    refuse_replaced,
)
from loku.saving.kinds import KINDS, save

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

OTHERS = {
    "portable": ["adapter_config.json", "adapter_model.safetensors", LIST],
    "residual": ["adapter", "base", LIST, "reference"],
    "merged": ["config.json", "generation_config.json", LIST, "model.safetensors"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a base, a model unlearned from it, and the same model trained on."""
    folder = tmp_path_factory.mktemp("models")
    make_base("llama").save_pretrained(folder / "original")
    torch.manual_seed(0)
    first = initialized("llama")
    first.peft_config["default"].base_model_name_or_path = str(folder / "original")
    train(first)
    other = initialized("llama")
    train(other, steps=8)
    return folder, other, first


def loaded(path, kind, folder):
    if kind == "merged":
        return AutoModelForCausalLM.from_pretrained(path)
    if kind == "residual":
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        return PeftModel.from_pretrained(base, path / "adapter")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "original"), path)


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("earlier", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_save_is_what_loads(earlier, kind, models, tmp_path):
    folder, other, model = models
    path = tmp_path / "saved"
    save(other, path, earlier)
    (path / "notes.txt").write_text("kept")
    (path / "checkpoint-7").mkdir()
    save(model, path, kind)
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        [*OTHERS[kind], "notes.txt", "checkpoint-7"]
    )
    expected = logits(model)
    assert_close(logits(loaded(path, kind, folder)), expected)
    if kind != "residual":  # whoever takes the folder for a model, or for an adapter, gets the same
        assert_close(logits(AutoModelForCausalLM.from_pretrained(path)), expected)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def foreign_model(models, path):
    make_base("llama").save_pretrained(path)
    return "config.json, model.safetensors"


def foreign_adapter(models, path):
    save(models[1], path, "portable")
    (path / LIST).unlink()
    return "adapter_config.json, adapter_model.safetensors"


def altered_model(models, path):
    save(models[1], path, "merged")
    AutoModelForCausalLM.from_pretrained(path).double().save_pretrained(path)
    return "config.json, model.safetensors"


def pickled_model(models, path):
    path.mkdir()
    torch.save({}, path / "pytorch_model.bin")
    return "pytorch_model.bin"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [foreign_model, foreign_adapter, altered_model, pickled_model])
def test_the_models_of_others_are_refused(make, kind, models, tmp_path):
    path = tmp_path / "saved"
    names = make(models, path)
    before = contents(tmp_path)
    if make is foreign_model and kind == "merged":  # which writes this file, too
        names = names.replace(", ", ", generation_config.json, ")
    for refused in (lambda: save(models[2], path, kind), lambda: check_destination(path, kind)):
        with pytest.raises(ValueError, match=f"{path} holds {names}, which is not a save of loku.*delete it"):
            refused()
    assert contents(tmp_path) == before


def test_a_folder_named_base_is_not_ours(models, tmp_path):
    """A residual save would replace it, and the other kinds leave it alone."""
    make_base("llama").save_pretrained(tmp_path / "base")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds base, which is not a save of loku"):
        save(models[2], tmp_path, "residual")
    assert contents(tmp_path) == before
    for kind in ("portable", "merged"):
        save(models[2], tmp_path, kind)
        assert contents(tmp_path / "base") == contents_of(before, "base/")


def contents_of(files, prefix):
    return {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}


# Entries of others, by the kinds of saves that they are in the way of. ``save`` is a residual save before.
FOREIGN = [
    ("tokenizer.json", ("portable", "merged")),
    ("vocab.json", ("portable", "merged")),
    ("generation_config.json", ("merged",)),
    ("adapter/notes.txt", ("residual",)),
    ("reference/thesis.pdf", ("residual",)),
    ("base/model.safetensors", ("residual",)),
    ("config.json", KINDS),
    ("model-00001-of-00002.safetensors", KINDS),
    ("model_of_the_world.safetensors", ()),
    ("checkpoint-2/notes.txt", ()),
    ("README.md", ()),
    ("notes.txt", ()),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, refusing", FOREIGN, ids=lambda value: value if isinstance(value, str) else "")
def test_what_others_wrote_is_refused_or_stays(name, refusing, kind, models, tmp_path):
    path = tmp_path / "saved"
    save(models[1], path, "residual" if name != "config.json" else "portable")
    shutil.rmtree(path / name.partition("/")[0], ignore_errors=True)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"a user's")
    before = contents(tmp_path)
    folder = name.partition("/")[0] in ("base", "adapter", "reference")
    if kind in refusing or folder:  # the last save wrote a folder of this name: it is in every kind's way
        for refused in (lambda: save(models[2], path, kind), lambda: check_destination(path, kind)):
            with pytest.raises(ValueError, match=f"{path} holds {name}, which is not a save of loku"):
                refused()
        assert contents(tmp_path) == before
    else:
        save(models[2], path, kind)
        assert (path / name).read_bytes() == b"a user's"
        assert sorted(entry.name for entry in path.iterdir()) == sorted(
            [*OTHERS[kind], name.partition("/")[0]]
        )


@pytest.mark.parametrize("entry", ["adapter/notes.txt", "adapter/folder", "base/link", "base"])
def test_an_addition_to_a_folder_of_a_save_is_not_deleted(entry, models, tmp_path):
    path, elsewhere = tmp_path / "saved", tmp_path / "elsewhere"
    save(models[1], path, "residual")
    elsewhere.mkdir()
    (elsewhere / "thesis.pdf").write_text("kept")
    if entry.endswith("folder"):
        (path / entry).mkdir()
    elif entry.endswith("txt"):
        (path / entry).write_text("a user's")
    else:
        if entry == "base":  # a user has moved it to another disk
            (path / "base").rename(elsewhere / "base")
            (path / "base").symlink_to(elsewhere / "base")
        else:
            (path / entry).symlink_to(elsewhere)
    before = contents(tmp_path)
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"saved holds {entry}, which is not a save of loku"):
            save(models[2], path, kind)
        with pytest.raises(ValueError, match=f"saved holds {entry}, which is not a save of loku"):
            check_destination(path, kind)
    assert contents(tmp_path) == before and os.path.lexists(path / entry)


def test_what_comes_while_a_save_is_written_stays(models, tmp_path):
    """A user's file of a name that no check knows, and one of a name that the check before found free."""
    save(models[1], tmp_path / "saved", "merged")
    for name in ("modeling_mine.py", "tokenizer.json", "adapter_config.json"):
        with (
            pytest.raises(ValueError, match=f"saved holds {name}, which is not a save of loku"),
            destination(tmp_path / "saved", "portable") as directory,
        ):
            (directory / name).write_text("ours")
            (tmp_path / "saved" / name).write_text("a user's")
            before = contents(tmp_path / "saved")
        assert contents(tmp_path / "saved") == {
            file: data for file, data in before.items() if ".unfinished" not in file
        }
        (tmp_path / "saved" / name).unlink()


def test_a_demo_and_a_save_in_one_directory_leave_each_other_alone(models, tmp_path):
    (tmp_path / "notes.txt").write_text("a user's")
    for text in ("1", "2"):
        with destination(tmp_path, "demo") as directory:
            for name in ("forget.jsonl", "report.json"):
                (directory / name).write_text(text)
            (directory / "adapter").mkdir()
            (directory / "adapter" / "adapter_config.json").write_text(text)
        save(models[2], tmp_path, "portable")
        assert (tmp_path / "forget.jsonl").read_text() == text
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
            [*OTHERS["portable"], "adapter", "forget.jsonl", "loku_demo.json", "notes.txt", "report.json"]
        )
    with pytest.raises(ValueError, match=r"holds adapter/adapter_config\.json|holds adapter, which is not"):
        check_destination(tmp_path, "residual")


HOSTILE = [
    '{"kind": "merged", "files": {"../victim.txt": "%s"}}',
    '{"kind": "merged", "files": {"%s": "%s"}}',
    '{"kind": "merged", "files": {"link/victim.txt": "%s"}}',
    '{"kind": "merged", "files": ["config.json"]}',
    '{"kind": "merged", "files": {"config.json": 1}}',
    '{"kind": ["merged"], "files": {"config.json": "0"}}',
    '{"kind": "residual", "untouched": {}, "files": {"base/config.json": "0"}}',
    "[" * 100_000,
    '{"kind": "merged", "files": {"' + "x/" * 50_000 + '": "0"}}',
    "\xff\xfe",
    "null",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_list_deletes_nothing(number, models, tmp_path):
    path, victim = tmp_path / "saved", tmp_path / "elsewhere" / "victim.txt"
    victim.parent.mkdir()
    path.mkdir()
    victim.write_text("kept")
    (path / "link").symlink_to(victim.parent)
    digest = file_digest(victim)
    (path / LIST).write_text(
        HOSTILE[number].replace("%s", str(victim), HOSTILE[number].count("%s") - 1).replace("%s", digest)
    )
    before = contents(tmp_path)
    try:
        save(models[2], path, "merged")
    except ValueError as error:
        named = "link" if number == 2 else LIST  # a list whose files are elsewhere is none of a save
        assert f"saved holds {named}, which is not a save of loku" in str(error)
        assert contents(tmp_path) == before
    assert victim.read_text() == "kept" and (path / "link").is_symlink()


def test_a_list_that_is_no_file_or_huge_is_none(models, tmp_path):
    """A pipe is not opened, a link not followed, and a list of gigabytes not read."""
    for make in (
        os.mkfifo,
        lambda file: file.symlink_to("/dev/zero"),
        lambda file: os.truncate(os.open(file, os.O_RDWR | os.O_CREAT), 1 << 40),
    ):
        (tmp_path / LIST).unlink(missing_ok=True)
        make(tmp_path / LIST)
        with pytest.raises(ValueError, match=r"holds loku_save\.json, which is not a save of loku"):
            save(models[2], tmp_path, "portable")


def test_a_save_of_the_earlier_format_is_refused(models, tmp_path):
    """Its digests were of samples of the files. They prove nothing, so they match nothing."""
    save(models[1], tmp_path, "portable")
    listed = json.loads((tmp_path / LIST).read_text())
    listed["files"] = dict.fromkeys(listed["files"], "0" * 64)
    (tmp_path / LIST).write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors, which .* move it away or delete it"):
        check_destination(tmp_path, "portable")


def test_a_destination_may_be_a_symlink(models, tmp_path):
    """The directory behind it is written, and the link stays."""
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "saved")
    for kind in ("merged", "portable"):  # the first makes the directory behind the link
        save(models[2], tmp_path / "link", kind)
        assert (tmp_path / "link").is_symlink()
        assert sorted(entry.name for entry in (tmp_path / "disk" / "saved").iterdir()) == OTHERS[kind]


def test_overlaps(tmp_path, monkeypatch):
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for output, word in (
        (model, "is"),
        ("models/base", "is"),
        ("models/../models/base", "is"),
        (tmp_path / "link", "is"),
        (tmp_path / "link" / "new", "lies in"),
        (model / "new" / "newer", "lies in"),
        (tmp_path / "models", "holds"),
        (".", "holds"),
    ):
        for given in (model, str(model), "models/base", "link"):
            with pytest.raises(ValueError, match=f"^{output} {word} {given}, the model, which is only read"):
                refuse_overlap(output, model=given)
    for apart in ("models/base2", tmp_path / "out", "bas"):
        refuse_overlap(apart, model=model, tokenizer=None, other="")
    refuse_overlap(tmp_path, model="organisation/name")


def test_data_beside_a_save_is_read_and_data_in_it_is_not(models, tmp_path):
    save(models[1], tmp_path / "out", "residual")
    (tmp_path / "out" / "rows.jsonl").write_text("{}")
    refuse_replaced(tmp_path / "out", forget=tmp_path / "out" / "rows.jsonl", retain="hub/name")
    (tmp_path / "set").mkdir()
    refuse_replaced(tmp_path, forget=tmp_path / "set")
    for output, data in (
        (tmp_path / "out", tmp_path / "out" / "base" / "config.json"),
        (tmp_path / "set", tmp_path / "set"),
        (tmp_path / "set" / "out", tmp_path / "set"),
    ):
        with pytest.raises(ValueError, match=f"into {output} would write over {data}, the forget data"):
            refuse_replaced(output, forget=data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_not_saved_over_its_own_model(kind, models, tmp_path):
    """Not even where an unaltered save of this package is the model, which another save may replace."""
    other = models[1]
    save(other, tmp_path / "first", "residual")
    save(other, tmp_path / "merged", "merged")
    bases = tmp_path / "first" / "base", tmp_path / "merged"
    before = contents(tmp_path)
    for base in bases:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "first" / "adapter"
        )
        model.peft_config["default"].base_model_name_or_path = str(base)
        for path in (base, base.parent, base / "new"):
            with pytest.raises(ValueError, match="which is only read"):
                save(model, path, kind)
    assert contents(tmp_path) == before


def embedded(folder):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}  # two files
    return tokenizer


def unigram(folder):
    return trained_tokenizer("unigram")


def python(folder):
    return ByT5Tokenizer()


def with_vocabulary(folder):
    (folder / "vocab").write_text('{"<unk>": 0, "a": 1}')
    (folder / "merges").write_text("#version: 0.2\na b\n")
    return CTRLTokenizer(str(folder / "vocab"), str(folder / "merges"))


def wordpiece(folder):
    return BertTokenizer(vocab={"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4, "a": 5})


def unknown(names, kind):
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in WRITTEN[kind])]


@pytest.mark.parametrize("make", [embedded, unigram, python, with_vocabulary, wordpiece])
def test_the_names_that_saves_write_are_known(make, models, tmp_path):
    """A name that is not on the list would be found in the way only after the training."""
    for kind in KINDS:
        save(models[2], tmp_path / kind, kind, tokenizer=make(tmp_path))
        held = tmp_path / kind / "base" if kind == "residual" else tmp_path / kind
        assert (held / "tokenizer_config.json").is_file()
        assert unknown(os.listdir(tmp_path / kind), kind) == []


def test_the_names_of_shards_and_vocabularies_are_known(tmp_path):
    make_base("llama").save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(os.listdir(tmp_path)) > 5 and unknown(os.listdir(tmp_path), "merged") == []
    files = set()
    for name in {TOKENIZER_MAPPING_NAMES.get(model) for model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {None}:
        with suppress(ImportError):  # a tokenizer may need a package of its own
            files.update(getattr(transformers, name).vocab_files_names.values())
    assert len(files) > 5 and unknown(files, "portable") == unknown(files, "merged") == []


@pytest.mark.parametrize(
    "earlier, kind", [("residual", "portable"), ("merged", "merged"), ("portable", "residual")]
)
def test_a_save_that_is_killed_at_any_move_is_finished(earlier, kind, models, tmp_path):
    """Before the next start the old save loads, or the new one, or none. Then the new one is whole."""
    folder, other, model = models
    expected = {"old": logits(other), "new": logits(model)}
    number, killed, ends = 0, True, []
    while killed:
        number += 1
        path = tmp_path / str(number)
        save(other, path, earlier)
        (path / "notes.txt").write_text("kept")
        killed = killed_at(number, lambda: save(model, path, kind), ("os.rename", "os.rmdir"))  # noqa: B023
        for end in (earlier, kind):
            with suppress(OSError, ValueError):  # a save that lacks its key is not found
                found = logits(loaded(path, end, folder))
                close = [name for name in expected if (found - expected[name]).abs().max() < 1e-3]
                assert len(close) == 1, number
        check_destination(path, kind)
        for end in dict.fromkeys((kind, earlier)):
            with suppress(OSError, ValueError):
                found = logits(loaded(path, end, folder))
                ends.append("new" if (found - expected["new"]).abs().max() < 1e-3 else "old")
                assert_close(found, expected[ends[-1]])
        assert len(ends) == number
        save(model, path, kind)
        assert sorted(entry.name for entry in path.iterdir()) == sorted([*OTHERS[kind], "notes.txt"])
        assert_close(logits(loaded(path, kind, folder)), expected["new"])
    assert number > 8 and ends[0] == "old" and ends.count("new") > 5


def test_a_copied_save_is_still_ours(models, tmp_path):
    save(models[1], tmp_path / "first", "residual")
    shutil.copytree(tmp_path / "first", tmp_path / "second", copy_function=shutil.copy)
    save(models[2], tmp_path / "second", "merged")
    assert sorted(entry.name for entry in (tmp_path / "second").iterdir()) == OTHERS["merged"]


def test_a_damaged_list_means_that_nothing_is_ours(models, tmp_path):
    save(models[1], tmp_path, "merged")
    for text in ("{", "[]", '{"files": {}}'):
        (tmp_path / LIST).write_text(text)
        with pytest.raises(ValueError, match=r"holds config\.json, loku_save\.json, model\.safetensors"):
            check_destination(tmp_path, "portable")


def test_save_pretrained_takes_our_saves_away_and_overwrites_adapters_as_peft(models, tmp_path):
    folder, other, model = models
    save(other, tmp_path / "ours", "merged")
    model.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "config.json").exists()
    foreign_adapter(models, tmp_path / "foreign")
    model.save_pretrained(tmp_path / "foreign")
    make_base("llama").save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()
    for name in ("ours", "foreign", "model"):
        assert_close(logits(loaded(tmp_path / name, "portable", folder)), logits(model))
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(model))


def test_the_model_card_of_a_user_is_added_to_and_never_half_written(models, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# A user's card\n")
    models[2].save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# A user's card" in card and "license: mit" in card and "library_name: peft" in card

    def full(self, directory):
        (Path(directory) / "README.md").write_text("hal")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PeftModel, "create_or_update_model_card", full)
    with pytest.raises(OSError, match=r"README\.md was not written, and is as it was: there is no room"):
        models[2].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    save(models[2], tmp_path, "merged")
    assert (tmp_path / "README.md").read_text() == card


def test_names_of_the_bases(models, tmp_path, monkeypatch):
    folder, _, model = models
    monkeypatch.chdir(tmp_path)
    save(model, "portable")
    save(model, "residual", "residual")

    def base_of(path):
        return json.loads((tmp_path / path / "adapter_config.json").read_text())["base_model_name_or_path"]

    assert base_of("portable") == str(folder / "original")
    assert base_of("residual/adapter") == base_of("residual/reference") == str(tmp_path / "residual" / "base")

    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("residual/base"), "residual/adapter"
    )
    with pytest.raises(
        ValueError, match=r"is a residual.*load_adapter\('.*residual/reference', 'reference'\)"
    ):
        loku.save_portable_adapter(again, "again")
    again.load_adapter("residual/reference", "reference")
    loku.save_portable_adapter(again, "again")
    assert base_of("again") == str(folder / "original")  # and not the residual, which it does not fit
    assert_close(logits(AutoModelForCausalLM.from_pretrained("again")), logits(model))
