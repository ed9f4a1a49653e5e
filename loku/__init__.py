"""LoKU: unlearning for causal language models over transformers and peft."""

from loku.callbacks import ExtractionStopping, ProbabilityGauge, UtilityFloorStopping
from loku.checkpoints import initialize_from_checkpoint
from loku.fila import FilaConfig, get_fila_state_dict, initialize_lora_fila_weights, reference_model
from loku.portable import save_portable_adapter
from loku.saves import save_merged_model, save_residual_model
from loku.trainer import UnlearnConfig, UnlearnTrainer
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
