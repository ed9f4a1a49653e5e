"""The modules that an adapter is put into by default: the paper's, query, value and every MLP linear."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Names that causal LMs in transformers give to their modules.
_ATTENTION = {
    "query": {"q_proj", "query_proj", "query", "q_lin", "wq", "q"},
    "key": {"k_proj", "key_proj", "key", "k_lin", "wk", "k"},
    "value": {"v_proj", "value_proj", "value", "v_lin", "wv", "v"},
    "output": {"o_proj", "out_proj", "dense", "out_lin", "wo", "o"},
}
FUSED_ATTENTION = {"qkv_proj", "query_key_value", "c_attn", "W_pack", "Wqkv", "wqkv", "qkv", "att_proj"}
_MLP_PARENT = {"mlp", "feed_forward", "feedforward", "ffn"}
_MLP_IN_BLOCK = {"fc1", "fc2"}  # linears of OPT, directly in the block
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# The sweeps of the paper's Figure 4, by the roles of the modules.
TARGET_SWEEPS = {
    "qv": ("query", "value"),
    "qkvo": ("query", "key", "value", "output"),
    "ffn": ("MLP",),
    "qv+ffn": ("query", "value", "MLP"),
}


def _shortest_suffixes(targets: list[str], others: list[str]) -> list[str]:
    """The shortest dotted suffixes that peft would match with all targets and nothing else."""
    for depth in range(1, 1 + max(name.count(".") + 1 for name in targets)):
        suffixes = {".".join(name.split(".")[-depth:]) for name in targets}
        endings = tuple("." + suffix for suffix in suffixes)
        if not any(("." + other).endswith(endings) for other in others):
            return sorted(suffixes)
    return sorted(targets)


def default_target_modules(model: nn.Module, sweep: str = "qv+ffn") -> list[str]:
    """The paper's LoRA targets, as ``LoraConfig(target_modules=...)`` takes them.

    GPT-Neo has q_proj, v_proj, c_fc and c_proj. Llama, Mistral, Qwen and Gemma have q_proj, v_proj,
    gate_proj, up_proj and down_proj. Phi has q_proj, v_proj, fc1 and fc2. Other models are read by their
    structure: the modules beside a query projection are attention, the modules under an MLP are the MLP.

    Args:
        model: The causal LM.
        sweep: The sweep of Figure 4. "qv" has the query and value projections, "qkvo" the key and output
            projections as well, "ffn" every MLP linear. "qv+ffn" (default) is "qv" and "ffn" together.

    Returns:
        The shortest suffixes of module names that match the targets and nothing else.

    Raises:
        ValueError: The targets cannot be told. The model has fused query-key-value projections, Conv1D
            (GPT-2), a mixture of experts or unknown names. The message asks for ``target_modules``.
    """
    kind = type(model).__name__
    roles = TARGET_SWEEPS[sweep]
    way_round = f"pass target_modules (the names of its {', '.join(roles)} linears) yourself"
    config: Any = getattr(model, "config", None)
    config = None if config is None else config.get_text_config()
    experts = [key for key in _EXPERT_COUNTS if (getattr(config, key, None) or 0) > 1]
    if experts:
        raise ValueError(
            f"{kind} is a mixture of experts ({experts[0]}), which has no default targets; {way_round}"
        )

    modules = dict(model.named_modules())
    blocks = {name: module for name, module in modules.items() if re.search(r"(^|\.)\d+\.", name)}
    for name, module in blocks.items():
        if type(module).__name__ == "Conv1D":
            raise ValueError(f"{name} of {kind} is a Conv1D, which has no default targets; {way_round}")
        if name.rpartition(".")[2] in FUSED_ATTENTION:
            raise ValueError(f"{name} of {kind} fuses query, key and value: no default targets; {way_round}")

    # Quantised linears are not always nn.Linear, but have its sizes.
    linears = [
        name
        for name, module in blocks.items()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    ]
    attention = {n.rpartition(".")[0] for n in linears if n.rpartition(".")[2] in _ATTENTION["query"]}
    found: dict[str, list[str]] = {role: [] for role in (*_ATTENTION, "MLP")}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        if parent in attention:
            for role in (role for role, leaves in _ATTENTION.items() if leaf in leaves):
                found[role].append(name)
        elif leaf in _MLP_IN_BLOCK or _MLP_PARENT & set(parent.split(".")):
            found["MLP"].append(name)
    for role in roles:
        if not found[role]:
            missing = "MLP linear" if role == "MLP" else f"{role} projection"
            raise ValueError(f"no {missing} was found in {kind}; {way_round}")
    targets = [name for role in roles for name in found[role]]
    return _shortest_suffixes(targets, [name for name in modules if name not in set(targets)])
