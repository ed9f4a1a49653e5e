"""The rows of a request: those to forget, those to keep, the hold-out set, and those of earlier requests."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from itertools import compress
from typing import Any

from loku.data import tokenize_dataset
from loku.deletion import ledger
from loku.deletion.duplicates import Separated, find_duplicates, separate
from loku.deletion.request import Request
from loku.deletion.retain import build_retain, split_for_utility
from loku.deletion.selection import SelectedRows, check_holdout, select_rows
from loku.deletion.texts import compared_text


class RequestRows:
    """The rows of a request. They are read when they are first asked for.

    Args:
        request: The request.
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    @cached_property
    def selected(self) -> SelectedRows:
        """The rows that the request names."""
        return select_rows(self._request.forget, "forget")

    @cached_property
    def given_holdout(self) -> list[Any] | None:
        """The hold-out rows of the request; None if it has none."""
        return None if self._request.holdout is None else select_rows(self._request.holdout, "holdout").rows

    @property
    def holdout(self) -> list[Any] | None:
        """The hold-out rows without those that are forgotten, too; None if the request has none."""
        return self.separated.sets.get("holdout")

    @cached_property
    def separated(self) -> Separated:
        """The rows to forget, and what else is equal or nearly equal to them."""
        selected, source = self.selected, self._request.retain
        others: dict[str, Any] = {"rest": selected.rest}
        for name, selection in (("retain", source.given), ("corpus", source.corpus)):
            if selection is not None:
                others[name] = select_rows(selection, name).rows
        if self.given_holdout is not None:
            others["holdout"] = self.given_holdout
        found = find_duplicates(selected.rows, others, self._request.near_duplicate_similarity)
        include = self._request.include_near_duplicates
        return separate(selected.rows, others, found, include, {"rest": selected.rest_indices})

    @property
    def forget(self) -> list[Any]:
        """The rows to forget, with the near duplicates that are taken along."""
        return self.separated.forget

    @cached_property
    def earlier(self) -> list[ledger.EarlierRequest]:
        """The requests that the ledger holds already."""
        return [] if self._request.ledger is None else ledger.earlier_requests(self._request.ledger)

    @cached_property
    def earlier_rows(self) -> dict[int, list[Any] | None]:
        """The rows of the earlier requests by their numbers in the ledger; None where they are gone."""
        found: dict[int, list[Any] | None] = {}
        for earlier in self.earlier:
            found[earlier.entry.number] = None
            if earlier.forget is not None:
                with suppress(OSError, ValueError):  # the data was to be deleted, so it may be gone
                    found[earlier.entry.number] = select_rows(earlier.forget, earlier.entry.record).rows
        return found

    def found(self) -> dict[str, Any]:
        """Choose the rows, and tell what was chosen and what is equal or nearly equal to them.

        Raises:
            ValueError: A hold-out row is a row of another set, or none is left.
        """
        if self.given_holdout is not None:
            check_holdout(self.given_holdout, forget=self.selected.rows)
            check_holdout(self.given_holdout, retain=self.separated.sets.get("retain", []))
            if not self.holdout:
                raise ValueError(
                    "holdout: all of its rows are nearly the same as a forget row. It must be unknown to the "
                    "model; name others"
                )
        selected = self.selected
        return {
            "selected": len(selected.rows),
            "total": selected.total,
            "indices": selected.indices,
            "near_duplicates": self.separated.facts,
        }

    def to_keep(self, model: Any, tokenizer: Any, progress: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Build the retain set; the model writes some of its rows.

        Args:
            model: The model from which unlearning starts.
            tokenizer: The tokenizer.
            progress: Whether to show progress bars.

        Returns:
            ``trained``, the rows to train on, with ``measured``, the rows that show what is kept by the names
            of the sets; and the facts.

        Raises:
            ValueError: There are too few rows.
        """
        forgotten = [row for earlier in self.earlier_rows.values() if earlier for row in earlier]
        rows, told = build_retain(
            model,
            tokenizer,
            self._request.retain,
            [*self.forget, *forgotten],
            progress=progress,
            template=self._request.template,
        )
        # A row of the user's may equal one that is forgotten, too, since near duplicates were taken along;
        # and a row of the corpus may be in the hold-out set.
        barred = (*self.forget, *forgotten, *self.separated.left_out, *(self.given_holdout or ()))
        texts = {compared_text(row) for row in barred}
        # A row of another form may have the same tokens.
        template = self._request.template
        forget = tokenize_dataset(self.forget, tokenizer, name="forget", template=template)
        same = {tuple(row["input_ids"]) for row in forget}
        tokens = tokenize_dataset(rows, tokenizer, name="retain", template=template) if rows else []
        keep = [
            compared_text(row) not in texts and tuple(ids["input_ids"]) not in same
            for row, ids in zip(rows, tokens, strict=True)
        ]
        own = sum(told.get(part, {}).get("rows", 0) for part in ("given", "neighbours"))
        parts = {
            "retain": [*compress(rows[:own], keep)],
            "general": [*compress(rows[own:], keep[own:])],
        }
        told["left_out"] = len(rows) - sum(map(len, parts.values()))
        trained, measured = [], {}
        for name, of_part in parts.items():
            if len(of_part) > 1:
                of_training, measured[name] = split_for_utility(of_part)
                trained += of_training
            else:
                trained += of_part
        if not measured:
            raise ValueError(
                f"retain: {len(trained)} rows are too few, because some of them measure what is kept: give "
                "at least 2 rows, or let the model write texts (sampled: 32)"
            )
        told["trained"] = len(trained)
        told["measured"] = {name: len(of_part) for name, of_part in measured.items()}
        return {"trained": trained, "measured": measured}, told
