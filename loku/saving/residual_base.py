"""A peft model whose base holds the residual: peft's own methods, as right as on an untouched base.

FILA takes the initial factors out of the base. peft does not know that. Its ``save_pretrained`` would write
an adapter that loads on the untouched base without a word and computes another function. So FILA turns the
peft model into one of a subclass. ``save_pretrained``, and with it ``Trainer.save_model`` and
``push_to_hub``, writes the portable adapter. ``disable_adapter`` gives the original model. What cannot be
made right is refused.

A subclass, and no attribute of the instance, survives ``copy.deepcopy``, ``pickle``, ``torch.save`` and the
wrappers of accelerate, and FSDP2 makes its own class of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from loku.adapters import REFERENCE_ADAPTER, active_adapters, has_residual_base, stands_for_another_base
from loku.interrupts import uninterrupted_context
from loku.saving.adapter import loaded_from, portable_adapter
from loku.saving.adapter_files import standardise_configs_, write_adapter
from loku.saving.destinations import destination
from loku.saving.directories import whole_file
from loku.saving.merged_adapters import merged_adapter_facts, remember_merged_adapter_


class ResidualBase(PeftModel):
    """The methods of a ``PeftModel`` on a residual base. ``on_residual_base_`` puts them into a model."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters for the *untouched* base, as ``loku.save_portable_adapter`` does.

        Args:
            save_directory: The directory. The adapter "default" goes into it, any other into a folder of its
                name. The last save into it makes way, and other files stay.
            safe_serialization: Whether to write safetensors (default) or a pickle.
            selected_adapters: The names of the adapters; None (default) saves all but "reference". Each is
                saved as the model with this adapter alone.
            save_embedding_layers: As in ``PeftModel.save_pretrained``.
            is_main_process: Whether this process writes. Processes that do not write must call this too if
                the adapter is sharded and there is no ``state_dict``.
            path_initial_model_for_weight_conversion: Must be None: the adapter is converted already.
            kwargs: ``state_dict``, the state dict of this model, to read the adapters from.

        Raises:
            ValueError: An adapter cannot be saved so, or ``save_directory`` is a file.
            OSError: ``save_directory`` cannot be written.
        """
        if not stands_for_another_base(self):
            super().save_pretrained(
                str(save_directory),
                safe_serialization,
                selected_adapters,
                save_embedding_layers,
                is_main_process,
                path_initial_model_for_weight_conversion,
                **kwargs,
            )
            if is_main_process:
                standardise_configs_(save_directory, self)
            return
        if path_initial_model_for_weight_conversion is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion is not needed: the saved adapter is already the "
                "difference from the original model"
            )
        if selected_adapters is None:
            selected_adapters = [name for name in self.peft_config if name != REFERENCE_ADAPTER]
        # All are computed before one is written, so that a refusal leaves the directory as it was.
        adapters = {
            name: portable_adapter(
                self,
                name,
                state_dict=kwargs.get("state_dict"),
                save_embedding_layers=save_embedding_layers,
            )
            for name in selected_adapters
        }
        if not is_main_process:
            return
        for name, (config, state) in adapters.items():
            folder = Path(save_directory) if name == "default" else Path(save_directory, name)
            sources = loaded_from(self)
            with destination(folder, "portable", refuse_others=False, sources=sources) as directory:
                write_adapter(self, config, state, directory, safe_serialization=safe_serialization)
        readme = Path(save_directory, "README.md")
        readme.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(readme) as unfinished:
            if readme.is_file():
                shutil.copyfile(readme, unfinished)
            self.create_or_update_model_card(str(unfinished.parent))

    @uninterrupted_context
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model computes as the original model, by its adapter "reference"."""
        if not has_residual_base(self):
            with super().disable_adapter():
                yield
            return
        with active_adapters(self, [REFERENCE_ADAPTER]):
            yield

    def unload(self) -> nn.Module:
        """Refuse to unload, because the residual is no model that anyone wants."""
        if has_residual_base(self):
            raise ValueError(
                "unload() would leave the residual base, which is not the original model: call "
                "loku.fila.initialize.restore_base_(model) for the original model, or merge_and_unload() for "
                "the unlearned one"
            )
        return self.base_model.unload()  # type: ignore[operator]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; "reference" is refused, because the residual base is useless without it."""
        if has_residual_base(self) and adapter_name == REFERENCE_ADAPTER:
            raise ValueError(
                f"without the adapter {REFERENCE_ADAPTER!r} the original model and the portable adapter are "
                "lost; call loku.fila.initialize.restore_base_(model) to take all adapters off"
            )
        super().delete_adapter(adapter_name)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters into the base and return it, as in peft: by default the active adapter.

        The returned model keeps the adapter's factors in memory. So the portable adapter of a further
        unlearning fits the untouched base.

        Args:
            progressbar: Whether to show a bar.
            safe_merge: Whether to check for NaN.
            adapter_names: The names of the adapters; None (default) merges the active ones.

        Raises:
            ValueError: "reference" is merged with another adapter. The two are alternatives.
        """
        names = adapter_names or self.active_adapters
        if has_residual_base(self) and REFERENCE_ADAPTER in names and len(names) > 1:
            raise ValueError(
                f"the adapters {list(names)} do not add up: {REFERENCE_ADAPTER!r} makes the original model "
                "of the residual base, and every other adapter a trained one; merge one of them"
            )
        facts = merged_adapter_facts(self, list(names))
        merged = self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)  # type: ignore[operator]
        remember_merged_adapter_(merged, facts)
        return merged

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle cannot find it by its name.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_remade, (_plain_class(type(self)),), *reduced[2:])


def _plain_class(model_class: type) -> type:
    parents = (parent for parent in model_class.__mro__ if issubclass(parent, PeftModel))
    return next(parent for parent in parents if not issubclass(parent, ResidualBase))


def _remade(model_class: Any) -> nn.Module:
    model = model_class.__new__(model_class)
    model.__class__ = _residual_class(model_class)
    return model


@cache
def _residual_class(model_class: type) -> type:
    return type(f"Residual{model_class.__name__}", (ResidualBase, model_class), {})


def on_residual_base_(peft_model: PeftModel) -> None:
    """Give a peft model the methods of ``ResidualBase``; FILA does it once the base holds the residual.

    They act as peft's again where the model has no adapter "reference".

    Args:
        peft_model: The model, which FSDP2 may have wrapped.
    """
    model_class: Any = type(peft_model)
    if not issubclass(model_class, ResidualBase):
        peft_model.__class__ = _residual_class(model_class)
