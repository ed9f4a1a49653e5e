"""The modules of ``benchmarks/`` that the experiments use too: result files, tables, peers of FILA's SVD."""

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
ablation_table = importlib.import_module("ablation_table")
result_files = importlib.import_module("result_files")
fila_peers = importlib.import_module("fila")
