"""A request that is killed at each of its stages and started again; ``test_procedure.py`` runs this file.

Each run is a fork of this process, which has imported everything once and has computed nothing.
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from forks import forked
from transformers import TrainerCallback  # noqa: F401  # imported before the forks

from loku.deletion import ledger, procedure, run, stages
from loku.deletion.request import read_request


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def forget(request, output):
    torch.set_num_threads(1)
    procedure.forget(read_request(request), output, progress=False)


def main():
    request, folder, rest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    ends = {}
    whole, work = stages.whole_file, folder / ".killed.running"

    def before_the_file_of(name):
        def opened(path):
            if Path(path).name == f"{name}.json":
                kill()
            return whole(path)

        return patch.object(stages, "whole_file", opened)

    faults = {name: before_the_file_of(name) for name in rest}
    faults |= {
        "seal": patch.object(run.seal, "seal", kill),
        "place": patch.object(run.os, "replace", kill),
        "ledger": patch.object(ledger, "append", kill),
        "clean": patch.object(procedure.shutil, "rmtree", kill),
    }
    for name, fault in faults.items():
        with fault:
            ends[name] = forked(lambda: forget(request, folder / "killed"))
    ends["last"] = forked(lambda: forget(request, folder / "killed"))
    ends["left"] = work.exists()
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
