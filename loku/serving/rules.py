"""What each server can serve: its rules for an adapter, checked before anything is trained or written.

The rules are those of vLLM 0.33 (``vllm/lora/peft_helper.py``, ``vllm/config/lora.py``), of llama.cpp at
0c1e5709 (``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp``) and of TGI 3.3
(``server/text_generation_server/adapters/lora.py``, ``utils/adapter.py``). ``docs/serving.md`` says which of
them was run.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# The targets of a deletion request, and two servers that take the same files.
SERVERS = ("peft", "vllm", "gguf", "merged", "tgi", "ollama")
NAMES = {"vllm": "vLLM", "gguf": "llama.cpp", "tgi": "TGI", "ollama": "Ollama"}

# vLLM's choices of --max-lora-rank from 8 on. Its buffers have this rank, whatever the adapter's.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

# The classes that llama.cpp's converter and loku.serving.gguf_adapter give the same tensors, by the name of
# the architecture in gguf.
GGUF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
}

# Classes that vLLM runs by code of its own without LoRA. Others of transformers run by its Transformers
# backend, which has LoRA.
VLLM_WITHOUT_LORA = frozenset(
    (
        "BloomForCausalLM",
        "DbrxForCausalLM",
        "FalconForCausalLM",
        "FalconMambaForCausalLM",
        "Gemma3nForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "HrmTextForCausalLM",
        "KimiLinearForCausalLM",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "StableLmForCausalLM",
        "Zamba2ForCausalLM",
    )
)

# The modules of a decoder layer that TGI looks for. It leaves the tensors of all others out.
_TGI_MODULES = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
_TGI_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")

# What makes an adapter more than factors A and B of linear modules, by the field of its config.
_MORE_THAN_LORA = {
    "use_dora": "DoRA",
    "lora_bias": "a bias beside B",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "rows of the embedding",
    "target_parameters": "factors of a tensor of experts",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "tokens that switch it on (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "a router of several adapters",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
# Initialisations by name that leave the base as it is; the others subtract the initial factors from it.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

_INSTEAD = 'save the whole model instead (target "merged", or --save merged)'


def served_rank(adapter_config: Mapping[str, Any]) -> int | None:
    """The greatest rank of a module of an adapter, or None if its config names none.

    Args:
        adapter_config: The contents of ``adapter_config.json``.
    """
    ranks = [adapter_config.get("r"), *(adapter_config.get("rank_pattern") or {}).values()]
    return max((rank for rank in ranks if rank), default=None)


def max_lora_rank(rank: int) -> int:
    """The value of vLLM's ``--max-lora-rank`` that serves an adapter: the least of ``VLLM_RANKS`` that fits.

    Args:
        rank: The greatest rank of a module of the adapter.

    Raises:
        ValueError: vLLM has no such rank.
    """
    for choice in VLLM_RANKS:
        if choice >= rank:
            return choice
    raise ValueError(
        f"vLLM serves adapters of rank {VLLM_RANKS[-1]} at most, and this one has rank {rank}: export it at "
        f"a rank of at most {VLLM_RANKS[-1]} (loku export --rank), or {_INSTEAD}"
    )


def check_target(
    target: str,
    adapter_config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    rank: int | None = None,
) -> list[str]:
    """The problems that a server would have with an adapter, each with what to do instead.

    It reads configs alone, so it can be asked before a model is loaded. ``check_tensors`` adds what the names
    of the adapter's tensors say.

    Args:
        target: The server, one of ``SERVERS``.
        adapter_config: The contents of ``adapter_config.json``, or ``peft.LoraConfig.to_dict()``; empty if
            there is no adapter yet, for the rules on the model alone.
        model_config: The contents of the base's ``config.json``, or ``PretrainedConfig.to_dict()``.
        rank: The greatest rank of a module of the served adapter; None (default) reads it from the config.

    Returns:
        The problems; none if it can be served. "merged" has none, because it serves no adapter.

    Raises:
        ValueError: There is no such server.
    """
    if target not in SERVERS:
        raise ValueError(f"target must be one of {list(SERVERS)}, got {target!r}")
    if target == "merged":
        return []
    problems = []
    kind = adapter_config.get("peft_type", "LORA")
    if getattr(kind, "value", kind) != "LORA":
        problems.append(f"the adapter is a {getattr(kind, 'value', kind)} adapter: {_INSTEAD}")
    if target == "peft":
        return problems
    server = NAMES[target]
    problems += _more_than_lora(server, adapter_config)
    architectures = list(model_config.get("architectures") or [])
    rank = served_rank(adapter_config) if rank is None else rank
    if target == "vllm":
        problems += _vllm(adapter_config, architectures, rank)
    elif target == "tgi":
        problems += _tgi(adapter_config, rank)
    else:
        problems += _gguf(server, adapter_config, architectures)
    return problems


def _more_than_lora(server: str, config: Mapping[str, Any]) -> list[str]:
    """The problems of an adapter that is no plain LoRA, or that stands for another base."""
    problems = [
        f"the adapter has {what} ({field}), which {server} does not read: {_INSTEAD}"
        for field, what in _MORE_THAN_LORA.items()
        if config.get(field)
    ]
    if config.get("bias", "none") != "none":
        problems.append(f"the adapter trains biases (bias={config['bias']!r}): {_INSTEAD}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _KEEPS_BASE:
        problems.append(
            f"init_lora_weights={start!r} changes the base when peft loads the adapter, and {server} loads "
            "the untouched base: save it as a portable adapter (the default of loku), which fits that base"
        )
    if any("embed" in name or name == "lm_head" for name in _targets(config)):
        problems.append(
            f"the adapter is also that of an embedding, which {server} reads from few models or none: "
            f"{_INSTEAD}"
        )
    return problems


def _targets(config: Mapping[str, Any]) -> list[str]:
    """The last parts of the names of the target modules."""
    targets = config.get("target_modules") or []
    names = [targets] if isinstance(targets, str) else targets
    return sorted(str(name).rsplit(".", 1)[-1] for name in names)


def _uneven(config: Mapping[str, Any]) -> bool:
    """Whether modules may have different scalings."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not ranks and not alphas:
        return False
    # loku's sums have alpha = rank, so that each scaling is 1 and a server that reads no pattern is right.
    return bool(config.get("use_rslora")) or ranks != alphas or config["r"] != config["lora_alpha"]


