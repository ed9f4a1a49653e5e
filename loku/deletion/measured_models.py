"""The models that a run of a request measures: as they were given, and as they are served."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loku.adapter_folders import find_adapter, load_on_base
from loku.deletion import ledger
from loku.deletion.request import Request
from loku.models import load_model
from loku.trust import load_tokenizer, trusts_code


class MeasuredModels:
    """The models of a request by their places. One of them is held in memory at a time.

    Args:
        request: The request.
        folder: The folder of the record, while it is not yet in its place.

    Attributes:
        served: The folder of what will be served, in ``folder``.
    """

    def __init__(self, request: Request, folder: Path) -> None:
        self._request = request
        self.served = str(folder / ("model" if request.target == "merged" else "adapter"))
        self._held: tuple[str, Any] | None = None

    @cached_property
    def start(self) -> str:
        """The state from which unlearning starts: the newest of the ledger, or the model of the request."""
        request = self._request
        newest = None if request.ledger is None else ledger.latest_state(request.ledger)
        return request.model if newest is None else str(newest)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the request."""
        place = self._request.tokenizer or self._request.model
        return load_tokenizer(place, trust_remote_code=trusts_code(self.arguments(self._request.model)))

    def arguments(self, place: str) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` for a model.

        Args:
            place: The model of the request, or what a run has saved.
        """
        given = {"dtype": "auto", **self._request.model_arguments}
        if place != self._request.model:
            return {name: value for name, value in given.items() if name != "subfolder"}
        return given if self._request.revision is None else {**given, "revision": self._request.revision}

    def held(self, place: str) -> Any:
        """Load a model for measuring, unless it is the one that is held.

        Args:
            place: Its path or hub name.
        """
        if self._held is None or self._held[0] != place:
            self.release()
            self._held = place, self.fresh(place)
        return self._held[1]

    def release(self) -> None:
        """Hold no model any more."""
        self._held = None

    def fresh(self, place: str) -> Any:
        """Load a model in evaluation mode, on the accelerator if there is one.

        Args:
            place: Its path or hub name.
        """
        arguments = self.arguments(place)
        # What is served stays unmerged, because a merge rounds to the dtype of the base.
        adapter = find_adapter(place, arguments) if place == self.served else None
        loaded: Any = load_model(place, arguments) if adapter is None else load_on_base(adapter, arguments)[0]
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        return loaded.to(device).eval()
