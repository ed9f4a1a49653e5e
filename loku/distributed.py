"""The processes of ``torchrun`` or ``accelerate launch``: their shares of the work, and their agreement."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process and the number of processes, (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Whether this process shows progress and writes files: process 0, or the only one."""
    return rank_and_size()[0] == 0


def from_main_process(value: T) -> T:
    """Return the main process's value in every process; all processes must call this.

    Args:
        value: A value that can be pickled. Only the main process's counts.
    """
    if rank_and_size()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def check_in_main_process(check: Callable[[], T]) -> T:
    """Call a check in the main process, and raise its error in every process; all processes must call this.

    Args:
        check: A function that raises ``ValueError`` or ``OSError`` if something is wrong.

    Returns:
        The result of the check, which must be picklable, in every process.

    Raises:
        ValueError: ``check`` has raised it.
        OSError: ``check`` has raised it.
    """
    answer: Any = None
    error: Exception | None = None
    if is_main_process():
        try:
            answer = check()
        except (ValueError, OSError) as raised:
            error = raised
    answer, error = from_main_process((answer, error))
    if error is not None:
        raise error
    return answer


def same_in_all_processes_(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with the main process's, in place, and return it."""
    if rank_and_size()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def sum_over_processes_(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all processes, in place, and return it.

    The sum may be rounded differently in each process.
    """
    if rank_and_size()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def first_error(message: str | None) -> str | None:
    """Tell all processes of an error in one of them, so that all stop; all processes must call this.

    Args:
        message: This process's error, or None.

    Returns:
        The message of the first process that has one, which says so in the other processes; or None.
    """
    size = rank_and_size()[1]
    if size == 1:
        return message
    # gloo reduces on the CPU and NCCL on the device; the flag is cheap, and the texts follow an error alone.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    failed = torch.tensor([message is not None], dtype=torch.int32, device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not failed.item():
        return None
    messages: list[str | None] = [None] * size
    dist.all_gather_object(messages, message)
    rank, first = next((rank, text) for rank, text in enumerate(messages) if text is not None)
    return first if message is not None else f"{first} (in process {rank})"


def wait_for_all_processes() -> None:
    """Wait until every process has called this."""
    if rank_and_size()[1] > 1:
        dist.barrier()


# Sharded weights are DTensors (FSDP2). They are recognised by their methods and typed as ``Any``, because the
# import of torch.distributed.tensor takes a second.


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a shard."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Tensor:
    """Return the whole of a tensor that may be sharded; all processes must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_tensor(tensor: Any) -> Tensor:
    """Return this process's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def has_shards(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model, so that all processes must run the same number of forwards."""
    return any(hasattr(module, "reshard") for module in model.modules())


def reshard_(model: nn.Module) -> None:
    """Free the whole weights that FSDP2 keeps after a forward: the parameters are the shards again."""
    for module in model.modules():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def copy_whole_(tensor: Any, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded.

    Args:
        tensor: The tensor to overwrite, or this process's shard of it.
        value: The whole tensor, of the unsharded shape. It is the same in all processes.
    """
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def share_of_batches(batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield this process's share of some batches, equally many in each process.

    All processes gather sharded weights together. So a process that has run out of batches runs once more
    with a batch that does not count.

    Args:
        batches: All batches, the same in every process. Of n processes, each takes every n-th.

    Yields:
        A batch, and whether it counts.
    """
    rank, size = rank_and_size()
    mine, number = [], -1
    for number, batch in enumerate(batches):
        if number % size == rank:
            mine = [batch]
        if number % size == size - 1:
            yield mine.pop(), True
    if (number + 1) % size:
        yield (mine.pop(), True) if mine else (batch, False)


def spread(function: Callable[..., list[T]], *columns: Sequence[Any], equal: bool = False) -> list[T]:
    """Compute ``function(*columns)`` with the rows shared out among the processes.

    Of n processes, each takes every n-th row. All processes must call this, and all get all the results.

    Args:
        function: A function that maps lists to one list of results, in order, one for each row.
        columns: The lists, all of one length. The same rows must be given to every process.
        equal: Whether all processes get equally many rows, False by default. A process with one row fewer
            then computes a row of another process once more, because sharded weights are gathered together.

    Returns:
        The results, in the order of the rows.
    """
    rank, size = rank_and_size()
    share = [column[rank::size] for column in columns]
    missing = equal and len(columns[0]) > size * len(share[0])
    if missing:
        share = [[*part, column[0]] for part, column in zip(share, columns, strict=True)]
    results = function(*share) if share[0] else []
    if missing:
        results.pop()
    if size == 1:
        return results
    gathered: list[list[T]] = [[] for _ in range(size)]
    dist.all_gather_object(gathered, results)
    merged: list[Any] = [None] * len(columns[0])
    for other, part in enumerate(gathered):
        merged[other::size] = part
    return merged
