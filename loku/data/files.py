"""Data sets by name: files, folders and the Hugging Face hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
LINE_END = re.compile(r"\r\n|\n|\r")
# Text that is compressed is seldom smaller than a tenth. A file of a few MB of zeros could fill any memory.
MOST_EXPANSION = 200
LARGE = 2**30  # bytes; up to here a file may expand as it likes
FORMATS = f"{', '.join(TEXT_SUFFIXES)} (each also with .gz) and .parquet"


class _Records(NamedTuple):
    """The rows of a file, and the line where each begins, from 1; no lines if the format has none."""

    rows: list[Any]
    lines: list[int] | None


def read_rows(source: str | os.PathLike) -> list[Any] | Dataset:
    """Read a data set for ``loku.unlearn`` and ``loku.evaluation.evaluate``.

    Args:
        source: A file, a folder, or a name on the Hugging Face hub. A suffix may be in capitals.

            - A ``.json``, ``.jsonl`` or ``.ndjson`` file has one JSON value on each line, as TOFU's files do,
              or one JSON list.
            - A ``.csv`` file has columns apart by commas, and a ``.tsv`` file by tabs. The first line names
              the columns. Each cell is the text that stands in the file. An empty cell is a missing value,
              None.
            - A ``.txt`` file has a text on each line. Empty lines are passed over.
            - A ``.parquet`` file needs the package ``pyarrow``.
            - Each of the text formats may be compressed by gzip, as in ``rows.jsonl.gz``. A text is UTF-8,
              with or without a byte order mark.
            - A folder that ``datasets.Dataset.save_to_disk`` wrote needs the package ``datasets``. Any other
              folder has the shards of one data set, such as ``train-00000-of-00002.parquet``. They are read
              in the order of their names.
            - ``NAME[:CONFIG[:SPLIT]]`` names a data set on the hub, such as
              ``locuslab/TOFU:forget10_perturbed``. Its split is "train" by default. It needs the package
              ``datasets``. A file or folder that exists is never looked for on the hub.

    Returns:
        The rows: the texts, dicts or JSON values of the files, or the ``datasets.Dataset``.

    Raises:
        FileNotFoundError: The source looks like a path, and nothing is there.
        ValueError: The format is unknown; the file is empty, broken or not UTF-8; a line is not JSON; or a
            folder is not one data set. The message names the file and the line.
        ImportError: A package is missing.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return _records(path).rows
    if not isinstance(source, str):
        raise FileNotFoundError(f"there is no file {path}")
    check_may_be_on_hub(source)
    return _from_hub(source)


def place_of_row(source: str | os.PathLike, index: int) -> str:
    """Return the place of a row as a person looks for it: the file and the line, if the source has lines.

    Args:
        source: The source, as for ``read_rows``.
        index: The index of the row, from 0.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not _saved_dataset(path):
        for shard in _shards(path):
            records = _records(shard)
            if index < len(records.rows):
                break
            index -= len(records.rows)
        path = shard
    elif path.is_file():
        records = _records(path)
    else:
        return str(source)
    return f"{path}, line {records.lines[index]}" if records.lines else f"{path}"


def _suffix(path: Path) -> str:
    """Return the suffix that names the format, in small letters; ``.gz`` belongs to the one before it."""
    name = path.name.lower()
    compressed = name.endswith(".gz")
    known = TEXT_SUFFIXES if compressed else FILE_SUFFIXES
    return next((suffix for suffix in known if name.removesuffix(".gz").endswith(suffix)), "")


def _records(path: Path) -> _Records:
    suffix = _suffix(path)
    if not suffix:
        raise ValueError(f"{path} has no known format; the suffixes of the formats are {FORMATS}")
    if suffix == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    if suffix in (".csv", ".tsv"):
        return _table(path, text, "," if suffix == ".csv" else "\t")
    if suffix == ".txt":
        numbered = _lines(text)
        return _Records([line for _, line in numbered], [number for number, _ in numbered])
    return _json(path, text)


def read_text(path: Path) -> str:
    """Read a text in UTF-8, which may be compressed by gzip.

    Raises:
        ValueError: It is none, or it is too large when it is decompressed. The message names file and line.
        OSError: The file cannot be read.
    """
    data = _decompressed(path) if path.name.lower().endswith(".gz") else path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        raise ValueError(f"{path}, line {_line_number(before)} is not text in UTF-8: {error}") from error
    before, nul, _ = text.partition("\0")
    if nul:  # UTF-16 without a mark decodes so
        raise ValueError(f"{path}, line {_line_number(before)} is not text in UTF-8: it has NUL characters")
    return text


def _decompressed(path: Path) -> bytes:
    """Decompress a file piece by piece, so that one that would fill the memory is noticed before."""
    most = max(LARGE, MOST_EXPANSION * path.stat().st_size)
    pieces: list[bytes] = []
    length = 0
    try:
        with gzip.open(path) as file:
            while piece := file.read(2**20):
                pieces.append(piece)
                length += len(piece)
                if length > most:
                    raise ValueError(
                        f"{path} has more than {most} bytes when it is decompressed, more than "
                        f"{MOST_EXPANSION} times its own; decompress it yourself if you trust it"
                    )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    return b"".join(pieces)


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not empty, each with its number from 1.

    ``str.splitlines`` would also split at U+2028 and others, which stand inside of texts.
    """
    lines = LINE_END.split(text)
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _line_number(before: str) -> int:
    """Return the number, from 1, of the line that follows a part of a file."""
    return len(LINE_END.findall(before)) + 1


