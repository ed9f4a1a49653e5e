"""The packages that an import loads."""

import subprocess
import sys

# The packages that loku imports in the functions that use them.
LATER = ("matplotlib", "scipy", "sklearn", "datasets", "rouge_score", "lm_eval")
# loku imports these at once, and they import other packages in turn, ``datasets`` among them.
AT_ONCE = """
import accelerate, peft, safetensors, tqdm.auto, transformers
import transformers.pytorch_utils, transformers.trainer_pt_utils
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
"""


def loaded_by(code: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter has loaded after some code."""
    code = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_loku_kernels_loads_torch_alone():
    more = loaded_by("import loku_kernels") - loaded_by("import torch")
    assert more - set(sys.stdlib_module_names) <= {"loku_kernels"}


def test_loku_loads_no_package_that_few_functions_use():
    import loku

    everything = f"import loku\nfor name in {loku.__all__}: getattr(loku, name)"
    assert not (loaded_by(everything) - loaded_by(AT_ONCE)) & set(LATER)
