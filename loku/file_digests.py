"""Digests of files: a file with another digest than its list says is not the file that was written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_digest(path: str | os.PathLike) -> str:
    """Return the SHA-256 of all bytes of a file, in hexadecimal. One core reads about 1 GB a second.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_digests(directory: str | os.PathLike) -> dict[str, str]:
    """Return the ``file_digest`` of each file in a directory and its folders, by its path with slashes.

    Args:
        directory: The directory.

    Raises:
        OSError: A file cannot be read.
    """
    directory = Path(directory)
    return {
        file.relative_to(directory).as_posix(): file_digest(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
