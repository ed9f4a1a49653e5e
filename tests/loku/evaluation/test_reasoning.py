"""Reasoning accuracies: the calls of lm-evaluation-harness, which is replaced here, and its answers."""

import sys
from types import ModuleType

import pytest

import loku.evaluation as evaluation


def test_reasoning_accuracies(model, monkeypatch):
    tokenizer, asked = object(), {}

    class HFLM:
        def __init__(self, **options):
            asked["lm"] = options
            asked["training"] = options["pretrained"].training

    def simple_evaluate(**options):
        asked["evaluate"] = options
        tasks = {task: {"acc,none": 0.1 * i, "acc_norm,none": 0.9} for i, task in enumerate(options["tasks"])}
        return {"results": {**tasks, "no_accuracy": {"perplexity,none": 3.0}}}

    harness, models, huggingface = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    )
    harness.simple_evaluate, huggingface.HFLM = simple_evaluate, HFLM
    for module in (harness, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("datasets.__version__", "4.0.0")
    model.train()
    accuracies = evaluation.reasoning_accuracies(model, tokenizer, batch_size=4, limit=10)
    assert asked["lm"] == {
        "pretrained": model,
        "tokenizer": tokenizer,
        "batch_size": 4,
        "trust_remote_code": False,
    }
    assert not asked["training"] and model.training
    model.eval()
    assert asked["evaluate"]["limit"] == 10 and asked["evaluate"]["num_fewshot"] == 0
    assert asked["evaluate"]["tasks"] == list(evaluation.REASONING_TASKS) and len(accuracies) == 9
    assert accuracies["copa"] == pytest.approx(0.2) and accuracies["winogrande"] == pytest.approx(0.8)

    harness.simple_evaluate = lambda **options: {"results": {"odd": {"perplexity,none": 3.0}}}
    with pytest.raises(ValueError, match="odd"):
        evaluation.reasoning_accuracies(model, tokenizer, ["odd"])
    monkeypatch.setattr("datasets.__version__", "3.6.0")
    with pytest.raises(ImportError, match=r"code of the reasoning sets: pip install 'datasets>=4'"):
        evaluation.reasoning_accuracies(model, tokenizer)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'loku-kernels\[lm-eval\]'"):
        evaluation.reasoning_accuracies(model, tokenizer)
