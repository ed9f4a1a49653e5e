"""A LoRA adapter as a GGUF file, which llama.cpp and Ollama serve on the GGUF of its base.

llama.cpp adds alpha / r * B A to the weight of a tensor of the base, by the tensor's name in GGUF. r is the
number of columns of B, and alpha one number for the file. So another scaling is multiplied into B here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loku.serving.rules import GGUF_ARCHITECTURES, check_target, check_tensors, tensor_names

INSTALL = 'pip install "loku-kernels[gguf]"'
# llama.cpp rotates neighbouring rows of a head, transformers rows that are half a head apart.
_PERMUTED = {"llama": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}


def require_gguf() -> Any:
    """Import the package gguf.

    Raises:
        ImportError: It is not installed. The message has the line that installs it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"GGUF files need the package gguf: {INSTALL}") from error
    return gguf


def check_gguf_adapter(adapter: str | os.PathLike, base: str | os.PathLike) -> None:
    """Check that ``write_gguf_adapter`` can write an adapter; nothing is loaded but its config and names.

    Args:
        adapter: The folder of the adapter.
        base: The folder or hub name of its base. Only its ``config.json`` is read.

    Raises:
        ImportError: gguf is not installed.
        ValueError: The adapter or its base cannot be written as GGUF, and what to do instead. Or a folder
            holds no adapter, or no model.
    """
    require_gguf()
    _plan(Path(adapter), _base_config(base))


def write_gguf_adapter(
    adapter: str | os.PathLike, base: str | os.PathLike, path: str | os.PathLike
) -> dict[str, Any]:
    """Write a LoRA adapter as a GGUF file, for ``llama-server --lora`` and Ollama's ``ADAPTER``.

    The tensors are those of llama.cpp's ``convert_lora_to_gguf.py``, in float32, under the names of
    ``gguf.get_tensor_name_map``. It scales by lora_alpha / r always; here rsLoRA, ``rank_pattern`` and
    ``alpha_pattern`` keep peft's scaling, and the factors of GPT-2 (``Conv1D``) their order. The same adapter
    gives the same bytes.

    Args:
        adapter: The folder of the adapter, which fits the untouched base (``portable``, the default save).
        base: The folder or hub name of its base. Only its ``config.json`` is read.
        path: The file to make or to replace, whole or not at all.

    Returns:
        ``architecture`` in gguf's terms, the number of ``modules``, the greatest ``rank`` and ``alpha``.

    Raises:
        ImportError: gguf is not installed.
        ValueError: The errors of ``check_gguf_adapter``, or a factor does not fit the base's heads.
        OSError: ``path`` cannot be written.
    """
    gguf = require_gguf()
    adapter, config = Path(adapter), _base_config(base)
    adapter_config, architecture, modules = _plan(adapter, config)

    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import safe_open

    from loku.saving.directories import whole_file

    alpha = _written_alpha(adapter_config)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    greatest = 0
    with safe_open(adapter / SAFETENSORS_WEIGHTS_NAME, framework="pt") as tensors:
        for module, name in modules.items():
            A, B = (
                tensors.get_tensor(f"base_model.model.{module}.lora_{letter}.weight").float().numpy()
                for letter in "AB"
            )
            rank = B.shape[1]
            if len(A) != rank:
                raise ValueError(f"{module}: A {A.shape} and B {B.shape} have no common rank")
            factor = _scaling(adapter_config, module, rank) * rank / alpha
            if abs(factor - 1) > 1e-12:
                B = B * factor
            heads = _PERMUTED.get(architecture, {}).get(module.rsplit(".", 1)[-1])
            if heads is not None:
                B = _by_pairs(module, B, config.get(heads) or config["num_attention_heads"])
            writer.add_tensor(f"{name}.weight.lora_a", A.copy())
            writer.add_tensor(f"{name}.weight.lora_b", B.astype("float32"))
            greatest = max(greatest, rank)
    with whole_file(path) as unfinished:
        writer.write_header_to_file(unfinished)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {"architecture": architecture, "modules": len(modules), "rank": greatest, "alpha": alpha}


def _by_pairs(module: str, B: Any, heads: int) -> Any:
    """The rows of B (d, r) in llama.cpp's order: row i of a head's first half, then row i of its second."""
    rows, rank = B.shape
    if rows % (2 * heads):
        raise ValueError(f"{module}: {rows} rows of B do not divide into {heads} heads of pairs")
    return B.reshape(heads, 2, rows // (2 * heads), rank).swapaxes(1, 2).reshape(rows, rank)


def _base_config(base: str | os.PathLike) -> dict[str, Any]:
    from loku.trust import find_file

    path = find_file(os.fspath(base), "config.json", {})
    if path is None:
        raise ValueError(f"{base} has no config.json: pass the folder or hub name of the adapter's base")
    return _read_object(Path(path), "the config of a model")


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not {what}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not {what}")
    return value


def _plan(adapter: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The adapter's config, the architecture, and the names in GGUF of the modules, sorted by module."""
    from loku.adapter_folders import read_adapter_config
    from loku.saving.destinations import residual_save

    gguf = require_gguf()
    read_adapter_config(str(adapter))
    adapter_config = _read_object(adapter / "adapter_config.json", "the config of an adapter")
    names = tensor_names(adapter)
    problems = check_target("gguf", adapter_config, config) + check_tensors("gguf", names, config)
    base = adapter_config.get("base_model_name_or_path")
    if residual_save(base) is not None or residual_save(str(adapter.parent / "base")) is not None:
        problems.append(
            f"{adapter} stands for the residual base beside it, and no server subtracts it: save it as "
            "a portable adapter, the default"
        )
    if problems:
        raise ValueError(f"{adapter} cannot be written as GGUF: " + "; ".join(problems))
    architecture = next(
        GGUF_ARCHITECTURES[name] for name in config["architectures"] if name in GGUF_ARCHITECTURES
    )
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    if not isinstance(layers, int):
        raise ValueError("the config of the base names no number of layers (num_hidden_layers, n_layer)")
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names_in_gguf = gguf.get_tensor_name_map(number, layers)
    modules = {}
    for name in names:
        module, _, letter = name.removeprefix("base_model.model.").partition(".lora_")
        found = names_in_gguf.get_name(module)
        if found is None:
            raise ValueError(
                f"{adapter} has an adapter of {module}, which llama.cpp's {architecture} has not: pass "
                "the base that the adapter was trained on"
            )
        if f"base_model.model.{module}.lora_{'B' if letter[0] == 'A' else 'A'}.weight" not in names:
            raise ValueError(f"{adapter} lacks a factor of {module}: copy the adapter again")
        modules[module] = found
    return adapter_config, architecture, modules


def _written_alpha(config: Mapping[str, Any]) -> float:
    return float(config["lora_alpha"] * (config["r"] ** 0.5 if config.get("use_rslora") else 1))


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What peft multiplies B A by, for a module of some rank."""
    from peft.utils.other import get_pattern_key

    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), float(config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
