"""The modules and parameters of a model that get an adapter.

They are given as a sweep of the paper's Figure 4, as names, as a regular expression or as "all-linear".
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from loku.module_roles import FUSED_ATTENTION as FUSED_ATTENTION
from loku.module_roles import inside_block, read_roles
from loku.text_decoder import directly_read, text_modules

# The sweeps of the paper's Figure 4 and of the authors' TOFU runs ("all"), by the roles of the modules.
TARGET_SWEEPS = {
    "qv": ("query", "value"),
    "qkvo": ("query", "key", "value", "output"),
    "ffn": ("MLP",),
    "qv+ffn": ("query", "value", "MLP"),
    "all": ("query", "key", "value", "output", "MLP"),
}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targets:
    """The parts of a model that get an adapter.

    Args:
        modules: The full names of the linear modules.
        names: The shortest suffixes of names by which peft finds these modules and no others. Or a regular
            expression, where suffixes cannot tell them from others.
        parameters: The suffixes of names of parameters that are adapted without a module of their own. They
            are the weights of experts that share one tensor (experts, d, k). They are also the weights of
            linears whose names peft takes for such experts.
        conv1d: Whether modules are transformers' Conv1D, whose weight is (k, d).
    """

    modules: list[str]
    names: list[str] | str
    parameters: list[str]
    conv1d: bool

    def lora_arguments(self) -> dict[str, Any]:
        """The arguments of ``peft.LoraConfig`` that adapt these targets."""
        return {
            "target_modules": self.names,
            "target_parameters": self.parameters or None,
            "fan_in_fan_out": self.conv1d,
        }


def default_target_modules(model: nn.Module, sweep: str = "qv+ffn") -> list[str]:
    """The linears of a sweep of the paper, as ``LoraConfig(target_modules=...)`` takes them.

    Experts that share one tensor are no modules: ``choose_targets`` has them as well.

    Args:
        model: The causal LM.
        sweep: The sweep of Figure 4. "qv" has the query and value projections, "qkvo" the key and output
            projections as well, "ffn" every MLP linear. "qv+ffn" (default) is "qv" and "ffn" together, and
            "all" is "qkvo" and "ffn" together.

    Returns:
        The shortest suffixes of module names that match the targets and nothing else.

    Raises:
        ValueError: The targets cannot be told, or none of them is a module.
    """
    targets = choose_targets(model, sweep)
    if not targets.modules or isinstance(targets.names, str):
        raise ValueError(
            f"the targets {sweep!r} of {type(model).__name__} are no list of module names; take "
            "choose_targets(model, sweep).lora_arguments()"
        )
    return targets.names


def check_patterns(field: str, value: Any) -> None:
    """Check the form of ``target_modules`` or ``exclude_modules``, without a model.

    Raises:
        ValueError: It is no text and no list of texts, or no regular expression. The message names the field.
    """
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, Mapping) or not isinstance(texts, Collection) or not texts:
        raise ValueError(f"{field} must be a text or a list of names, got {value!r}")
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{field} must be a text or a list of names, got {value!r}")
    if isinstance(value, str) and not _is_name(value) and value != ALL_LINEAR and value not in TARGET_SWEEPS:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{field}={value!r} is no regular expression: {error}") from None


def check_lora_config(model: nn.Module, config: Any) -> None:
    """Check that each name in a config of peft matches a part of a model; peft wants one match for all names.

    Args:
        model: The causal LM, without an adapter.
        config: The ``peft.PeftConfig``, whose ``target_modules`` may be a list of names.

    Raises:
        ValueError: A name matches none. The message has the names that are most like it.
    """
    names = getattr(config, "target_modules", None)
    if isinstance(names, str) or not names:
        return
    found = _Candidates(model)
    known = [*found.modules, *found.parameters()]
    for name in sorted(names):
        if not _matches(name, known) and not _renamed_by_peft(model, [name]):
            raise ValueError(f"target_modules has {name!r}, {_no_match(found, 'target_modules', name, None)}")


def choose_targets(
    model: nn.Module,
    target_modules: str | Collection[str] = "qv+ffn",
    exclude_modules: str | Collection[str] | None = None,
) -> Targets:
    """Find the parts of a model that get an adapter: linears and experts that rows of text reach.

    A name stands for every linear whose full name is it, or ends with it after a dot, as in peft. It also
    stands for the weights of experts that share one tensor. A text of letters, digits, underscores and dots
    is one name. Any other text is a regular expression, which must match the whole full name.

    A sweep is read from the structure of the model. The linears beside a query projection are attention. The
    linears under an MLP, its shared experts and its experts are the MLP. A fused query-key-value projection
    is all three. MLA has ``q_proj``, or ``q_a_proj`` and ``q_b_proj``, for its query, and
    ``kv_a_proj_with_mqa`` and ``kv_b_proj`` for its key and value. A model of state space layers alone has
    their ``in_proj`` for query, key and value. State space layers beside attention get no adapter, and a
    warning names them.

    Args:
        model: The causal LM, without an adapter.
        target_modules: A sweep ("qv", "qkvo", "ffn", "all", or "qv+ffn", the default), "all-linear" (every
            linear of the text decoder and every expert), names, one name, or a regular expression.
        exclude_modules: The targets that are left out: names, one name, or a regular expression. None
            (default) leaves none out.

    Returns:
        The targets.

    Raises:
        ValueError: A name or an expression matches no linear of the text decoder. Or the output embedding is
            a target, or a module on which an adapter has no effect. Or the model has no module with a role
            of the sweep. The message says what to pass.
    """
    check_patterns("target_modules", target_modules)
    found = _Candidates(model)
    if isinstance(target_modules, str) and target_modules in TARGET_SWEEPS:
        chosen = _sweep(found, target_modules)
    elif target_modules == ALL_LINEAR:
        chosen = [name for name in found.names if name not in found.unused]
        if skipped := [name for name in found.linears if name in found.unused]:
            warnings.warn(
                f"{_leaves(skipped)} of {found.kind} get no adapter: its forward reads their weights without "
                "a call of the modules",
                stacklevel=2,
            )
    else:
        chosen = _matching(found, "target_modules", target_modules)
    if exclude_modules is not None:
        check_patterns("exclude_modules", exclude_modules)
        excluded = set(_matching(found, "exclude_modules", exclude_modules, chosen))
        chosen = [name for name in chosen if name not in excluded]
    if not chosen:
        raise ValueError(
            f"exclude_modules={exclude_modules!r} leaves no target of target_modules={target_modules!r} in "
            f"{found.kind}"
        )
    if unused := [name for name in chosen if name in found.unused]:
        raise ValueError(
            f"an adapter on {_leaves(unused)} of {found.kind} would have no effect: its forward, or a fused "
            "kernel, reads their weights without a call of the modules; pass "
            f"exclude_modules={_leaves(unused)}"
        )
    return _targets(found, chosen)


class _Candidates:
    """The linears and experts of a model that may get an adapter.

    Attributes:
        model: The model.
        kind: The name of its class.
        modules: All modules by their names.
        linears: The linear modules of the text decoder by their names, without the output embedding.
        experts: The names of weights of experts that share one tensor.
        names: The names of both.
        unused: The names of modules on which an adapter has no effect.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kind = type(model).__name__
        self.modules = dict(model.named_modules())
        text = text_modules(model)
        self.linears = {name: module for name, module in text.items() if name and _is_linear(module)}
        self.experts = {
            f"{name}.{key}"
            for name, module in text.items()
            for key, parameter in module.named_parameters(recurse=False)
            if _holds_experts(name, module) and parameter.ndim >= 2 and "bias" not in key
        }
        self.names = [*self.linears, *sorted(self.experts)]
        self.unused = directly_read(model)

    def parameters(self) -> list[str]:
        """The names of all parameters, those of tied weights included."""
        return [name for name, _ in self.model.named_parameters(remove_duplicate=False)]


