"""As a script: the peak memory of the Fisher passes, with and without a budget, as JSON.

A process of its own measures it. In a large process the system takes pages back before the measurement, and
gives them again during it.
"""

import ctypes
import json

import torch
from fisher_batches import batches, rows, targets
from peak_memory import PeakMemory
from transformers import LlamaConfig, LlamaForCausalLM

from loku.fila.row_scales import fisher_row_scales, gradients_for_activations_alone
from loku.head import negative_log_likelihood

BUDGET = 16 << 20
MMAP_THRESHOLD = -3


def main():
    torch.set_num_threads(1)
    # malloc maps each matrix anew. It would count pages that it has kept already.
    getattr(ctypes.CDLL(None), "mallopt", lambda *args: None)(MMAP_THRESHOLD, 1 << 18)
    torch.manual_seed(0)
    size = {"vocab_size": 97, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 5}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4))
    data = batches(rows(6, 0), 2)

    def plain():
        with gradients_for_activations_alone(model):
            for batch in data:
                negative_log_likelihood(model, batch).backward()

    def peak(function):
        function()  # the first call allocates memory that stays
        memory = PeakMemory()
        function()
        return memory.extra()

    def measure(budget):
        return lambda: fisher_row_scales(
            model, targets(model), data, data, memory_budget=budget, progress=False
        )

    peaks = {"plain": plain, "budget": measure(BUDGET), "no budget": measure(None)}
    print(json.dumps({name: peak(function) for name, function in peaks.items()}))


if __name__ == "__main__":
    main()
