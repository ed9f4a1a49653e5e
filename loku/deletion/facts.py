"""What a record says about the machine, the code, the model and the data of a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from loku.file_digests import file_digest, file_digests

PACKAGES = (
    "loku-kernels",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "datasets",
    "datasketch",
    "numpy",
    "scipy",
    "matplotlib",
    "cryptography",
    "gguf",
)
# The folders beside the files of a model that a load reads, and those of a residual save of this package.
_FOLDERS = ("additional_chat_templates", "base", "adapter", "reference")
_MOST_BASES = 4


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine_facts() -> dict[str, Any]:
    """Return the processor, the accelerator, the threads of torch and the memory in bytes."""
    import torch

    return {
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, by their names."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "loku-kernels":  # a checkout that is not installed
                import loku_kernels

                found[name] = loku_kernels.__version__
    return found


def code_digest() -> dict[str, str]:
    """Return the version of the code that runs, and the SHA-256 of the list of its files' digests.

    The files are those of the packages ``loku`` and ``loku_kernels``, the compiled core among them, without
    Python's caches.
    """
    import loku
    import loku_kernels

    digests: dict[str, str] = {}
    for package in (loku, loku_kernels):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digests[f"{folder.name}/{file.relative_to(folder).as_posix()}"] = file_digest(file)
    return {"version": loku_kernels.__version__, "sha256": _of_list(digests)}


def _of_list(digests: Mapping[str, str]) -> str:
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def model_digests(
    model: str | os.PathLike,
    *,
    revision: str | None = None,
    model_arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the digests of the files of a model, and those of its base if it is an adapter.

    The files are those in the model's folder and in the folders that a load knows, hidden ones not. So files
    that a load does not read may be among them. Those of a model on the hub are the files of its snapshot in
    the cache: call this when the model was loaded.

    Args:
        model: The path or hub name of the model or adapter.
        revision: The revision of a model on the hub; None (default) for the newest.
        model_arguments: The arguments of ``from_pretrained``, none by default.

    Returns:
        ``name``; ``revision``, the commit of a model on the hub, else None; ``files``, the SHA-256 by path;
        and ``base``, the same of an adapter's base.

    Raises:
        ValueError: There are no files of a model, or adapters stand on each other without end.
        OSError: A file cannot be read.
    """
    arguments = dict(model_arguments or {})
    if revision is not None:
        arguments["revision"] = revision
    return _model_digests(os.fspath(model), arguments, _MOST_BASES)


def _model_digests(name: str, arguments: Mapping[str, Any], most_bases: int) -> dict[str, Any]:
    if most_bases == 0:
        raise ValueError(f"{name} is an adapter of an adapter, {_MOST_BASES} times and more")
    folder, commit = _folder(name, arguments)
    files = {file.name: file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file()}
    digests = {file_name: file_digest(file) for file_name, file in files.items()}
    for held in _FOLDERS:
        if (folder / held).is_dir():
            digests |= {f"{held}/{path}": digest for path, digest in file_digests(folder / held).items()}
    if not digests:
        raise ValueError(f"{name} has no files of a model")
    found: dict[str, Any] = {"name": name, "revision": commit, "files": dict(sorted(digests.items()))}
    if "adapter_config.json" in files:
        base, of_base = _base_of(files["adapter_config.json"])
        if base:
            found["base"] = _model_digests(base, of_base, most_bases - 1)
    return found


def _base_of(config: Path) -> tuple[str | None, dict[str, str]]:
    """The base of an adapter, and the arguments with which it is loaded."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{config} is not the config of an adapter") from error
    arguments = {"revision": revision} if isinstance(revision, str) else {}
    return base if isinstance(base, str) else None, arguments


def _folder(name: str, arguments: Mapping[str, Any]) -> tuple[Path, str | None]:
    """The folder of a model's files, and the commit of a model on the hub."""
    if os.path.isdir(name):
        return Path(name) / str(arguments.get("subfolder") or ""), None
    from transformers.utils.hub import extract_commit_hash

    from loku.trust import HUB_ARGUMENTS, find_file

    hub = {key: value for key, value in arguments.items() if key in HUB_ARGUMENTS}
    for file in ("config.json", "adapter_config.json"):
        if path := find_file(name, file, hub):
            return Path(path).parent, extract_commit_hash(path, None)
    raise ValueError(f"{name} has no files of a model, neither here nor in the cache of the hub")


def data_digest(source: str | os.PathLike) -> str:
    """Return the digest of a data set.

    Args:
        source: A file, a folder or a hub name, as for ``loku.data.read_rows``.

    Returns:
        The SHA-256: of the bytes of a file; of the list of the digests of a folder's files; or of the rows of
        a data set on the hub, as lines of JSON.

    Raises:
        ValueError: The source is no data set.
        OSError: It cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return _of_list(file_digests(path))
    from loku.data import read_rows

    return rows_digest(read_rows(source))


def rows_digest(rows: Iterable[Any]) -> str:
    """Return the SHA-256 of rows, as lines of JSON in their order. The order of their columns counts not.

    Args:
        rows: The rows: texts, or dicts of values.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