def _is_linear(module: nn.Module) -> bool:
    # Quantised linears are not always nn.Linear, but have its sizes.
    return isinstance(module, Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _holds_experts(name: str, module: nn.Module) -> bool:
    return not _is_linear(module) and ("Experts" in type(module).__name__ or "experts" in name.split("."))


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[\w.]+", text) is not None


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    """The full names that a name stands for, or that a regular expression matches."""
    if _is_name(pattern):
        return [name for name in names if name == pattern or name.endswith("." + pattern)]
    return [name for name in names if re.fullmatch(pattern, name)]


def _matching(
    found: _Candidates, field: str, patterns: str | Collection[str], among: list[str] | None = None
) -> list[str]:
    """The candidates that patterns stand for; ``ValueError`` if one of the patterns stands for none.

    Args:
        found: The candidates.
        field: The name of the argument, for messages.
        patterns: One name, one regular expression, or names.
        among: The full names that may be matched; None (default) stands for all candidates.
    """
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else sorted(patterns):
        if not isinstance(patterns, str) and not _is_name(pattern):
            raise ValueError(
                f"{field} has {pattern!r} in a list, which takes names; pass one regular expression as a text"
            )
        if among is None:
            _check_embeddings(found, field, pattern)
        matched = _matches(pattern, found.names if among is None else among)
        if not matched:
            raise ValueError(f"{field} has {pattern!r}, {_no_match(found, field, pattern, among)}")
        chosen.update(matched)
    return [name for name in found.names if name in chosen]


def _check_embeddings(found: _Candidates, field: str, pattern: str) -> None:
    for role in ("output", "input"):
        get: Any = getattr(found.model, f"get_{role}_embeddings", None)
        embedding = get() if get is not None else None
        names = [name for name, module in found.modules.items() if name and module is embedding]
        if hit := _matches(pattern, names):
            raise ValueError(
                f"{field} has {pattern!r}, which is or matches {hit[0]}, the {role} embedding of "
                f"{found.kind}; it can have no adapter here: leave it out"
            )


def _no_match(found: _Candidates, field: str, pattern: str, among: list[str] | None) -> str:
    """The end of the message for a pattern that matches nothing."""
    if among is not None:
        return f"which matches none of the targets {_leaves(among)}"
    if pattern in TARGET_SWEEPS or pattern == ALL_LINEAR:
        return f"which is no name of a module; pass {field}={pattern!r} alone, not in a list"
    linears = f"the linears of its text decoder are {_leaves(found.names)}"
    elsewhere = [name for name in _matches(pattern, found.modules) if name]
    if elsewhere:
        what = f"the {type(found.modules[elsewhere[0]]).__name__} {elsewhere[0]} of {found.kind}"
        if any(_is_linear(found.modules[name]) for name in elsewhere):
            return f"which is {what}; rows of text do not reach it: {linears}"
        inner = [name for name in found.names if name.startswith(elsewhere[0] + ".")]
        return f"which is {what} and no linear; {f'its linears are {_leaves(inner)}' if inner else linears}"
    what = "is no module of" if _is_name(pattern) else "is a regular expression that matches no module of"
    known = {".".join(name.split(".")[-pattern.count(".") - 1 :]) for name in found.names}
    near = difflib.get_close_matches(pattern, sorted(known), n=3)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
        return f"which {what} {found.kind}; {hint} The {linears.removeprefix('the ')}"
    return f"which {what} {found.kind}; {linears}"


def _leaves(names: Iterable[str]) -> list[str]:
    """The different last parts of names, in their order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _sweep(found: _Candidates, sweep: str) -> list[str]:
    """The candidates that have the roles of a sweep."""
    roles = read_roles(found.linears, found.experts)
    wanted = TARGET_SWEEPS[sweep]
    missing = [role for role in wanted if not set(roles.names[role]) - found.unused]
    if not roles.attention and "MLP" in missing and len(missing) < len(wanted):
        missing.remove("MLP")  # Mamba has none
    if missing:
        what = "MLP linear" if missing[0] == "MLP" else f"{missing[0]} projection"
        usable = _leaves(name for name in found.names if name not in found.unused)
        raise ValueError(
            f"no {what} was found in {found.kind} for target_modules={sweep!r}; pass target_modules=[...] "
            f"with names of its linears, {usable}"
        )
    chosen = {name for role in wanted for name in roles.names[role]} - found.unused
    if roles.rest and "query" in wanted:
        _tell_rest(found, sweep, chosen, roles.rest)
    return [name for name in found.names if name in chosen]


def _tell_rest(found: _Candidates, sweep: str, chosen: set[str], rest: list[str]) -> None:
    """Name the mixers without attention, and other linears, that a sweep leaves without an adapter."""
    parts = list(dict.fromkeys(".".join(inside_block(name)[-2:]) for name in rest))
    text = (
        f"target_modules={sweep!r} leaves linears of {found.kind} that are neither attention nor MLP without "
        f"an adapter: {', '.join(parts)}"
    )
    if usable := [name for name in rest if name not in found.unused]:
        more = _suffixes([*(chosen - found.experts), *usable], found.modules)
        experts = _suffixes([*(chosen & found.experts)], found.parameters(), depth=2)
        if isinstance(more, list) and isinstance(experts, list):
            what = "them" if len(usable) == len(rest) else f"those of {_leaves(usable)}"
            text += f". To adapt {what} as well, pass target_modules={more + experts}"
    warnings.warn(text, stacklevel=4)


def _targets(found: _Candidates, chosen: list[str]) -> Targets:
    linears = [name for name in chosen if name in found.linears]
    taken = _renamed_by_peft(found.model, linears)
    modules = [name for name in linears if name.rpartition(".")[2] not in taken]
    weights = []
    for name in (name for name in linears if name.rpartition(".")[2] in taken):
        weight: Any = getattr(found.linears[name], "weight", None)
        if weight is None or not weight.is_floating_point():
            raise ValueError(
                f"peft cannot adapt {name} of {found.kind}, which is quantised and has the name of a weight "
                f"of experts; pass exclude_modules={sorted(taken)}"
            )
        weights.append(f"{name}.weight")
    parameters = [name for name in chosen if name in found.experts] + weights
    suffixes = _suffixes(parameters, found.parameters(), depth=2)
    if isinstance(suffixes, str):
        raise ValueError(f"peft cannot tell the parameters {parameters[0]} of {found.kind} from others")
    conv1d = any(isinstance(found.modules[name], Conv1D) for name in modules)
    return Targets(modules, _suffixes(modules, found.modules), suffixes, conv1d)


def _suffixes(targets: list[str], names: Iterable[str], depth: int = 1) -> list[str] | str:
    """The shortest dotted suffixes that peft matches with the targets and no other name.

    They have at least ``depth`` parts, and as many in every block. Where a full name ends another one, they
    are a regular expression.
    """
    wanted = set(targets)
    other = {suffix for name in names if name not in wanted for suffix in _endings(name)}
    alike: dict[str, list[str]] = {}
    for name in targets:
        alike.setdefault(".".join(name.split(".")[-1 - depth :]), []).append(name)
    suffixes: set[str] = set()
    for group in alike.values():
        for length in range(depth, max(name.count(".") for name in group) + 2):
            ends = {".".join(name.split(".")[-length:]) for name in group}
            whole = length > max(name.count(".") for name in group)
            if not ends & other and (whole or not any(end[0].isdigit() for end in ends)):
                suffixes |= ends
                break
        else:
            return "|".join(map(re.escape, targets))
    return sorted(suffixes)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _renamed_by_peft(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The last parts of names that peft takes for weights of experts, and not for those of modules.

    In models whose experts were linears in older versions of transformers, peft turns names such as
    ``gate_proj`` into the tensors of the experts, for linears of the shared experts as well.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older version of peft, which renames nothing
        return set()
    renamed: set[str] = set()
    for leaf in _leaves(names):
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it wants other parts of the same experts as well
            renamed.add(leaf)
        else:
            if leaf not in (config.target_modules or ()):
                renamed.add(leaf)
    return renamed
