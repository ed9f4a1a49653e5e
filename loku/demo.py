"""``loku demo``: unlearn two authors from a small model that ships with the package, and show the change.

The model is a 4.2M-parameter Llama that has memorised the answers about 40 fictitious authors of TOFU. The
demo makes it forget the last two authors (40 questions, TOFU's forget01) and retain the others. It compares
the model with the log of a twin that was trained without the two. ``scripts/build_embedded_model.py`` made
both.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loku.memory import forget_peak_memory, peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loku.evaluation.tofu import Log, Section
    from loku.models import CausalLM
    from loku.unlearning import UnlearnResult

EMBEDDED = Path(__file__).parent / "embedded"
FORGET_ROWS = 40  # the last rows, about two authors
GAUGE_STRIDE = 8  # every eighth retain row is measured between steps
EVALUATION_BATCH = 32  # rows of a batch

# benchmarks/results/demo.json has the figures of these settings.
SETTINGS: dict[str, Any] = {
    "lora_rank": 8,
    "lora_alpha": 16,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 8,
    "retain_weight": 1.5,
}
# Training stops when both thresholds hold on the gauged rows. Further steps would only damage the retained
# rows.
FORGOTTEN = 0.03  # greatest mean answer probability of the forget rows
RETAINED = 0.92  # least mean answer probability of the gauged retain rows
GAUGE_STEPS = 2  # steps between two measurements

# measure -> (the direction that is good, its meaning)
MEASURES = {
    "forget_probability": ("lower", "how sure the model is of a token of the answers to forget"),
    "retain_probability": ("higher", "how sure it is of a token of the answers to keep"),
    "forget_rouge_l": ("lower", "the share of an answer to forget that it writes by itself, in order"),
    "retain_rouge_l": ("higher", "the same share of an answer to keep"),
    "extraction_likelihood_10": ("lower", "the share of 10-token pieces that it continues word by word"),
    "memorization_accuracy": ("lower", "the share of tokens to forget that are its first guess"),
    "forget_quality": (
        "higher",
        "the p-value of the test that it answers like the twin; above 0.05 it tells no difference",
    ),
    "retain_perplexity": ("lower", "its surprise at a token of the answers to keep; 1 is none"),
}


def load_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Load the questions and answers that the embedded model has memorised.

    Returns:
        The forget rows and the retain rows.
    """
    with open(EMBEDDED / "tofu.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows[-FORGET_ROWS:], rows[:-FORGET_ROWS]


def load_model(
    path: str | os.PathLike = EMBEDDED, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in a dtype and its tokenizer, by default the embedded ones in float32."""
    from transformers import AutoModelForCausalLM

    from loku.trust import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    return model, load_tokenizer(path)


def measure(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Mapping[str, Any]],
    retain: Sequence[Mapping[str, Any]],
    progress: bool = True,
) -> tuple[dict[str, float | None], dict[str, Section]]:
    """Measure a model on the forget and the retain rows.

    Args:
        model: The causal LM.
        tokenizer: The tokenizer.
        forget: The forget rows, with perturbed answers.
        retain: The retain rows.
        progress: Whether to show progress bars, True by default.

    Returns:
        The measures, ``{name: number}``, and the TOFU log with the forget and the retain section.
    """
    from loku.data import tokenize_dataset
    from loku.evaluation import (
        evaluate_tofu_rows,
        extraction_likelihood,
        memorization_accuracy,
        perplexity,
        section_metrics,
    )
    from loku.evaluation.tofu import SECTIONS

    options: dict[str, Any] = {"batch_size": EVALUATION_BATCH, "progress": progress}
    # Only the forget set needs truth ratios.
    plain_retain = [{"question": row["question"], "answer": row["answer"]} for row in retain]
    log = {
        SECTIONS["forget"]: evaluate_tofu_rows(model, tokenizer, forget, **options),
        SECTIONS["retain"]: evaluate_tofu_rows(model, tokenizer, plain_retain, **options),
    }
    forget_metrics = section_metrics(log[SECTIONS["forget"]], forget=True)
    retain_metrics = section_metrics(log[SECTIONS["retain"]])
    forget_tokens = tokenize_dataset(forget, tokenizer, name="forget")
    metrics: dict[str, float | None] = {
        "forget_probability": forget_metrics["probability"],
        "retain_probability": retain_metrics["probability"],
        "forget_rouge_l": forget_metrics["rouge"],
        "retain_rouge_l": retain_metrics["rouge"],
        "extraction_likelihood_10": extraction_likelihood(model, forget_tokens, n=10, **options).mean,
        "memorization_accuracy": memorization_accuracy(model, forget_tokens, **options),
        "forget_quality": None,
        "retain_perplexity": perplexity(
            model, tokenize_dataset(plain_retain, tokenizer, name="retain"), **options
        ),
    }
    return metrics, log


class _Stages:
    """The wall-clock seconds and the peak memory of each stage, in the order in which the stages ran."""

    def __init__(self, show: bool):
        self.seconds: dict[str, float] = {}
        self.peak_memory_bytes: dict[str, int] = {}
        self._show = show

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._show:
            print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        forget_peak_memory()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peak_memory_bytes[name] = peak_memory()


def unlearn_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Mapping[str, Any]],
    retain: Sequence[Mapping[str, Any]],
    output: str | os.PathLike,
    seed: int = 0,
    progress: bool = True,
) -> tuple[UnlearnResult, list[dict[str, float]]]:
    """Unlearn with the demo's settings.

    Args:
        model: The causal LM, which is consumed.
        tokenizer: The tokenizer.
        forget: The forget rows.
        retain: The retain rows.
        output: The trainer's directory.
        seed: The seed of the run, 0 by default.
        progress: Whether to show a progress bar, True by default.

    Returns:
        The result, and the measurements between the steps.
    """
    from loku import ProbabilityGauge, UnlearnConfig, unlearn

    config = UnlearnConfig(
        **SETTINGS,
        output_dir=str(output),
        seed=seed,
        disable_tqdm=not progress,
        logging_strategy="no",
    )
    gauge = ProbabilityGauge(
        {"forget": forget, "retain": retain[::GAUGE_STRIDE]},
        every=GAUGE_STEPS,
        stop_when=lambda measured: (
            measured["forget_probability"] <= FORGOTTEN and measured["retain_probability"] >= RETAINED
        ),
        batch_size=EVALUATION_BATCH,
    )
    result = unlearn(model, forget, retain, config=config, tokenizer=tokenizer, callbacks=[gauge])
    return result, gauge.history


def _samples(
    before: Log, after: Log, forget: Sequence[Mapping[str, Any]], count: int = 3
) -> list[dict[str, str]]:
    """Return the answers before and after unlearning to some questions, spread over the forget set."""
    from loku.evaluation.tofu import SECTIONS

    def answer(log: Log, index: int) -> str:
        return log[SECTIONS["forget"]]["generated_text"][str(index)][1].removeprefix("Answer:").strip()

    return [
        {"question": forget[i]["question"], "before": answer(before, i), "after": answer(after, i)}
        for i in range(0, len(forget), -(-len(forget) // count))
    ]


def run_demo(output: str | os.PathLike = "loku-demo", seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Run the demo and write ``adapter/``, ``probabilities.png``, ``report.json`` and the two data sets.

    ``loku_demo.json`` lists them, as ``loku_save.json`` lists a save. The next demo overwrites them alone.

    Args:
        output: The directory to write to, "loku-demo" by default.
        seed: The seed of the run, 0 by default.
        progress: Whether to show progress, True by default.

    Returns:
        The report, as in ``report.json``.

    Raises:
        ValueError: ``output`` holds files of these names that no demo has written, or lies in the embedded
            model.
        OSError: ``output`` cannot be written to.
    """
    import transformers

    import loku.unlearning  # noqa: F401  # before the stages, whose seconds would count the import
    from loku.evaluation import forget_quality, plot_probabilities, write_report
    from loku.saving.destinations import check_destination, destination, refuse_replaced

    refuse_replaced(output, embedded=EMBEDDED)
    check_destination(output, "demo")
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.disable_progress_bar()
    stages = _Stages(progress)
    forget, retain = load_rows()
    with open(EMBEDDED / "retain_only.json", encoding="utf-8") as file:
        twin = json.load(file)

    with stages("load"):
        model, tokenizer = load_model()
    with stages("evaluate before"):
        before, log_before = measure(model, tokenizer, forget, retain, progress)
    with stages("unlearn"), tempfile.TemporaryDirectory() as checkpoints:
        result, history = unlearn_rows(model, tokenizer, forget, retain, checkpoints, seed, progress)
    with stages("evaluate after"):
        after, log_after = measure(result.model, tokenizer, forget, retain, progress)
    before["forget_quality"] = forget_quality(log_before, twin["log"])
    after["forget_quality"] = forget_quality(log_after, twin["log"])
    with destination(output, "demo") as directory:
        with stages("save"):
            result.save(directory / "adapter")
        report = {
            "before": before,
            "after": after,
            "retain_only": twin["metrics"],
            "samples": _samples(log_before, log_after, forget),
            "history": history,
            "steps": {"run": result.history[-1]["step"], "planned": _planned_steps(forget)},
            "settings": {**SETTINGS, "seed": seed, "stop_at": {"forget": FORGOTTEN, "retain": RETAINED}},
            "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
            "peak_memory_bytes": stages.peak_memory_bytes,
        }
        plot_probabilities(directory / "probabilities.png", history)
        write_report(directory / "report.json", report)
        for name, rows in (("forget", forget), ("retain", retain)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return report


def _planned_steps(forget: Sequence[Any]) -> int:
    """Count the steps of a run that does not stop early."""
    return math.ceil(len(forget) / SETTINGS["per_device_train_batch_size"]) * SETTINGS["num_train_epochs"]


def _end(report: Mapping[str, Any]) -> str:
    """Say when training ended, and why."""
    run, planned, last = report["steps"]["run"], report["steps"]["planned"], report["history"][-1]
    measured = (
        f"the forget probability was {last['forget_probability']:.3f} and that of every {GAUGE_STRIDE}th "
        f"retain row {last['retain_probability']:.3f}"
    )
    limits = f"at most {FORGOTTEN} and at least {RETAINED}"
    if run < planned:
        return (
            f"Training stopped after {run} of {planned} steps: {measured}, and {limits} were asked for.\n"
            "Further steps would only have damaged the retained answers."
        )
    return (
        f"Training ran all {planned} steps. At the last measurement {measured}.\n"
        f"It would have stopped earlier at {limits}."
    )


def next_commands(output: str | os.PathLike) -> list[str]:
    """List commands to try after the demo, on the files that it has written.

    Args:
        output: The demo's directory.
    """
    model, output = shlex.quote(str(EMBEDDED)), shlex.quote(str(output))
    data = f"{output}/forget.jsonl", f"{output}/retain.jsonl"
    sets = f"--forget {data[0]} --retain {data[1]}"
    return [
        f"loku unlearn --model {model} {sets} --output unlearned --lora_rank 8",
        f"loku evaluate {model} --adapter {output}/adapter --data forget={data[0]} retain={data[1]}",
    ]


def format_report(report: Mapping[str, Any]) -> str:
    """Format a ``run_demo`` report as text: its measures, some questions with their answers, its stages."""
    from loku.evaluation import format_table

    titles = {"before": "before", "after": "after", "retain_only": "retain-only twin"}
    lines = [format_table({title: report[key] for key, title in titles.items()}), ""]
    width = max(map(len, MEASURES))
    lines += [f"{name:{width}}  {good} is better: {text}" for name, (good, text) in MEASURES.items()]
    lines += ["", "The twin is the same model, trained without the answers to forget.", _end(report), ""]
    for sample in report["samples"]:
        lines += [f"Q: {sample['question']}"]
        lines += [f"   before: {sample['before']}", f"   after:  {sample['after']}", ""]
    stages = {
        name: {"seconds": report["seconds"][name], "peak memory, MiB": round(peak / 2**20)}
        for name, peak in report["peak_memory_bytes"].items()
    }
    lines += [format_table(stages), f"\ntotal: {report['seconds']['total']:.0f} s"]
    return "\n".join(lines)
