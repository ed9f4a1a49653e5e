"""LoKU: unlearning for causal language models over transformers and peft.

``import loku`` is quick: a name, or a module such as ``loku.data``, is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loku.callbacks import ExtractionStopping, ProbabilityGauge, UtilityFloorStopping
    from loku.checkpoints import initialize_from_checkpoint
    from loku.config import UnlearnConfig
    from loku.fila.initialize import get_fila_state_dict, initialize_lora_fila_weights, reference_model
    from loku.fila.row_scales import FilaConfig
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
    "initialize_lora_fila_weights",
    "reference_model",
    "save_merged_model",
    "save_portable_adapter",
    "save_residual_model",
    "unlearn",
]

# The modules of these names. Type checkers and the docs read the same from the imports under TYPE_CHECKING.
_MODULES = {
    "callbacks": ("ExtractionStopping", "ProbabilityGauge", "UtilityFloorStopping"),
    "checkpoints": ("initialize_from_checkpoint",),
    "config": ("UnlearnConfig",),
    "fila.initialize": ("get_fila_state_dict", "initialize_lora_fila_weights", "reference_model"),
    "fila.row_scales": ("FilaConfig",),
    "saving.adapter": ("save_portable_adapter",),
    "saving.models": ("save_merged_model", "save_residual_model"),
    "trainer": ("UnlearnTrainer",),
    "unlearning": ("UnlearnResult", "unlearn"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"loku.{module}"), name)
            globals()[name] = value
            return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"loku.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"loku.{name}":
                raise
    raise AttributeError(f"module 'loku' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
