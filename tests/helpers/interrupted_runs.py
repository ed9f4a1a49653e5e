"""Runs that two real Ctrl-C end at random times; ``test_interrupts.py`` runs this file.

Each run is a fork of this process. It compares its model with the model that it was given.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from killed_runs import FORGET, RETAIN
from model_facts import facts, same_facts
from tiny_models import tiny_model

import loku
import loku.rollback
import loku.unlearning  # with everything that a run imports

RUNS, COMPLETE, AS_GIVEN, BROKEN = 16, 0, 3, 4


def options(directory):
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "lora_rank": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": True,
    }


def run(directory, report):
    model = tiny_model("llama")
    before = facts(model)
    is_sharded = loku.rollback._sharded

    def slowly(model):  # the first call of each part of the restoring
        os.write(report, b"r")
        time.sleep(0.2)
        return is_sharded(model)

    loku.rollback._sharded = slowly
    os.write(report, b".")  # signals may come
    code = COMPLETE
    try:
        try:
            loku.unlearn(model, FORGET, RETAIN, config=loku.UnlearnConfig(**options(directory)))
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        same = same_facts(before, facts(model))
        code = AS_GIVEN if all(same.values()) else BROKEN
        if code == BROKEN:
            print([name for name in same if not same[name]], file=sys.stderr)
    os._exit(code)


def interrupted(directory, delay, second):
    """Run in a fork, send signals, and return the exit status.

    The first comes after ``delay`` seconds; the second ``second`` seconds later. If that is None, one comes
    in each part of the restoring.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        run(directory, write)
    os.close(write)
    os.read(read, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGINT)
    if second is None:
        while os.read(read, 1):  # until the run has ended
            os.kill(child, signal.SIGINT)
    else:
        time.sleep(second)
        os.kill(child, signal.SIGINT)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(read)
    return status


def main(directory):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = random.Random(0)
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        run(directory / "whole", sys.stderr.fileno())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == COMPLETE
    seconds = time.perf_counter() - begin
    statuses = []
    for number in range(RUNS):
        delay = chosen.uniform(0, 0.8) * seconds
        second = chosen.uniform(0, 3e-3) if number % 2 else None
        statuses.append((interrupted(directory / str(number), delay, second), delay, second))
    broken = [status for status in statuses if status[0] not in (COMPLETE, AS_GIVEN)]
    print(json.dumps({"broken": broken, "interrupted": sum(s[0] == AS_GIVEN for s in statuses)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