def _vllm(config: Mapping[str, Any], architectures: list[str], rank: int | None) -> list[str]:
    problems = []
    if rank is not None:
        try:
            max_lora_rank(rank)
        except ValueError as error:
            problems.append(str(error))
    if _uneven(config):
        problems.append(
            "the adapter scales its modules differently (rank_pattern, alpha_pattern). vLLM 0.33 reads the "
            "patterns, but earlier ones scale all modules alike and say nothing: export it by loku export, "
            "which gives all modules the scaling 1"
        )
    for name in sorted(set(architectures) & VLLM_WITHOUT_LORA):
        problems.append(f"vLLM serves {name} without adapters only: {_INSTEAD}")
    return problems


def _gguf(server: str, config: Mapping[str, Any], architectures: list[str]) -> list[str]:
    problems = []
    if not set(architectures) & set(GGUF_ARCHITECTURES):
        problems.append(
            f"loku writes GGUF adapters for {', '.join(GGUF_ARCHITECTURES)}, not for "
            f"{', '.join(architectures) or 'a model without architectures in its config.json'}: convert the "
            "adapter by llama.cpp's own line, python convert_lora_to_gguf.py ADAPTER --base BASE --outfile "
            f"adapter.gguf, and compare its answers with the model's, or {_INSTEAD}"
        )
    if config.get("lora_alpha", 1) == 0:
        problems.append(f"lora_alpha is 0, which {server} takes for a scaling of 1: the adapter does nothing")
    return problems


def _tgi(config: Mapping[str, Any], rank: int | None) -> list[str]:
    problems = []
    if rank is not None and rank != 8 and rank % 16:
        problems.append(
            f"TGI pads rank {rank} to another, and scales all but the first kind of module by that: "
            "export it at rank 8 or a multiple of 16 (loku export --rank)"
        )
    others = sorted(set(_targets(config)) - _TGI_MODULES)
    if isinstance(config.get("target_modules"), str):
        others = []  # a regular expression; the names of the tensors say what it found
    if others:
        problems.append(
            f"TGI leaves the adapters of {', '.join(others)} out and says so in its log alone: {_INSTEAD}"
        )
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        problems.append(
            "TGI reads one rank and one scaling of an adapter, and this one has several (rank_pattern, "
            f"alpha_pattern): export it at one rank by loku export --rank, or {_INSTEAD}"
        )
    if config.get("layers_to_transform") is not None:
        problems.append(
            "TGI leaves a kind of module out unless every layer has its adapter, and this one is in some "
            f"layers only (layers_to_transform): {_INSTEAD}"
        )
    return problems


def tensor_names(adapter: Path) -> list[str]:
    """The names in an adapter's ``adapter_model.safetensors``, from its header.

    Args:
        adapter: The folder of the adapter.

    Raises:
        ValueError: The file is no safetensors file.
        OSError: There is no such file.
    """
    path = adapter / "adapter_model.safetensors"
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
            return sorted(name for name in header if name != "__metadata__")
        except (struct.error, ValueError, RecursionError, TypeError) as error:
            raise ValueError(f"{path} is no safetensors file") from error


def check_tensors(target: str, names: Iterable[str], model_config: Mapping[str, Any]) -> list[str]:
    """The problems that a server would have with the tensors of an adapter, each with what to do instead.

    Args:
        target: The server, one of ``SERVERS``.
        names: The names of the tensors (``tensor_names``).
        model_config: The contents of the base's ``config.json``.

    Returns:
        The problems; none if it can be served.
    """
    if target in ("peft", "merged"):
        return []
    server, names = NAMES[target], list(names)
    strange = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    problems = []
    if strange:
        problems.append(
            f"{len(strange)} tensors of the adapter, the first {strange[0]}, are no factors of a linear "
            f"module, and {server} does not read them: {_INSTEAD}"
        )
    if target == "tgi":
        problems += _tgi_tensors(names, model_config)
    return problems


def _tgi_tensors(names: list[str], model_config: Mapping[str, Any]) -> list[str]:
    layers: dict[str, set[int]] = {}
    others = set()
    for name in names:
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        match = _TGI_LAYER.fullmatch(module)
        if match is None or match[2] not in _TGI_MODULES:
            others.add(module)
        else:
            layers.setdefault(match[2], set()).add(int(match[1]))
    problems = []
    if others:
        problems.append(
            f"TGI leaves the adapters of {len(others)} modules out, the first {min(others)}: {_INSTEAD}"
        )
    expected = set(range(int(model_config.get("num_hidden_layers") or 0)))
    for kind, found in sorted(layers.items()):
        if missing := expected - found:
            problems.append(
                f"TGI leaves the adapters of all {kind} out, for layer {min(missing)} has none: {_INSTEAD}"
            )
    return problems
