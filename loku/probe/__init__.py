"""The general ability of a model: a small committed probe, and what is left of it after unlearning."""

from loku.probe.ability import measure_probe, relative_ability
from loku.probe.rows import probe_rows

__all__ = ["measure_probe", "probe_rows", "relative_ability"]
