"""docs/serving.md has the committed results of scripts/check_serving.py, and the rules that it states."""

import importlib.util
import json
from pathlib import Path

import pytest

from loku.serving import serving_lines
from loku.serving.rules import GGUF_ARCHITECTURES, VLLM_WITHOUT_LORA

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "scripts" / "serving_table.json").read_text(encoding="utf-8"))


def test_the_page_has_the_results():
    spec = importlib.util.spec_from_file_location("check_serving", ROOT / "scripts" / "check_serving.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert {fact["server"] for fact in RESULTS} == {"peft", "vLLM", "llama.cpp"}
    assert PAGE == script.render(PAGE, RESULTS), "run: python scripts/check_serving.py"


@pytest.mark.parametrize("target", ["peft", "vllm", "gguf", "tgi", "ollama"])
def test_the_page_has_the_lines(target):
    lines = serving_lines(target, "adapter", base="org/base", rank=32)
    assert all(line in PAGE for line in lines), lines


def test_the_page_has_the_lines_of_a_merged_model():
    assert all(line in PAGE for line in serving_lines("merged", "model"))


def test_the_page_has_the_classes():
    assert all(f"`{name}`" in PAGE for name in [*GGUF_ARCHITECTURES, *VLLM_WITHOUT_LORA])
