"""``loku demo``: unlearn two authors from a small model that ships with the package, and show what changed.

The model is a 4.2M-parameter Llama that has memorised the answers about 40 fictitious authors of TOFU. The
demo makes it forget the last two (40 questions, TOFU's forget01) and retain the others, and compares it with
the log of a twin that was trained without the two. See ``scripts/build_embedded_model.py``.
"""

import json
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

from loku.memory import forget_peak_memory, peak_memory

EMBEDDED = Path(__file__).parent / "embedded"
FORGET_ROWS = 40  # the last ones: two authors
GAUGE_STRIDE = 8  # every eighth retain row is measured between steps
EVALUATION_BATCH = 32

# What ships; benchmarks/results/demo.json has the figures it gave.
SETTINGS = {
    "lora_rank": 8,
    "lora_alpha": 16,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 8,
    "retain_weight": 1.5,
}
# Training stops when both hold on the gauged rows: to push on would only damage what is kept.
FORGOTTEN = 0.03
RETAINED = 0.92
GAUGE_STEPS = 2


def load_rows():
    """(forget rows, retain rows): the questions and answers that the embedded model has memorised."""
    with open(EMBEDDED / "tofu.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows[-FORGET_ROWS:], rows[:-FORGET_ROWS]


def load_model(path=EMBEDDED):
    """(model in float32, tokenizer)"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def measure(model, tokenizer, forget, retain, progress=True):
    """(metrics, TOFU log) of a model: the log has the forget and the retain section."""
    from loku.data import tokenize_dataset
    from loku.evaluation import (
        evaluate_tofu_rows,
        extraction_likelihood,
        memorization_accuracy,
        perplexity,
        section_metrics,
    )
    from loku.evaluation.tofu import SECTIONS

    options = {"batch_size": EVALUATION_BATCH, "progress": progress}
    # Truth ratios are wanted of the forget set alone.
    plain_retain = [{"question": row["question"], "answer": row["answer"]} for row in retain]
    log = {
        SECTIONS["forget"]: evaluate_tofu_rows(model, tokenizer, forget, **options),
        SECTIONS["retain"]: evaluate_tofu_rows(model, tokenizer, plain_retain, **options),
    }
    forget_metrics = section_metrics(log[SECTIONS["forget"]], forget=True)
    retain_metrics = section_metrics(log[SECTIONS["retain"]])
    forget_tokens = tokenize_dataset(forget, tokenizer, name="forget")
    metrics = {
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
    """Wall-clock seconds and peak memory of each stage, in the order in which they ran."""

    def __init__(self, show):
        self.seconds, self.peak_memory_bytes, self._show = {}, {}, show

    @contextmanager
    def __call__(self, name):
        if self._show:
            print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        forget_peak_memory()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peak_memory_bytes[name] = peak_memory()


def unlearn_rows(model, tokenizer, forget, retain, output, seed=0, progress=True):
    """Unlearn with the demo's settings. Returns (``loku.UnlearnResult``, the gauge's history)."""
    from loku import ProbabilityGauge, UnlearnConfig, unlearn

    config = UnlearnConfig(
        **SETTINGS,
        output_dir=str(output),
        seed=seed,
        disable_tqdm=not progress,
        logging_strategy="no",
        dataloader_pin_memory=False,
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


def _samples(before, after, forget, count=3):
    """The answers before and after to questions spread over the forget set."""
    from loku.evaluation.tofu import SECTIONS

    def answer(log, index):
        return log[SECTIONS["forget"]]["generated_text"][str(index)][1].removeprefix("Answer:").strip()

    return [
        {"question": forget[i]["question"], "before": answer(before, i), "after": answer(after, i)}
        for i in range(0, len(forget), -(-len(forget) // count))
    ]


def run_demo(output="loku-demo", seed=0, progress=True):
    """Run the demo and write ``adapter/``, ``probabilities.png`` and ``report.json`` to ``output``.

    Returns the report, as written.
    """
    import transformers

    from loku.evaluation import forget_quality, plot_probabilities, write_report

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.disable_progress_bar()
    output = Path(output)
    stages = _Stages(progress)
    forget, retain = load_rows()
    with open(EMBEDDED / "retain_only.json", encoding="utf-8") as file:
        twin = json.load(file)

    with stages("load"):
        model, tokenizer = load_model()
    with stages("evaluate before"):
        before, log_before = measure(model, tokenizer, forget, retain, progress)
    with stages("unlearn"):
        result, history = unlearn_rows(model, tokenizer, forget, retain, output / "trainer", seed, progress)
    with stages("evaluate after"):
        after, log_after = measure(result.model, tokenizer, forget, retain, progress)
    with stages("save"):
        result.save(output / "adapter")

    before["forget_quality"] = forget_quality(log_before, twin["log"])
    after["forget_quality"] = forget_quality(log_after, twin["log"])
    report = {
        "before": before,
        "after": after,
        "retain_only": twin["metrics"],
        "samples": _samples(log_before, log_after, forget),
        "history": history,
        "settings": {**SETTINGS, "seed": seed, "stop_at": {"forget": FORGOTTEN, "retain": RETAINED}},
        "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
        "peak_memory_bytes": stages.peak_memory_bytes,
    }
    plot_probabilities(output / "probabilities.png", history)
    write_report(output / "report.json", report)
    return report


def format_report(report):
    """The report as text: the table, three questions with their answers, the stages."""
    from loku.evaluation import format_table

    titles = {"before": "before", "after": "after", "retain_only": "retain-only twin"}
    lines = [format_table({title: report[key] for key, title in titles.items()}), ""]
    for sample in report["samples"]:
        lines += [f"Q: {sample['question']}"]
        lines += [f"   before: {sample['before']}", f"   after:  {sample['after']}", ""]
    stages = {
        name: {"seconds": report["seconds"][name], "peak memory, MiB": round(peak / 2**20)}
        for name, peak in report["peak_memory_bytes"].items()
    }
    lines += [format_table(stages), f"\ntotal: {report['seconds']['total']:.0f} s"]
    return "\n".join(lines)
