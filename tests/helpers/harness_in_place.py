"""A module in the place of lm-evaluation-harness, which the tests have not."""

import json
import sys
from types import ModuleType


def use_harness(monkeypatch):
    """Put the module in place, and return what it was asked, ``{argument: value}``.

    The accuracy of a task with rows of its own is the share of the answers that are 1; of others it is 0.5.
    """
    asked = {}

    class HFLM:
        def __init__(self, **options):
            asked["lm"] = options

    def simple_evaluate(tasks, **options):
        asked.update(options, tasks=tasks)
        results = {}
        for task in tasks:
            name, accuracy = task, 0.5
            if isinstance(task, dict):
                name, file = task["task"], task["dataset_kwargs"]["data_files"]["test"]
                with open(file, encoding="utf-8") as stream:
                    answers = [json.loads(line)["answer"] for line in stream]
                accuracy = sum(answer == 1 for answer in answers) / len(answers)
            results[name] = {"acc,none": accuracy}
        return {"results": results}

    modules = [ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")]
    modules[0].simple_evaluate, modules[2].HFLM = simple_evaluate, HFLM
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked
