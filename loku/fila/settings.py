"""The settings of FILA."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from accelerate.utils import convert_file_size_to_int

Fisher = Literal["per-sample", "per-batch"]
Balance = float | str  # "normalised", "paper" or a number
_LEAST, _MOST = 1e-30, 1e30  # the row scales and what is made of them are float32


def memory_bytes(budget: int | str | None) -> int | None:
    """The bytes of a memory budget: "4GiB", "500MB", a number, or None for no limit.

    Raises:
        ValueError: The budget is none of these.
    """
    if budget is None:
        return None
    size = int(budget) if isinstance(budget, str) and budget.isdecimal() else budget
    wanted = f'fisher_memory_budget must be a size like "4GiB", a number of bytes or None, got {budget!r}'
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(wanted)
    try:
        return convert_file_size_to_int(size)
    except ValueError as error:
        raise ValueError(wanted) from error


def check_balance(balance: Any, name: str) -> Balance:
    """Check a balance, and read a number from a text.

    Args:
        balance: The balance; None stands for "normalised".
        name: The name of the setting in messages.

    Returns:
        "normalised", "paper" or a number from 1e-30 to 1e30.

    Raises:
        ValueError: It is none of these.
    """
    if balance in ("normalised", "paper"):
        return balance
    if balance is None:
        return "normalised"
    try:
        number = math.nan if isinstance(balance, bool) else float(balance)
    except (TypeError, ValueError):
        number = math.nan
    if not _LEAST <= number <= _MOST:
        raise ValueError(
            f'{name} must be "normalised", "paper" or a number from {_LEAST:g} to {_MOST:g}, got {balance!r}'
        )
    return number


@dataclass
class FilaConfig:
    """The settings of FILA: of its row scales s_i^2 = sum_j F_forget[i, j] / (F_retain[i, j] + damping).

    ``FilaConfig.official()`` has the settings of the authors' code.

    Args:
        damping: The number that is added to the retain Fisher, >= 0; 1 by default.
        damping_mode: "relative" (default) multiplies the damping by the mean retain Fisher of the module.
            "absolute" takes it as it is, in the unit of the Fisher.
        fisher_samples: The number of rows of each data set that are measured; None (default) measures all.
        seed: The seed that chooses those rows, and that of ``torch.svd_lowrank``, 0 by default.
        fisher_memory_budget: The memory that measuring may hold beside a forward and backward: a size like
            "4GiB", a number of bytes, or None (default) for no limit. A smaller budget takes more passes over
            the data. See ``loku.fila.row_scales.fisher_row_scales``.
        fisher_cache_dir: The directory that keeps row scales. A second run on the same model and data then
            measures nothing. None (default) always measures. See ``loku.fila.row_scale_cache``.
        balance: The size of the row scales, which decides the balance of A and B and so the effective step of
            Adam. "normalised" (default) gives them a root mean square of 1 in each module, "paper" takes them
            as measured, and a number from 1e-30 to 1e30 multiplies the normalised ones. See
            ``loku.fila.row_scales.balanced``.
        fisher: "per-sample" (default) squares the gradient of each row's summed loss (Eq. 2). "per-batch"
            squares the gradient of each batch's mean loss, as the authors' code does.
        decomposition: "row_scaled_svd" (default) is ``loku_kernels.row_scaled_svd`` and divides by no row
            scale. "svd_lowrank" is ``torch.svd_lowrank(q=rank)``, and divides by s + 1e-5, as the authors'
            code does.

    Raises:
        ValueError: A value is out of its range; the message names the field.
    """

    damping: float = 1.0
    damping_mode: Literal["relative", "absolute"] = "relative"
    fisher_samples: int | None = None
    seed: int = 0
    fisher_memory_budget: int | str | None = None
    fisher_cache_dir: str | None = None
    balance: Balance = "normalised"
    fisher: Fisher = "per-sample"
    decomposition: Literal["row_scaled_svd", "svd_lowrank"] = "row_scaled_svd"

    @classmethod
    def official(cls, **options: Any) -> "FilaConfig":
        """The settings of the authors' code (csm9493/efficient-llm-unlearning).

        The Fisher is that of batches' mean losses, weighted by label tokens. The damping is 1e-5 in the unit
        of that Fisher. The row scales are as measured. ``torch.svd_lowrank`` decomposes.
        ``loku.fila.measured_rows.official_rows`` draws the rows that the authors' code measures.

        Args:
            options: ``fisher_samples``, ``seed``, ``fisher_memory_budget`` and ``fisher_cache_dir``.

        Raises:
            TypeError: The options have a setting that the authors' code fixes.
        """
        return cls(
            damping=1e-5,
            damping_mode="absolute",
            balance="paper",
            fisher="per-batch",
            decomposition="svd_lowrank",
            **options,
        )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"FilaConfig.damping must be finite and >= 0, got {self.damping}")
        if self.fisher_samples is not None and self.fisher_samples < 1:
            raise ValueError(f"FilaConfig.fisher_samples must be >= 1 or None, got {self.fisher_samples}")
        for name in ("damping_mode", "fisher", "decomposition"):
            value, choices = getattr(self, name), get_args(get_type_hints(FilaConfig)[name])
            if value not in choices:
                raise ValueError(
                    f"FilaConfig.{name} must be {' or '.join(map(repr, choices))}, got {value!r}"
                )
        self.balance = check_balance(self.balance, "FilaConfig.balance")
        memory_bytes(self.fisher_memory_budget)
