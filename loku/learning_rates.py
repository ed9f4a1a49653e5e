"""The learning rate of a run that names none: by the size of the model, and by what is trained.

Large models diverge at the rates that small ones need. LoRA's rate below 10M parameters is the best of 1e-3,
2e-3 and 4e-3 on the embedded model of 4.2M parameters (``experiments/tofu.py``). The rates from 1B on are
those of other work: 2e-4 for LoRA (QLoRA, Dettmers et al., 2023, at 7B and 13B), and 1e-5 for all weights
(TOFU, Maini et al., 2024, at 7B). 5e-5 for all weights is that of Jang et al. (2023) for GPT-Neo. The other
rates lie between these. None but the first was tuned here.
"""

import copy
import math
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm

from loku.config import UnlearnConfig
from loku.models import CausalLM, unwrapped

# (parameters of the model, fewer than; LoRA's rate; the rate of all weights)
_RATES = (
    (1e7, 2e-3, 2e-4),
    (1e8, 1e-3, 1e-4),
    (1e9, 5e-4, 5e-5),
    (math.inf, 2e-4, 1e-5),
)


def default_learning_rate(model: CausalLM) -> float:
    """Choose the peak learning rate of a model by its number of parameters.

    Args:
        model: The causal LM. With a peft adapter the rate is one for adapters, else one for all weights.

    Returns:
        The rate. For adapters it is 2e-3 below 10M parameters, 1e-3 below 100M, 5e-4 below 1B, and 2e-4 from
        there on. For all weights it is 2e-4, 1e-4, 5e-5 and 1e-5.
    """
    lora, full = next(rates for most, *rates in _RATES if _parameters(model) < most)
    return lora if isinstance(model, PeftModel) else full


def _parameters(model: CausalLM) -> int:
    base: Any = unwrapped(model)
    adapters = sum(parameter.numel() for name, parameter in base.named_parameters() if ".lora_" in name)
    return int(base.num_parameters()) - adapters  # the method knows packed weights


def with_learning_rate(config: UnlearnConfig, model: CausalLM) -> UnlearnConfig:
    """Return settings with a learning rate. If it is chosen here, a line on stdout says so.

    Args:
        config: The settings.
        model: The causal LM that they will train.

    Returns:
        ``config``, or a copy with ``learning_rate`` if it has none.
    """
    if config.learning_rate is not None:
        return config
    config = copy.copy(config)
    config.learning_rate = default_learning_rate(model)
    if not config.disable_tqdm and config.process_index == 0:
        what = "adapters" if isinstance(model, PeftModel) else "all weights"
        tqdm.write(
            f"learning_rate {config.learning_rate:g}, chosen for {what} of a model of "
            f"{_parameters(model) / 1e6:.3g}M parameters"
        )
    return config
