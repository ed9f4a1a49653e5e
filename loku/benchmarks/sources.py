"""The data of a benchmark: from the hub, or from a folder that holds the same sets under the same names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loku.data.files import FILE_SUFFIXES, TEXT_SUFFIXES, read_rows

_SUFFIXES = (*FILE_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))


class Source:
    """The sets of a benchmark by their names on the hub: repository, config and split.

    Without a folder a set is loaded from the hub by ``datasets``. With a folder nothing is looked for on the
    hub. The folder is a download of the hub's repository, or a folder with one such download for each
    repository, under the last part of its name. A set is found there by the first of these that exists:

    - a file, or a folder of shards, that is named as the config and the split are: ``CONFIG.jsonl``,
      ``CONFIG/SPLIT.jsonl``, ``CONFIG/SPLIT-00000-of-00001.parquet``, ``CONFIG/SPLIT/`` as
      ``datasets.save_to_disk`` writes it; in any format that ``loku.data.read_rows`` reads,
    - the files that the ``configs`` at the head of the download's ``README.md`` name.

    Args:
        folder: The folder; None (default) stands for the hub.

    Raises:
        ValueError: ``folder`` is no directory.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self._known: dict[tuple[str, str | None, str], list[Any]] = {}
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"{self.folder}, the folder of the benchmark's data, is not a directory")

    def rows(self, repository: str, config: str | None, split: str = "train") -> list[Any]:
        """Read the rows of a set, once for all splits of a benchmark that have it.

        Args:
            repository: The name on the hub, such as "locuslab/TOFU".
            config: The name of the config, such as "forget10"; None for a repository without configs.
            split: The name of the split, "train" by default.

        Returns:
            The rows: dicts, or texts.

        Raises:
            ValueError: The set is not there. The message says how it is downloaded, and to where.
        """
        key = repository, config, split
        if key not in self._known:
            self._known[key] = self._read(*key)
        return self._known[key]

    def _read(self, repository: str, config: str | None, split: str) -> list[Any]:
        if self.folder is None:
            return self._from_hub(repository, config, split)
        for root in (self.folder / repository.split("/")[-1], self.folder):
            if files := _named_files(root, config, split) or _listed_files(root, config, split):
                return [row for file in files for row in read_rows(file)]
        name = split if config is None else config
        raise ValueError(
            f"{self.folder} has no set {_shown(config, split)} of {repository}: neither {name}.jsonl nor "
            f"{name}/{split}.jsonl, in whichever format, nor a README.md that names its files. "
            f"{_download(repository, self.folder)}"
        )

    def _from_hub(self, repository: str, config: str | None, split: str) -> list[Any]:
        try:
            return list(read_rows(f"{repository}:{config or ''}:{split}"))
        except ImportError:
            raise
        except Exception as error:  # datasets and its libraries raise many kinds without a network
            raise ValueError(
                f"the set {_shown(config, split)} of {repository} could not be read from the hub "
                f"({type(error).__name__}: {str(error).strip()[:300]}). "
                f"{_download(repository, Path('FOLDER'))}"
            ) from error


def _shown(config: str | None, split: str) -> str:
    return repr(split) if config is None else f"{config!r} (split {split!r})"


def _download(repository: str, folder: Path) -> str:
    """Say how a repository is downloaded where there is a network."""
    place = folder / repository.split("/")[-1]
    return (
        f"Where there is a network: hf download {repository} --repo-type dataset --local-dir {place}; "
        f"then --data {folder}"
    )


def _named_files(root: Path, config: str | None, split: str) -> list[Path]:
    """Return the file, the shards or the saved folder that is named as a set; [] if there is none."""
    if config is None:
        stems = [root / split, root / "data" / split]
    else:
        stems = [root / config / split, root / "data" / config / split]
        if split in ("train", "test"):  # of a set with one split
            stems.append(root / config)
    for stem in stems:
        if (stem / "state.json").is_file():
            return [stem]
        for suffix in _SUFFIXES:
            file = stem.with_name(stem.name + suffix)
            if file.is_file():
                return [file]
        if shards := sorted(stem.parent.glob(f"{stem.name}-[0-9]*-of-[0-9]*")):
            return shards
    return []


def _listed_files(root: Path, config: str | None, split: str) -> list[Path]:
    """Return the files of a set by the head of the README.md of a download; [] if it names none."""
    readme = root / "README.md"
    if not readme.is_file():
        return []
    head = readme.read_text(encoding="utf-8").split("\n---", 1)[0].removeprefix("---")
    try:
        configs = (yaml.safe_load(head) or {}).get("configs") or []
        patterns = [
            pattern
            for entry in configs
            if entry["config_name"] == (config or "default")
            for pattern in _patterns(entry.get("data_files"), split)
        ]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the head of {readme} is not that of a data set on the hub: {error}") from error
    files = [file for pattern in dict.fromkeys(patterns) for file in sorted(root.glob(pattern))]
    return list(dict.fromkeys(files))


def _patterns(data_files: Any, split: str) -> list[str]:
    """Return the patterns of the files of a split in a ``data_files`` of the hub."""
    if data_files is None:
        return []
    entries = data_files if isinstance(data_files, list) else [data_files]
    found = []
    for entry in entries:
        if isinstance(entry, Mapping) and entry.get("split", split) != split:
            continue
        path = entry["path"] if isinstance(entry, Mapping) else entry
        found += [path] if isinstance(path, str) else list(path)
    return found


def check_columns(rows: Sequence[Any], columns: Sequence[str], name: str) -> None:
    """Check that a set has rows, and that each row has some columns.

    Args:
        rows: The rows.
        columns: The names of the columns.
        name: The name of the set in messages.

    Raises:
        ValueError: The set is empty, or a row lacks a column.
    """
    if not len(rows):
        raise ValueError(f"the set {name} is empty")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or any(row.get(column) is None for column in columns):
            has = list(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"row {index} of the set {name} has no {' and '.join(map(repr, columns))}; it has {has}"
            )


def texts_of(rows: Sequence[Any], name: str) -> list[str]:
    """Return the texts of a set whose rows are texts, or dicts with ``text``.

    Args:
        rows: The rows.
        name: The name of the set in messages.

    Raises:
        ValueError: The set is empty, or a row has no text.
    """
    if not len(rows):
        raise ValueError(f"the set {name} is empty")
    texts: list[str] = []
    for index, row in enumerate(rows):
        text = row.get("text") if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise ValueError(f"row {index} of the set {name} is no text, and has no 'text' that is one")
        texts.append(text)
    return texts