def _json(path: Path, text: str) -> _Records:
    if text.lstrip().startswith("["):
        try:
            return _Records(_parsed(text), None)
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON list: {error}") from error
    rows, lines = [], []
    for number, line in _lines(text):
        try:
            rows.append(_parsed(line))
        except ValueError as error:
            if not rows and _is_one_object(text):
                raise ValueError(f"{path} is one JSON object; {_WANTED_JSON}") from error
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        lines.append(number)
    if len(rows) == 1 and _is_table(rows[0]):
        raise ValueError(f"{path} is one JSON object of columns, {list(rows[0])}; {_WANTED_JSON}")
    return _Records(rows, lines)


_WANTED_JSON = (
    "write a JSON list of rows, or one row on each line "
    "(in pandas: to_json(path, orient='records', lines=True))"
)


def _parsed(text: str) -> Any:
    """Parse strict JSON: no key twice, no NaN. A ``JSONDecodeError`` is a ``ValueError`` too."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    except ValueError as error:
        if "set_int_max_str_digits" not in str(error):
            raise
        raise ValueError(f"an integer has more than {sys.get_int_max_str_digits()} digits") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"the key {twice[0]!r} is there twice in one object")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; a missing value is null")


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(_parsed(text), dict)
    except ValueError:
        return False


def _is_table(row: Any) -> bool:
    """Whether an object holds whole columns or lists of rows, and not the values of one row."""

    def is_value(value: Any) -> bool:  # of one row: tokens, or messages
        first = value[0] if isinstance(value, list) and value else value
        return isinstance(first, int) or (isinstance(first, dict) and bool(first.keys() & {"role", "from"}))

    return (
        isinstance(row, dict)
        and bool(row)
        and all(isinstance(value, (list, dict)) and not is_value(value) for value in row.values())
    )


def _table(path: Path, text: str, delimiter: str) -> _Records:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # the default of 131072 characters is less than a long text has
    header: list[str] = []
    rows: list[Any] = []
    lines: list[int] = []
    begin = 1  # a quoted cell may span lines
    try:
        for cells in reader:
            if cells and not header:
                header = _header(path, cells)
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path}, line {begin} has {len(cells)} cells, and the header has {len(header)}; "
                        f"quote a cell that holds the separator"
                    )
                rows.append({name: cell or None for name, cell in zip(header, cells, strict=True)})
                lines.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {begin}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{path} has a header and no rows")
    return _Records(rows, lines)


def _header(path: Path, names: list[str]) -> list[str]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{path}: the column {twice[0]!r} is there twice in the header {names}")
    if len(names) == 1 and (other := re.search(r"[;,\t|]", names[0])):
        raise ValueError(
            f"{path}: its columns are apart by {other[0]!r}; those of a .csv file are apart by commas, and "
            f"those of a .tsv file by tabs"
        )
    return names


def _parquet(path: Path) -> _Records:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise ImportError(f"to read {path}, install pyarrow: pip install pyarrow") from error
    try:
        rows = read_table(path).to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty")
    return _Records(rows, None)


def _saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder, of one split or of several."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _folder(path: Path) -> list[Any] | Dataset:
    if not _saved_dataset(path):
        return [row for shard in _shards(path) for row in _records(shard).rows]
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ImportError(f"to read {path}, install datasets: pip install datasets") from error
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ValueError(
            f"{path} has the splits {', '.join(splits)}; name the folder of one split, such as "
            f"{path / splits[0]}"
        )
    return load_from_disk(str(path))


def _shards(path: Path) -> list[Path]:
    """Return the files of a folder, which are the shards of one data set, in the order of their names."""
    files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file))
    if not files:
        raise ValueError(
            f"{path} is a folder without data: datasets' save_to_disk did not write it, and it has no files "
            f"of the formats {FORMATS}"
        )
    if len({re.sub(r"\d+", "0", file.name) for file in files}) > 1:
        raise ValueError(
            f"{path} has several data sets: {', '.join(file.name for file in files)}; name one file, or a "
            f"folder with the shards of one data set alone"
        )
    return files


def check_may_be_on_hub(name: str, folder: Path | None = None) -> None:
    """Raise ``FileNotFoundError`` for a name that looks like a path.

    Names on the hub have at most one slash. They may have a point, as in ``teknium/OpenHermes-2.5``.

    Args:
        name: The name.
        folder: The folder where relative paths begin; None (default) for the current directory.
    """
    place = name.split(":")[0]
    path = (folder or Path()) / Path(place).expanduser()
    if path.is_file() or _saved_dataset(path):
        raise FileNotFoundError(f"there is no file {name}; {place} is there, and it takes no CONFIG or SPLIT")
    in_a_folder = "/" in place and path.parent.is_dir()
    if (
        _suffix(path)
        or place.startswith((".", "/", "~"))
        or place.count("/") > 1
        or ("/" not in place and path.suffix)
        or (in_a_folder and place == name)
    ):
        on_hub = f"; for a data set on the hub write {name}:" if in_a_folder and place.count("/") == 1 else ""
        raise FileNotFoundError(f"there is no file {name}{on_hub if not _suffix(path) else ''}")


def _from_hub(source: str) -> Dataset:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{source!r} is not a file; to look for it on the Hugging Face hub, install datasets: pip "
            f"install datasets. The formats of files are {FORMATS}"
        ) from error
    name, config, split, *more = [*source.split(":"), "", ""]
    if any(more):
        raise ValueError(f"{source!r} is not NAME[:CONFIG[:SPLIT]]")
    # datasets 3 asks whether a set's code may run, and later ones run none.
    return load_dataset(name, config or None, split=split or "train", trust_remote_code=False)
