"""The packages that an import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_lazy_names_are_those_that_type_checkers_see():
    import loku

    tree = ast.parse(Path(loku.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If)).body
    seen = {node.module: tuple(alias.name for alias in node.names) for node in checked}
    assert seen == {f"loku.{module}": names for module, names in loku._MODULES.items()}
    assert sorted(name for names in seen.values() for name in names) == loku.__all__
    assert all(getattr(loku, name).__name__ == name for name in loku.__all__)
    assert set(loku.__all__) <= set(dir(loku))


def test_modules_are_attributes_after_the_import_of_loku():
    code = "import loku; loku.data.tokenize_dataset, loku.evaluation.evaluate, loku.objectives, loku.demo"
    assert "loku" in loaded_by(code)
    import loku

    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        loku.unlern  # noqa: B018
    assert not any(hasattr(loku, name) for name in ("nope.sub", "data.rows", "embedded", "_private"))
    assert {"data", "trainer", "evaluation", "unlearn"} <= set(dir(loku))


def test_a_patch_of_a_module_does_not_outlive_itself():
    code = """
import unittest.mock, loku
with unittest.mock.patch("loku.unlearning.unlearn", None):
    assert loku.unlearn is None
assert loku.unlearn.__name__ == "unlearn"
"""
    assert "loku" in loaded_by(code)


@pytest.mark.parametrize("arguments", [["--help"], ["info"]], ids=" ".join)
def test_help_and_info_do_not_wait_for_transformers(arguments):
    code = f"""
import contextlib, io
from loku.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main({arguments})
"""
    assert not loaded_by(code) & {"transformers", "peft", "accelerate"}
