"""An adapter of a smaller rank: in each module the best approximation of B A in the Frobenius norm.

It is the truncated singular value decomposition (Eckart and Young, 1936). B (d, n) and A (n, k) have a small
rank n. So with the QR decompositions B = Q_B R_B and A^T = Q_A R_A the singular values of B A are those of
the core R_B R_A^T (n, n), and no matrix (d, k) is formed. All is computed in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.utils.other import get_pattern_key
from torch import Tensor

from loku.adapters import changes_base
from loku.counts import check_counts
from loku.saving.adapter_files import unit_scaling_, unusual_fields

PREFIX = "base_model.model."  # of the names in an adapter's file
# Fields that make more of B A than a sum with the weight, and tie factors of two modules.
_VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config")
_NOT_COMPRESSED = (*_VARIANTS, "ensure_weight_tying")
_LETTERS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
_EMBEDDING = {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
_BIAS = ".lora_B.bias"


@dataclass(frozen=True)
class ModuleCompression:
    """What the adapter of one module lost.

    Attributes:
        exact_rank: Its rank before. That of each expert, if the module has experts.
        rank: Its rank now.
        norm: The Frobenius norm of what it added to the weight before, scaling * B A.
        error: The Frobenius norm of the difference.
    """

    exact_rank: int
    rank: int
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """The error relative to the norm; 0 if there is no error."""
        return self.error / self.norm if self.error else 0.0


@dataclass(frozen=True)
class Compression:
    """What an adapter of a smaller rank lost.

    The errors are those of the best approximation, in float64. The factors are stored in float32, which adds
    about 1e-7 of the norm.

    Attributes:
        rank: The rank that was asked for.
        exact_rank: The largest rank of a module before.
        modules: The modules by their names in the base model.
    """

    rank: int
    exact_rank: int
    modules: dict[str, ModuleCompression]

    @property
    def relative_error(self) -> float:
        """The Frobenius norm of the difference in all modules, relative to that of the exact adapter."""
        error = math.hypot(*(module.error for module in self.modules.values()))
        return error / math.hypot(*(module.norm for module in self.modules.values())) if error else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the largest relative error, the first of equal ones, and that error."""
        errors = {name: module.relative_error for name, module in self.modules.items()}
        name = max(errors, key=lambda name: errors[name])
        return name, errors[name]

    def facts(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        return {
            "rank": self.rank,
            "exact_rank": self.exact_rank,
            "relative_error": self.relative_error,
            "modules": {
                name: {
                    "exact_rank": module.exact_rank,
                    "rank": module.rank,
                    "norm": module.norm,
                    "relative_error": module.relative_error,
                }
                for name, module in self.modules.items()
            },
        }


def loss_facts(lost: Compression | None) -> dict[str, str | None]:
    """The facts about a compressed adapter for ``loku_save.json``; none of an exact adapter.

    Args:
        lost: What it lost, or None.
    """
    if lost is None or lost.exact_rank <= lost.rank:
        return {}
    return {
        "rank": str(lost.rank),
        "exact_rank": str(lost.exact_rank),
        "relative_error": f"{lost.relative_error:.3e}",
    }


class AdapterModule(NamedTuple):
    """The adapter of one module of E experts, or of E = 1.

    Attributes:
        B: (E, d, n) float64, with the scaling.
        A: (E, n, k) float64.
        scaling: The scaling in B.
        ends: The ends of the names of B and A in the file.
        pattern_names: The names by which peft looks up its rank.
    """

    B: Tensor
    A: Tensor
    scaling: float
    ends: Mapping[str, str]
    pattern_names: list[str]


def check_compressible(config: Any) -> None:
    """Check that an adapter of this config can have a smaller rank.

    Args:
        config: The ``peft.LoraConfig``.

    Raises:
        ValueError: It is DoRA or another variant of LoRA, it ties the factors of two modules, or its
            initialisation changes the base weights. The message names the field.
    """
    fields = {name: getattr(config, name, None) for name in _NOT_COMPRESSED}
    found = [name for name, value in {**fields, **unusual_fields(config)}.items() if value]
    if found:
        raise ValueError(
            f"an adapter with {found[0]} is not compressed to a smaller rank: it is more than scaling * B A "
            "in each module; save the exact adapter (no rank), or the merged model"
        )
    if changes_base(config):
        raise ValueError(
            f"an adapter with init_lora_weights={config.init_lora_weights!r} is not compressed to a smaller "
            "rank: peft changes the base weights by its rank when it loads it. Convert it to a plain adapter "
            "by peft's path_initial_model_for_weight_conversion, or save the merged model"
        )


def adapter_modules(
    config: Any, state: Mapping[str, Tensor], parameter_names: Mapping[str, str]
) -> dict[str, AdapterModule]:
    """Read the factors of an adapter.

    Args:
        config: The ``peft.LoraConfig``.
        state: The tensors by their names in an adapter's file.
        parameter_names: As for ``compressed_adapter``.

    Returns:
        The modules by their names in the base model.

    Raises:
        ValueError: A factor is not that of a linear module, an embedding or experts, or is not of the config.
    """
    found: dict[str, dict[str, str]] = {}
    for key in state:
        if ".lora_" not in key or key.endswith(_BIAS):
            continue
        for letters in (_LETTERS, _EMBEDDING):
            for end in letters.values():
                if key.endswith(end):
                    found.setdefault(key.removesuffix(end), dict(letters))
        if not key.endswith((*_LETTERS.values(), *_EMBEDDING.values())):
            raise ValueError(f"{key} is no factor of plain LoRA, so the adapter is not compressed")
    if not found:
        raise ValueError("the adapter has no LoRA factors")
    return {
        prefix.removeprefix(PREFIX): _module(config, state, prefix, letters, parameter_names)
        for prefix, letters in found.items()
    }


def _module(
    config: Any,
    state: Mapping[str, Tensor],
    prefix: str,
    letters: Mapping[str, str],
    parameter_names: Mapping[str, str],
) -> AdapterModule:
    name = prefix.removeprefix(PREFIX)
    B, A = (state.get(f"{prefix}{letters[letter]}") for letter in "BA")
    if B is None or A is None or B.dim() != 2 or A.dim() != 2 or len(A) != B.shape[1]:
        shapes = " and ".join("no tensor" if t is None else str(tuple(t.shape)) for t in (B, A))
        raise ValueError(
            f"{name}: its factors B and A are {shapes}; only those of linear modules, embeddings and "
            "experts, (d, rank) and (rank, k), are compressed"
        )
    B, A = B.double(), A.double()
    if not (B.isfinite().all() and A.isfinite().all()):
        raise ValueError(f"{name}: its factors have NaN or Inf, so no smaller rank is near them")
    plain_name = name.replace(".base_layer", "")  # wrappers of several parameters of one module are nested
    parameters = [parameter_names[name]] if name in parameter_names else _parameters(config, plain_name)
    pattern_names = [f"{plain_name}.{parameter}" for parameter in parameters] or [plain_name]
    sizes = {_rank_and_alpha(config, pattern_name) for pattern_name in pattern_names}
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: its parameters {', '.join(parameters)} have adapters of several ranks or alphas, and "
            "the file does not say which is which: load the adapter on its base (--model), which does"
        )
    ((rank, alpha),) = sizes
    experts = len(A) // rank if parameters else 1
    if len(A) != experts * rank:
        raise ValueError(
            f"{name}: its factors have rank {len(A)}, and its config says {rank}: the file and the config "
            "are not of one adapter"
        )
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    B = B.view(-1, rank, experts).permute(2, 0, 1)
    return AdapterModule(B * scaling, A.view(experts, rank, -1), scaling, letters, pattern_names)


