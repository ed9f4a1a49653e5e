"""The roles of a model's linears and experts: query, key, value and output of attention, or MLP."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# Names that causal LMs in transformers give to their modules. Receptance is the query of RWKV.
FUSED_ATTENTION = {"qkv_proj", "query_key_value", "c_attn", "W_pack", "Wqkv", "wqkv", "qkv", "att_proj"}
_KEY_VALUE = {"kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"}  # MLA (DeepSeek) makes both from one latent
_NAMES: dict[str, set[str]] = {
    "query": {
        *("q_proj", "query_proj", "query", "q_lin", "wq", "Wq", "q", "project_q", "q_a_proj", "q_b_proj"),
        *("receptance", *FUSED_ATTENTION),
    },
    "key": {
        *("k_proj", "key_proj", "key", "k_lin", "wk", "Wk", "k", "project_k"),
        *(*_KEY_VALUE, *FUSED_ATTENTION),
    },
    "value": {
        *("v_proj", "value_proj", "value", "v_lin", "wv", "Wv", "v", "project_v"),
        *("v_proj_current", "v_proj_delayed", *_KEY_VALUE, *FUSED_ATTENTION),
    },
    "output": {
        *("o_proj", "out_proj", "dense", "out_lin", "wo", "Wo", "o", "c_proj", "attention_out", "output"),
        *("o_b_proj",),
    },
}
_MLP_PARENT = {
    *("mlp", "mlps", "feed_forward", "feedforward", "ffn", "ffns", "ff", "mlp_block"),
    *("block_sparse_moe", "moe", "shared_mlp", "shared_expert", "shared_experts"),
}
_MLP_IN_BLOCK = {"fc1", "fc2", "up_proj", "down_proj", "gate_up_proj"}  # such as OPT's, directly in the block
_STATE_SPACE = {"mixer", "mamba"}  # their in_proj makes the gate and all inputs of the recurrence
# Modules of a block whose linears are neither attention nor MLP, and linears that are routers.
_NEITHER = re.compile(r"(router|layernorm|_gate|adapter\w*|_list)$|^(gate|indexer|compressor)$")
_ROUTERS = {"gate", "router", "shared_expert_gate", "classifier"}


@dataclass(frozen=True)
class Roles:
    """The roles of linears and experts.

    Args:
        names: The full names by their role: "query", "key", "value", "output" or "MLP". A fused projection
            has several roles.
        rest: The names of linears in blocks that have none of these roles and are no routers or norms, such
            as those of state space layers beside attention.
        attention: Whether there is attention. Without it, the inputs of state space layers are query, key and
            value.
    """

    names: dict[str, list[str]]
    rest: list[str]
    attention: bool


def read_roles(linears: Collection[str], experts: Collection[str]) -> Roles:
    """Read the roles from the names of linears and of experts.

    The linears beside a query projection are attention, and those under an MLP are the MLP.

    Args:
        linears: The full names of linear modules.
        experts: The full names of parameters that hold the weights of all experts of an MLP.
    """
    parents, parts = {}, {}
    for name in (*linears, *experts):
        short = name.removesuffix(".weight") if name in experts else name  # each of JetMoE's is a module
        short = re.sub(r"(?<=\D)\.linear$", "", short)  # Moshi wraps each linear
        inside = inside_block(short)
        if inside and inside[-1] not in _ROUTERS and not any(map(_NEITHER.search, inside[:-1])):
            parents[name], parts[name] = short.rpartition(".")[0], inside
    mlp = {name for name, inside in parts.items() if _MLP_PARENT & set(inside[:-1]) or _is_bert_mlp(inside)}
    attention = {
        parents[name]
        for name, inside in parts.items()
        if name not in mlp and name not in experts and inside[-1] in _NAMES["query"] | {"kv_proj"}
    }
    # Zaya's o_proj is beside a module of the other projections.
    around = {parent.rpartition(".")[0] for parent in attention if parent.endswith(tuple(FUSED_ATTENTION))}
    roles: dict[str, list[str]] = {role: [] for role in (*_NAMES, "MLP")}
    rest = []
    for name, inside in parts.items():
        leaf, parent = inside[-1], parents[name]
        if name in experts and inside[-2:-1] == ["experts"] and leaf in ("input_linear", "output_linear"):
            roles["query" if leaf == "input_linear" else "output"].append(name)  # JetMoE's attention heads
        elif name in mlp or name in experts:
            roles["MLP"].append(name)
        elif parent in attention:
            for role in (role for role, leaves in _NAMES.items() if leaf in leaves):
                roles[role].append(name)
        elif inside[-3:] == ["attention", "output", "dense"] or (
            parent in around and leaf in _NAMES["output"]
        ):
            roles["output"].append(name)
        elif leaf in _MLP_IN_BLOCK:
            roles["MLP"].append(name)
        else:
            rest.append(name)
    if not attention:
        inputs = [n for n in rest if parts[n][-1] == "in_proj" and _STATE_SPACE & set(parts[n])]
        for role in ("query", "key", "value"):
            roles[role] += inputs
        rest = [name for name in rest if name not in inputs]
    return Roles(roles, rest, bool(attention))


def inside_block(name: str) -> list[str]:
    """The parts of a name after the number of its block; [] for a name outside the blocks."""
    match = re.search(r"(?:^|\.)\d+\.(.+)$", name)
    return match[1].split(".") if match else []


def _is_bert_mlp(inside: list[str]) -> bool:
    return inside[-2:] in (["intermediate", "dense"], ["output", "dense"]) and "attention" not in inside
