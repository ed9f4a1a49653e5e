"""A directory holds one save, and nothing of it is mixed with an earlier save or with a user's files.

A loader takes every file that it knows. So a model and an adapter of two saves in one directory would be
loaded together. Each save lists its files and their digests in ``loku_save.json``. The next save into the
directory takes away what that list names and what is unaltered, and nothing else. It refuses a directory with
other files that it would overwrite or that a loader would read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from loku.file_digests import file_digest, file_digests
from loku.saving.directories import alone_in, finish_interrupted, system_error, whole_directory

LIST = "loku_save.json"
_MAX_LIST_BYTES = 16 << 20

# The entries that ``from_pretrained`` of transformers and peft takes for a model or an adapter.
_LOADED = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# The entries that tokenizers write. A slow one adds the files of its vocabulary.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "tokenizer.model",
    "sentencepiece*.model",
    "spiece.model",
    "spm.model",
    "vocab*.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "emoji.json",
    "word_shape.json",
    "word_pronunciation.json",
    "prophetnet.tokenizer",
)
# The entries that a save of each kind can write, as patterns. ``whole_directory`` refuses any other that is
# in the way, too, but only after the training.
WRITTEN: dict[str, tuple[str, ...]] = {
    "portable": (LIST, "adapter_config.json", "adapter_model.safetensors", *_TOKENIZER),
    "residual": (LIST, "base", "adapter", "reference"),
    "merged": (
        LIST,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        *_TOKENIZER,
    ),
    "demo": ("loku_demo.json", "adapter", "probabilities.png", "report.json", "forget.jsonl", "retain.jsonl"),
}
_KEYS = {
    "portable": "adapter_config.json",
    "residual": "adapter",
    "merged": "config.json",
    "demo": "report.json",
}
# The lists by kinds: a save and the files of ``loku demo`` may lie in one directory.
_LISTS = {kind: LIST for kind in ("portable", "residual", "merged")} | {"demo": "loku_demo.json"}


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _last_save(directory: Path, name: str = LIST) -> dict[str, Any]:
    """The contents of a directory's list, or an empty dict if it has none that a save has written."""
    file = directory / name
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_LIST_BYTES:
            return {}
        save = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return save if _is_list(save) else {}


def _is_list(save: Any) -> bool:
    if not isinstance(save, dict) or not isinstance(save.get("kind"), str):
        return False
    if not isinstance(save.get("untouched"), str | None):
        return False
    files = save.get("files")
    return (
        isinstance(files, dict)
        and bool(files)
        and all(_is_inside(name) and isinstance(digest, str) for name, digest in files.items())
    )


def _is_inside(name: str) -> bool:
    """Whether the path of a list stays in the directory."""
    parts = PurePosixPath(name).parts
    return 0 < len(parts) <= 32 and not name.startswith("/") and ".." not in parts and "\0" not in name


def _others_in(entry: Path, name: str, listed: Mapping[str, str]) -> list[str]:
    """The paths of what an entry of a directory is or holds and what its list does not vouch for.

    Only regular files with the listed digests are vouched for, and the folders of listed files. A symlink is
    never followed.
    """
    mode = entry.lstat().st_mode
    if stat.S_ISREG(mode):
        return [] if name in listed and listed[name] == file_digest(entry) else [name]
    if not stat.S_ISDIR(mode) or not any(file.startswith(f"{name}/") for file in listed):
        return [name]
    return [
        other
        for held in sorted(os.listdir(entry))
        for other in _others_in(entry / held, f"{name}/{held}", listed)
    ]


def _entries(directory: Path, name_of_list: str = LIST) -> tuple[set[str], dict[str, list[str]]]:
    """The entries of a directory that its last save wrote and nobody has altered, and the others.

    The others are given with the paths in them that are not vouched for.
    """
    listed: dict[str, str] = _last_save(directory, name_of_list).get("files", {})
    ours, others = set(), {}
    for name in os.listdir(directory):
        unknown = _others_in(directory / name, name, listed)
        if not unknown or (name == name_of_list and listed):
            ours.add(name)
        else:
            others[name] = unknown
    return ours, others


