"""The modules of ``benchmarks/`` that the experiments use too: result files, and the peers of FILA's SVD."""

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
result_files = importlib.import_module("result_files")
fila_peers = importlib.import_module("fila")
