"""What else the model can do: the nine reasoning sets of the paper, by lm-evaluation-harness."""

from loku.models import evaluating

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
    model, tokenizer, tasks=REASONING_TASKS, *, batch_size=16, num_fewshot=0, limit=None
):
    """Accuracy (``acc``, not length-normalised) by task of lm-evaluation-harness: ``{task: float}``.

    The harness downloads the sets from the Hugging Face hub when they are first used. By default they are the
    nine of Jang et al. (ACL 2023) and of LoKU, zero-shot.

    Args:
        model, tokenizer: a causal LM, with or without an adapter, where it is to run.
        tasks: the harness's names of tasks that report ``acc``.
        limit: rows of a task that are used, for a quick look; None for all.

    Raises ``ImportError`` if the harness is not installed, ``ValueError`` for a task without accuracy.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            "the reasoning sets are measured by lm-evaluation-harness, which is not installed: "
            "pip install 'loku-kernels[lm-eval]'"
        ) from error
    with evaluating(model):
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
        )["results"]
    without = [task for task in tasks if "acc,none" not in results.get(task, {})]
    if without:
        raise ValueError(f"the harness reports no accuracy of {without}; it has {results}")
    return {task: float(results[task]["acc,none"]) for task in tasks}
