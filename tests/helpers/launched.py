"""The ``loku`` command for ``accelerate launch`` on the CPU; ``test_launch.py`` starts it."""

import os
import sys

from two_processes import fsdp_on_the_cpu

import loku
from loku.cli import main
from loku.distributed import has_shards

step = loku.UnlearnTrainer.training_step


def watched_step(trainer, *args, **kwargs):
    if os.environ.get("FAILING_RANK") == os.environ["RANK"]:
        raise KeyboardInterrupt
    print("sharded" if has_shards(trainer.model) else "whole", file=sys.stderr)
    return step(trainer, *args, **kwargs)


if __name__ == "__main__":
    loku.UnlearnTrainer.training_step = watched_step
    with fsdp_on_the_cpu():
        sys.exit(main())
