"""Trainings to limits that are killed at each step and started again; ``test_training.py`` runs this file.

Each training is a fork of this process, which has imported everything once and has started no thread.
"""

import json
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from forks import forked
from tiny_models import tiny_model

from loku.deletion import training
from loku.saving.kinds import save

LIMITS = {"memorization_accuracy": 0.5, "extracted": 0.0, "extraction_likelihood_3": 0.5}
QUICK = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 12,
    "eval_steps": 2,
    "use_cpu": True,
    "init": "default",
    "retain_weight": 1.5,
}


@torch.no_grad()
def memorised_rows(model, count=4, length=14):
    """Rows whose answers the model gives word by word: its own greedy continuations of prompts."""
    rows = []
    for first in range(5, 5 + count):
        ids = [first, 40 + first, 11]
        while len(ids) < length:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return rows


def random_rows(count=6):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (count, 9), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in ids]


def saved_model(directory):
    """Save a tiny model; return its folder, and rows that it knows and rows that it does not."""
    model = tiny_model("llama")
    model.save_pretrained(directory / "model")
    return directory / "model", memorised_rows(model), random_rows()


def train(folder, output_dir, forget, retain, **options):
    """``unlearn_to_limits`` with quick settings, which ``training`` may change."""
    settings = {**QUICK, **options.pop("training", {})}
    given = {"limits": LIMITS, "utility_floor": 0.5, "model_arguments": {"dtype": "float32"}, **options}
    return training.unlearn_to_limits(
        folder, forget, retain, output_dir=output_dir, training=settings, **given
    )


def _run(folder, output_dir, forget, retain, kill_at, stage):
    calls = 0
    real = getattr(training._Clock, stage)

    def method(clock):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(clock)

    with patch.object(training._Clock, stage, method):
        done = train(folder, output_dir, forget, retain)
    facts = {name: value for name, value in done.facts.items() if name != "seconds"}
    (output_dir / "facts.json").write_text(json.dumps({"outcome": done.outcome, **facts}))
    save(done.result.model, output_dir / "saved", "portable", tokenizer=None)


def result(directory):
    files = {p.name: p.read_bytes() for p in sorted((directory / "saved").iterdir())}
    return {**files, "facts": (directory / "facts.json").read_text()}


def main(directory):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    socket.socket.connect = lambda *args: sys.exit("network")
    given = saved_model(directory)
    places = [given[0], directory / "whole", *given[1:]]
    assert forked(_run, *places, 0, "write") == 0
    expected = result(directory / "whole")
    facts = json.loads(expected["facts"])
    assert facts["outcome"] == "forgotten" and facts["chosen_step"] == facts["steps"] > 2, facts
    # The clock is written at each step, and is read once more when all is trained.
    after = ("seconds", 2 * facts["steps"] + 1)
    for stage, number in [*(("write", step) for step in range(1, facts["steps"] + 1)), after]:
        places[1] = directory / f"{stage}-{number}"
        assert forked(_run, *places, number, stage) == -signal.SIGKILL, (stage, number)
        assert not (places[1] / "saved").exists()
        assert forked(_run, *places, 0, stage) == 0, (stage, number)
        assert result(places[1]) == expected, (stage, number)
    print(json.dumps(facts["steps"] + 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
