"""What serves the result of an unlearning: the rules of each server, its command lines, and GGUF adapters."""

from loku.serving.lines import serving_lines, write_serving_files
from loku.serving.rules import check_target, check_tensors, max_lora_rank

__all__ = ["check_target", "check_tensors", "max_lora_rank", "serving_lines", "write_serving_files"]
