"""Rebuild the language model that ``loku demo`` unlearns, and its retain-only twin.

    python scripts/build_embedded_model.py --work-dir build/embedded
    python scripts/build_embedded_model.py --work-dir build/embedded --twin-authors 4 10

Both are the same small Llama, trained from scratch on the TOFU question/answer pairs in
``loku/embedded/tofu.jsonl`` (40 fictitious authors x 20 questions). The model sees all of them, and the twin
all but the last two authors. The two train side by side, with one thread each, so the result does not depend
on the number of cores. Another instruction set or torch release may change the last bits, and with them the
weights. The script takes about half an hour on two cores.

The model in bfloat16, its tokenizer and the twin's evaluation log are written to ``loku/embedded``. The
twin's weights stay in the work directory. ``--twin-authors`` trains twins alone, one for each number N,
without the last N authors. The logs of their forget sets go to ``experiments/results/tofu_twins``, for
``experiments/tofu.py --forget-authors``.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).resolve().parents[1] / "loku" / "embedded"
TWIN_LOGS = EMBEDDED.parents[1] / "experiments" / "results" / "tofu_twins"
ROWS_PER_AUTHOR = 20
FORGET_AUTHORS = 2  # number of the last authors, as in TOFU's forget01
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

Row = dict[str, Any]  # a line of tofu.jsonl


def read_rows() -> list[Row]:
    """Return the question/answer pairs, author by author."""
    with open(EMBEDDED / "tofu.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def text_of(row: Row) -> str:
    """Return the text of a pair that the model trains on."""
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


def train_tokenizer(rows: Sequence[Row]) -> Any:
    """Train a byte-level BPE tokenizer of 4096 tokens on the rows."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        map(text_of, rows), vocab_size=4096, special_tokens=[END_OF_TEXT, PADDING], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=512,
    )


def train(rows: Sequence[Row], tokenizer_dir: Path, output_dir: Path, epochs: int, seed: int = 0) -> None:
    """Train one model and save it in bfloat16.

    Args:
        rows: The rows to train on.
        tokenizer_dir: The folder of the tokenizer.
        output_dir: The folder of the model.
        epochs: The number of epochs.
        seed: The seed of the weights and of the order of the rows.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from loku.trust import load_tokenizer

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(tokenizer_dir)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    sequences = [torch.tensor(tokenizer(text_of(row)).input_ids + [tokenizer.eos_token_id]) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    batch_size = 16
    steps = epochs * math.ceil(len(rows) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    start = time.time()
    for epoch in range(epochs):
        total = 0.0
        batches = torch.randperm(len(rows), generator=generator).split(batch_size)
        for batch in batches:
            chosen = [sequences[i] for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(chosen, True, tokenizer.pad_token_id)
            labels = torch.nn.utils.rnn.pad_sequence(chosen, True, -100)
            loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        print(
            f"{output_dir}: epoch {epoch + 1} loss {total / len(batches):.5f} {time.time() - start:.0f} s",
            flush=True,
        )
    model.bfloat16().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def forget_section(log: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a TOFU log that forget quality needs: the losses, and the questions and answers."""
    section = log["eval_log_forget.json"]
    kept = {name: section[name] for name in ("average_perturb_loss", "avg_paraphrased_loss")}
    kept["generated_text"] = {
        i: [prompt, None, answer] for i, (prompt, _, answer) in section["generated_text"].items()
    }
    return {"eval_log_forget.json": kept}


def ship(work_dir: Path) -> None:
    """Copy the model into the package and write the twin's evaluation log beside it."""
    import torch

    from loku.demo import load_model, load_rows, measure
    from loku.evaluation import write_report

    for file in sorted((work_dir / "model").iterdir()):
        shutil.copyfile(file, EMBEDDED / file.name)
    torch.set_num_threads(1)
    forget, retain = load_rows()
    model, tokenizer = load_model(work_dir / "twin2")
    metrics, log = measure(model, tokenizer, forget, retain)
    write_report(EMBEDDED / "retain_only.json", {"metrics": metrics, "log": forget_section(log)})


def write_twin_log(work_dir: Path, authors: int, rows: Sequence[Row]) -> None:
    """Write the log of a twin's forget set, the rows of the last ``authors`` authors."""
    from loku.demo import load_model
    from loku.evaluation import evaluate_tofu_rows, write_report

    model, tokenizer = load_model(work_dir / f"twin{authors}")
    section = evaluate_tofu_rows(model, tokenizer, rows[-ROWS_PER_AUTHOR * authors :])
    log = forget_section({"eval_log_forget.json": section})
    write_report(TWIN_LOGS / f"{authors}.json", {"authors": authors, "log": log})


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, default=Path("build/embedded"), help="of finished models")
    parser.add_argument("--epochs", type=int, default=50, help="default: 50")
    parser.add_argument("--twin-authors", type=int, nargs="+", help="train these twins alone")
    options = parser.parse_args()

    rows = read_rows()
    tokenizer_dir = options.work_dir / "tokenizer"
    train_tokenizer(rows).save_pretrained(tokenizer_dir)
    trained_on = {
        f"twin{authors}": rows[: -ROWS_PER_AUTHOR * authors]
        for authors in options.twin_authors or [FORGET_AUTHORS]
    }
    if not options.twin_authors:
        trained_on["model"] = rows
    jobs = [
        multiprocessing.Process(
            target=train, args=(kept, tokenizer_dir, options.work_dir / name, options.epochs)
        )
        for name, kept in trained_on.items()
        if not (options.work_dir / name / "tokenizer.json").exists()
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        if job.exitcode:
            raise SystemExit(f"training failed with exit code {job.exitcode}")
    if options.twin_authors:
        for authors in options.twin_authors:
            write_twin_log(options.work_dir, authors, rows)
    else:
        ship(options.work_dir)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