def _parameters(config: Any, module: str) -> list[str]:
    """The parameters of a module that ``target_parameters`` names."""
    names = (target.rpartition(".") for target in config.target_parameters or ())
    return sorted({name for part, _, name in names if f".{module}".endswith(f".{part}")})


def _rank_and_alpha(config: Any, name: str) -> tuple[int, float]:
    found: list[Any] = []
    for default, pattern in ((config.r, config.rank_pattern), (config.lora_alpha, config.alpha_pattern)):
        pattern = pattern or {}
        found.append(pattern.get(get_pattern_key(list(pattern), name), default))
    rank, alpha = found
    check_counts(**{f"the rank of {name}": rank})
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"the lora_alpha of {name} must be a number, got {alpha!r}")
    return rank, alpha


def _decomposed(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (E, d, m), S (E, m) and V (E, k, m) of B A = U diag(S) V^T, without the product (d, k).

    The largest entry of each column of U is positive. Singular values that are rounding are 0.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    U, V = Q_B @ U, Q_A @ Vh.mT
    largest = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    noise = S[..., :1] * (torch.finfo(S.dtype).eps * max(S.shape[-1], 1))
    return U * signs, torch.where(S > noise, S, 0.0), V * signs


def _losses(module: AdapterModule, S: Tensor, rank: int) -> ModuleCompression:
    exact_rank = module.A.shape[1]
    error = S[:, rank:].square().sum().sqrt().item() if rank < exact_rank else 0.0
    return ModuleCompression(exact_rank, min(rank, exact_rank), S.square().sum().sqrt().item(), error)


@torch.no_grad()
def errors_by_rank(
    config: Any,
    state: Mapping[str, Tensor],
    ranks: Iterable[int],
    *,
    parameter_names: Mapping[str, str] | None = None,
) -> list[Compression]:
    """Compute what an adapter would lose at each of several ranks, without its factors at any.

    Args:
        config: The ``peft.LoraConfig``.
        state: The tensors by their names in an adapter's file.
        ranks: The ranks.
        parameter_names: As for ``compressed_adapter``.

    Raises:
        ValueError: The errors of ``compressed_adapter``.
    """
    ranks = list(ranks)
    for rank in ranks:
        check_counts(rank=rank)
    check_compressible(config)
    modules = adapter_modules(config, state, parameter_names or {})
    values = {name: _decomposed(module.B, module.A)[1] for name, module in modules.items()}
    exact_rank = max(module.A.shape[1] for module in modules.values())
    return [
        Compression(rank, exact_rank, {name: _losses(modules[name], values[name], rank) for name in modules})
        for rank in ranks
    ]


@torch.no_grad()
def compressed_adapter(
    config: Any,
    state: Mapping[str, Tensor],
    rank: int,
    *,
    parameter_names: Mapping[str, str] | None = None,
) -> tuple[Any, dict[str, Tensor], Compression]:
    """Compress an adapter to a rank, by the best approximation of scaling * B A in each module.

    A module of at most this rank stays exact. In a module with experts (3-D parameters) each expert has the
    rank. Every scaling becomes 1: ``lora_alpha`` is the rank, and ``use_rslora`` is false. The two factors
    get equal singular values. Biases, modules that were trained whole and trained tokens stay as they are.
    An adapter whose modules all have at most this rank and the scaling 1 stays as it is, with its config.

    Args:
        config: The ``peft.LoraConfig``, which is not changed.
        state: The tensors by their names in an adapter's file.
        rank: The rank, at least 1.
        parameter_names: The name of the parameter that the adapter of a module changes, by the name of the
            module in the file, where the module has several. None (default) leaves them to the config, which
            says enough unless they have adapters of several ranks.

    Returns:
        The new config, the new tensors (float32 factors), and what was lost.

    Raises:
        ValueError: The rank is no positive integer, the adapter cannot be compressed
            (``check_compressible``), or a factor is not that of a linear module, an embedding or experts.
    """
    check_counts(rank=rank)
    check_compressible(config)
    modules = adapter_modules(config, state, parameter_names or {})
    exact_rank = max(module.A.shape[1] for module in modules.values())
    new: dict[str, Tensor] = {key: tensor for key, tensor in state.items() if ".lora_" not in key}
    losses, ranks = {}, {}
    for name, module in modules.items():
        U, S, V = _decomposed(module.B, module.A)
        losses[name] = _losses(module, S, rank)
        kept = losses[name].rank
        ranks.update(dict.fromkeys(module.pattern_names, kept))
        B, A = module.B, module.A
        if kept < module.A.shape[1]:
            root = S[:, None, :kept].sqrt()
            # A module of fewer than ``kept`` inputs or outputs has fewer singular values: zeros fill it up.
            fill = (0, max(0, kept - S.shape[1]))
            B, A = (F.pad(part[:, :, :kept] * root, fill) for part in (U, V))
            A = A.mT
        parts = {"B": B.permute(1, 2, 0).flatten(1), "A": A.flatten(0, 1)}
        for letter, end in module.ends.items():
            new[f"{PREFIX}{name}{end}"] = parts[letter].float().contiguous()
        bias = state.get(f"{PREFIX}{name}{_BIAS}")
        if bias is not None:
            new[f"{PREFIX}{name}{_BIAS}"] = (bias.double() * module.scaling).float()
    compression = Compression(rank, exact_rank, losses)
    if exact_rank <= rank and all(module.scaling == 1 for module in modules.values()):
        return copy.deepcopy(config), dict(state), compression
    config = copy.deepcopy(config)
    unit_scaling_(config, ranks)
    return config, new, compression
