"""What a record says about the machine, the code, the model and the data."""

import hashlib
import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch

import loku
import loku_kernels
from loku.deletion import facts
from loku.deletion.record import validate_record
from loku.demo import EMBEDDED
from loku.file_digests import file_digest


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_the_machine():
    found = facts.machine_facts()
    assert found["threads"] == torch.get_num_threads() and found["cpu"]
    assert found["device"] == ("cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    with open("/proc/meminfo") as file:
        assert found["memory"] == int(file.readline().split()[1]) * 1024


def test_the_versions(monkeypatch):
    found = facts.versions()
    assert found["python"] == platform.python_version()
    for name in ("torch", "transformers", "peft"):
        assert found[name] == metadata.version(name)
    assert found["loku-kernels"]

    def nothing_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing_installed)
    assert facts.versions() == {
        "python": platform.python_version(),
        "loku-kernels": loku_kernels.__version__,
    }


def test_the_code_is_all_files_of_both_packages(tmp_path, monkeypatch):
    found = facts.code_digest()
    assert found["version"] == loku_kernels.__version__ and found == facts.code_digest()
    files = {}
    for package in (loku, loku_kernels):
        folder = Path(package.__file__).parent
        for name in [*folder.rglob("*.py"), *folder.rglob("*.so"), *folder.rglob("*.safetensors")]:
            files[name.relative_to(folder.parent).as_posix()] = sha256(name.read_bytes())
    assert {"loku/deletion/facts.py", "loku_kernels/losses.py"} <= files.keys()

    for package, name in ((loku, "loku"), (loku_kernels, "loku_kernels")):
        (tmp_path / name / "inner" / "__pycache__").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(f"# {name}\n")
        monkeypatch.setattr(package, "__file__", str(tmp_path / name / "__init__.py"))
    (tmp_path / "loku" / "inner" / "core.so").write_bytes(b"\x7fELF")
    lines = [
        f"{sha256(b'# loku' + bytes([10]))}  loku/__init__.py\n",
        f"{sha256(bytes([127]) + b'ELF')}  loku/inner/core.so\n",
        f"{sha256(b'# loku_kernels' + bytes([10]))}  loku_kernels/__init__.py\n",
    ]
    small = facts.code_digest()["sha256"]
    assert small == sha256("".join(lines).encode())
    (tmp_path / "loku" / "inner" / "__pycache__" / "core.pyc").write_bytes(b"cache")
    assert facts.code_digest()["sha256"] == small  # Python's caches do not count
    (tmp_path / "loku" / "inner" / "core.so").write_bytes(b"\x7fELG")
    assert facts.code_digest()["sha256"] != small


def test_a_model_in_a_folder(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    (model / ".hidden").write_text("x")
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1" / "optimizer.pt").write_text("x")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("x")
    found = facts.model_digests(model)
    assert found["name"] == str(model) and found["revision"] is None and "base" not in found
    names = {path.name for path in EMBEDDED.iterdir() if path.is_file()}
    assert found["files"].keys() == names | {"additional_chat_templates/tools.jinja"}
    assert found["files"]["model.safetensors"] == file_digest(EMBEDDED / "model.safetensors")
    assert [*found["files"]] == sorted(found["files"])
    sub = facts.model_digests(model, model_arguments={"subfolder": "checkpoint-1"})
    assert sub["files"] == {"optimizer.pt": sha256(b"x")}


def test_an_adapter_has_a_base(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(EMBEDDED)}))
    found = facts.model_digests(adapter)
    assert found["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert found["base"] == facts.model_digests(EMBEDDED)
    config.write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    with pytest.raises(ValueError, match="an adapter of an adapter"):
        facts.model_digests(adapter)
    config.write_text("[]")
    with pytest.raises(ValueError, match="not the config of an adapter"):
        facts.model_digests(adapter)


def test_a_residual_save_has_its_folders(tmp_path):
    """Such a save is an adapter on a base of its own; a load reads both."""
    for name in ("base", "adapter", "reference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "loku_save.json").write_text("{}")
    expected = {f"{name}/weights": sha256(name.encode()) for name in ("adapter", "base", "reference")}
    assert facts.model_digests(tmp_path)["files"] == {**expected, "loku_save.json": sha256(b"{}")}


def test_a_model_of_the_hub_has_a_commit(tmp_path, monkeypatch):
    """Its files are those of the snapshot in the cache, which are links to blobs."""
    commit = "0123456789" * 4
    cache = tmp_path / "models--someone--small"
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    (cache / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (cache / "blobs" / name).write_text(name)
        (snapshot / name).symlink_to(os.path.relpath(cache / "blobs" / name, snapshot))
    found = facts.model_digests("someone/small", model_arguments={"cache_dir": str(tmp_path)})
    assert found == {
        "name": "someone/small",
        "revision": commit,
        "files": {name: sha256(name.encode()) for name in ("config.json", "model.safetensors")},
    }
    arguments = {"cache_dir": str(tmp_path), "local_files_only": True}
    with pytest.raises(ValueError, match="neither here nor in the cache"):
        facts.model_digests("someone/else", model_arguments=arguments)


def test_a_folder_without_files_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="no files of a model"):
        facts.model_digests(tmp_path)


def test_data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    assert facts.data_digest(file) == sha256(file.read_bytes())
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (folder / name).write_text(name)
    lines = f"{sha256(b'a.jsonl')}  a.jsonl\n{sha256(b'b.jsonl')}  b.jsonl\n"
    assert facts.data_digest(folder) == sha256(lines.encode())
    with pytest.raises(FileNotFoundError):
        facts.data_digest(tmp_path / "nothing.jsonl")


def test_data_of_the_hub_has_the_digest_of_its_rows(monkeypatch):
    import loku.data

    rows = [{"text": "a", "id": 1}, {"id": 2, "text": "é"}]
    monkeypatch.setattr(loku.data, "read_rows", lambda source: rows if source == "someone/rows" else None)
    expected = sha256(b'{"id": 1, "text": "a"}\n{"id": 2, "text": "\\u00e9"}\n')
    assert facts.data_digest("someone/rows") == expected == facts.rows_digest(rows)
    assert facts.rows_digest(reversed(rows)) != expected
    assert facts.rows_digest(["a"]) == sha256(b'"a"\n')


def test_the_facts_are_of_the_schema(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n')
    inputs = {
        "model": facts.model_digests(EMBEDDED),
        "data": {"forget": {"source": str(data), "sha256": facts.data_digest(data)}},
        "code": facts.code_digest(),
    }
    times = {"begin": "2026-01-02T03:04:05+00:00", "end": "2026-01-02T03:04:05+00:00"}
    least = {"schema": 1, "outcome": "not known", "request": {"reference": ""}, "times": times}
    validate_record(
        {**least, "inputs": inputs, "machine": facts.machine_facts(), "versions": facts.versions()}
    )
