"""The model's other abilities: the nine reasoning sets of the paper, by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loku.counts import check_counts
from loku.models import CausalLM, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_TASKS = (
    "arc_challenge",
    "arc_easy",
    "copa",
    "hellaswag",
    "lambada_openai",
    "mathqa",
    "piqa",
    "pubmedqa",
    "winogrande",
)


def reasoning_accuracies(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Mapping[str, Any]] = REASONING_TASKS,
    *,
    batch_size: int = 16,
    num_fewshot: int = 0,
    limit: int | None = None,
) -> dict[str, float]:
    """Measure a model's accuracy on tasks of lm-evaluation-harness.

    The harness downloads the sets from the Hugging Face hub when they are first used.

    Args:
        model: The causal LM, with or without an adapter, on the device where it runs.
        tokenizer: The tokenizer.
        tasks: The harness's names of tasks that report ``acc``. By default they are the nine of Jang et al.
            (ACL 2023) and of LoKU. A task that the harness does not have is its config, a dict with "task".
        batch_size: The number of rows in a batch, 16 by default.
        num_fewshot: The number of examples in a prompt, 0 by default.
        limit: The number of rows of each task that are used, for a quick look; None (default) uses all.

    Returns:
        The accuracy of each task, the harness's ``acc``, which is not normalised by length, in [0, 1].

    Raises:
        ImportError: The harness is not installed, or ``datasets`` is older than 4 and would run the scripts
            of data sets.
        ValueError: ``batch_size`` or ``limit`` is less than 1, ``num_fewshot`` is less than 0, or a task
            reports no accuracy.
    """
    check_counts(batch_size=batch_size, limit=1 if limit is None else limit)
    check_counts(0, num_fewshot=num_fewshot)
    lm_eval, language_model = check_harness()
    names = [task if isinstance(task, str) else task["task"] for task in tasks]
    with evaluating(model):
        results = lm_eval.simple_evaluate(
            model=language_model(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False
            ),
            tasks=[task if isinstance(task, str) else dict(task) for task in tasks],
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
        )["results"]
    without = [task for task in names if "acc,none" not in results.get(task, {})]
    if without:
        raise ValueError(f"the harness reports no accuracy of {without}; it has {results}")
    return {task: float(results[task]["acc,none"]) for task in names}


def check_harness() -> tuple[Any, Any]:
    """Check that lm-evaluation-harness can measure, and return its module and its class of models.

    Raises:
        ImportError: The harness is not installed, or ``datasets`` is older than 4 and would run the scripts
            of data sets. The message says what to install.
    """
    try:
        import datasets
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            "the reasoning sets are measured by lm-evaluation-harness, which is not installed: "
            "pip install 'loku-kernels[lm-eval]'"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:  # the harness trusts the scripts of some of its sets
        raise ImportError(
            f"datasets {datasets.__version__} would run code of the reasoning sets: pip install 'datasets>=4'"
        )
    return lm_eval, HFLM