def refuse_overlap(output: str | os.PathLike, **inputs: str | os.PathLike | None) -> None:
    """Refuse a directory to write to that is, holds or lies in a directory that is read.

    Symlinks and ".." are resolved first.

    Args:
        output: The directory to write to. It need not exist.
        inputs: The directories that are read, by what they are: ``refuse_overlap(output, model=...)``. None,
            an empty name and a name that is no path, such as one on the hub, are passed over.

    Raises:
        ValueError: They overlap. The message names both.
    """
    place = Path(output).resolve()
    for name, given in inputs.items():
        if not given or not os.path.exists(given):
            continue
        source = Path(given).resolve()
        if place == source or source in place.parents or place in source.parents:
            relation = "is" if place == source else "lies in" if source in place.parents else "holds"
            raise ValueError(
                f"{os.fspath(output)} {relation} {os.fspath(given)}, the {name.replace('_', ' ')}, which is "
                "only read. Nothing was written; pass a directory apart from it"
            )


def refuse_replaced(output: str | os.PathLike, **inputs: str | os.PathLike | None) -> None:
    """Refuse data that a save into a directory would mix with its files or take away.

    Data beside the files of a save is fine.

    Args:
        output: The directory to write to. It need not exist.
        inputs: The files or directories of data, by their names. None, and what is no path, are passed over.

    Raises:
        ValueError: The directory is or lies in a directory of data. Or the data is or lies in an entry that
            the last save wrote.
    """
    place = Path(output).resolve()
    ours = _entries(place)[0] if place.is_dir() else set()
    for name, given in inputs.items():
        if not given or not os.path.exists(given):
            continue
        source = Path(given).resolve()
        if (
            place == source
            or source in place.parents
            or (place in source.parents and source.relative_to(place).parts[0] in ours)
        ):
            raise ValueError(
                f"a save into {os.fspath(output)} would write over {os.fspath(given)}, the {name} data. "
                "Nothing was written; pass another directory"
            )


def refuse_inside_save(output: str | os.PathLike, kind: str, **others: str | os.PathLike | None) -> None:
    """Refuse directories that a run writes to inside an entry that its save writes.

    Beside the entries of the save they are fine. Inside one they would be in its way when the run has ended.

    Args:
        output: The directory of the save. It need not exist.
        kind: The kind of save, one of ``loku.saving.kinds.KINDS``.
        others: The other directories, by their settings' names; None for none. They need not exist.

    Raises:
        ValueError: One of them is or lies in such an entry.
    """
    place = Path(output).resolve()
    for name, given in others.items():
        other = Path(given or output).resolve()
        if place in other.parents and _matches(other.relative_to(place).parts[0], WRITTEN[kind]):
            raise ValueError(
                f"{name} {os.fspath(given or '')} would be in the way of the save into {os.fspath(output)}, "
                f"which writes {other.relative_to(place).parts[0]} there. Nothing was started; pass another "
                f"{name}"
            )


def check_destination(path: str | os.PathLike, kind: str, **sources: str | os.PathLike | None) -> None:
    """Check that a save can go to a directory, before anything is trained or written.

    What an interrupted save has left there is finished or cleared first (``finish_interrupted``). Only one
    process may call this at a time.

    Args:
        path: The directory. It need not exist.
        kind: The kind of save, one of ``loku.saving.kinds.KINDS``, or "demo".
        sources: The directories that the model comes from, as for ``refuse_overlap``.

    Raises:
        ValueError: ``path`` is a file, or overlaps with a source. Or it holds something that is not an
            unaltered save of this package, and that the save would overwrite or a loader would read with it.
        OSError: ``path`` cannot be written to.
    """
    refuse_overlap(path, **sources)
    finish_interrupted(path)
    path = Path(path)
    if path.is_dir():
        with alone_in(path):  # another save may be moving its entries
            _, others = _entries(path, _LISTS[kind])
            _refuse_others(path, kind, others)
    check_writable(path)


