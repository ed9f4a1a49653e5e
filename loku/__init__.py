"""LoKU: unlearning for causal language models over transformers and peft.

``import loku`` is quick: a name, or a module such as ``loku.data``, is imported when it is first used.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loku.adapters import reference_model
    from loku.callbacks import ExtractionStopping, ProbabilityGauge, UtilityFloorStopping
    from loku.checkpoint_factors import initialize_from_checkpoint
    from loku.config import UnlearnConfig
    from loku.fila.initialize import (
        get_fila_state_dict,
        initialize_from_factors,
        initialize_lora_fila_weights,
    )
    from loku.fila.settings import FilaConfig
    from loku.saving.adapter import save_portable_adapter
    from loku.saving.models import save_merged_model, save_residual_model
    from loku.trainer import UnlearnTrainer
    from loku.unlearning import UnlearnResult, unlearn

__all__ = [
    "ExtractionStopping",
    "FilaConfig",
    "ProbabilityGauge",
    "UnlearnConfig",
    "UnlearnResult",
    "UnlearnTrainer",
    "UtilityFloorStopping",
    "get_fila_state_dict",
    "initialize_from_checkpoint",
    "initialize_from_factors",
    "initialize_lora_fila_weights",
    "reference_model",
    "save_merged_model",
    "save_portable_adapter",
    "save_residual_model",
    "unlearn",
]

# The modules of these names. Type checkers and the docs read the same from the imports under TYPE_CHECKING.
_MODULES = {
    "adapters": ("reference_model",),
    "callbacks": ("ExtractionStopping", "ProbabilityGauge", "UtilityFloorStopping"),
    "checkpoint_factors": ("initialize_from_checkpoint",),
    "config": ("UnlearnConfig",),
    "fila.initialize": (
        "get_fila_state_dict",
        "initialize_from_factors",
        "initialize_lora_fila_weights",
    ),
    "fila.settings": ("FilaConfig",),
    "saving.adapter": ("save_portable_adapter",),
    "saving.models": ("save_merged_model", "save_residual_model"),
    "trainer": ("UnlearnTrainer",),
    "unlearning": ("UnlearnResult", "unlearn"),
}

if not TYPE_CHECKING:  # type checkers must report an unknown name

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                # It is not kept here: a patch of the module must not outlive itself.
                return getattr(importlib.import_module(f"loku.{module}"), name)
        if name in _submodules():
            return importlib.import_module(f"loku.{name}")
        raise AttributeError(f"module 'loku' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_submodules()})


def _submodules() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
