"""LoKU: unlearning for causal language models over transformers and peft."""

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