def _refuse_others(path: Path, kind: str, others: Mapping[str, list[str]]) -> None:
    last_files = _last_save(path, _LISTS[kind]).get("files", {})
    last_folders = {file.partition("/")[0] for file in last_files if "/" in file}
    patterns = WRITTEN[kind] if kind == "demo" else (*WRITTEN[kind], *_LOADED)
    in_the_way = [
        other
        for name, unknown in sorted(others.items())
        if _matches(name, patterns) or name in last_folders
        for other in unknown
    ]
    if in_the_way:
        more = f" and {len(in_the_way) - 8} more" if len(in_the_way) > 8 else ""
        raise ValueError(
            f"{path} holds {', '.join(in_the_way[:8])}{more}, which is not a save of loku, or was changed "
            "since: it would be loaded with the new files or overwritten. Nothing was written; pass another "
            "directory, move it away or delete it"
        )


def _existing(path: Path) -> Path:
    """The directory, or the nearest directory above it that exists."""
    path = Path(os.path.realpath(path))
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def check_writable(path: str | os.PathLike) -> None:
    """Check that a directory can be written to, or made, by a file without a name.

    Args:
        path: The directory. It need not exist.

    Raises:
        OSError: It cannot be written to.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryFile(dir=_existing(path)):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"cannot be written to ({error.strerror}); nothing was started", os.fspath(path)
        ) from error


def check_room(path: str | os.PathLike, needed_bytes: int, what: str = "the save") -> None:
    """Check that a disk has room for a save, before anything is trained.

    A save that is there makes way only when the new one is whole. So its room does not count.

    Args:
        path: The directory of the save. It need not exist.
        needed_bytes: The size of the save, in bytes.
        what: What is written, for the message.

    Raises:
        OSError: There is less room. The message says how much there is and how much is needed.
    """
    free = shutil.disk_usage(_existing(Path(path))).free
    if free < needed_bytes:
        raise system_error(
            f"{os.fspath(path)} has room for {free / 2**20:.1f} MiB, and {what} needs about "
            f"{needed_bytes / 2**20:.1f} MiB. Nothing was started; make room, or pass another directory",
            errno.ENOSPC,
        )


@contextmanager
def destination(
    path: str | os.PathLike,
    kind: str,
    *,
    refuse_others: bool = True,
    sources: Mapping[str, str | None] | None = None,
    **facts: str | None,
) -> Iterator[Path]:
    """A context with a directory to write a save into, which becomes ``path`` when the block ends.

    An exception leaves ``path`` as it was, as in ``whole_directory``.

    Args:
        path: The directory. What the last save into it wrote makes way. Its other entries stay.
        kind: The kind of save, one of ``loku.saving.kinds.KINDS``, or "demo".
        refuse_others: Whether to refuse a directory with a model or an adapter that is not ours
            (``check_destination``), as by default. Otherwise they stay, but for files of the same name.
        sources: The directories that the model comes from, as for ``refuse_overlap``; None (default) for
            none.
        facts: Facts about the save for ``loku_save.json``, by their names.

    Yields:
        The directory to write into.

    Raises:
        ValueError: The errors of ``check_destination``, also for what has come since the call.
        OSError: ``path`` cannot be written.
    """
    if refuse_others:
        check_destination(path, kind, **(sources or {}))
    else:
        refuse_overlap(path, **(sources or {}))

    def replaceable(directory: Path, new: Collection[str]) -> set[str]:
        ours, others = _entries(directory, _LISTS[kind])
        if refuse_others:
            _refuse_others(directory, kind, others)
            return ours
        return ours | {name for name in new if not (directory / name).is_dir()}

    with whole_directory(path, key=_KEYS[kind], replaceable=replaceable) as directory:
        yield directory
        save = {"kind": kind, **facts, "files": file_digests(directory)}
        (directory / _LISTS[kind]).write_text(json.dumps(save, indent=2), encoding="utf-8")


def residual_save(base: str | None) -> dict[str, Any] | None:
    """The facts about the residual save whose base a model was loaded from, or None if it is no residual.

    Args:
        base: The name or path that the model was loaded by, or None.

    Returns:
        A dict with "untouched", the name of the model that FILA made the residual of, or None. It is None for
            a save after default LoRA initialisation, too: its base is a copy of the untouched one.
    """
    if base is None or Path(base).name != "base":
        return None
    folder = Path(base).parent
    save = _last_save(folder)
    return save if save.get("kind") == "residual" and (folder / "reference").is_dir() else None
