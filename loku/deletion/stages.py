"""The stages of a run: each leaves its result on disk, so a run that was killed goes on after the last."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loku.saving.directories import whole_file


class Stages:
    """The results of stages in a directory, one JSON file each.

    Args:
        directory: The directory, which exists and is private to the run.
        show: Whether each stage prints a line to the standard error when it begins.
    """

    def __init__(self, directory: Path, show: bool = True) -> None:
        self._directory, self._show = directory, show
        self.seconds: dict[str, float] = {}  # of every stage so far, in all runs that took part

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of a stage, from disk if an earlier run has come so far.

        Args:
            name: The name of the stage, which names its file.
            compute: A function without arguments that computes the result, which JSON can hold.

        Raises:
            ValueError: The result has a NaN or Inf, or its file is damaged.
        """
        file = self._directory / f"{name}.json"
        if file.is_file():
            try:
                kept = json.loads(file.read_text(encoding="utf-8"))
                self.seconds[name] = kept["seconds"]
                return kept["result"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{file} is damaged: delete it, and the stage runs again") from error
        if self._show:
            print(f"{name.replace('_', ' ')} ...", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        result = compute()
        self.seconds[name] = time.perf_counter() - begin
        text = json.dumps({"seconds": self.seconds[name], "result": result}, allow_nan=False)
        with whole_file(file) as new:
            new.write_text(text, encoding="utf-8")
        return json.loads(text)["result"]  # as a later run reads it: keys are texts, tuples are lists
