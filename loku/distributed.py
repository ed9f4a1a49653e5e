"""What the processes of ``torchrun`` or ``accelerate launch`` share out, and what they agree on."""

import torch.distributed as dist


def rank_and_size():
    """This process's number, and how many there are: (0, 1) where torch.distributed is not set up."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main_process():
    """Whether this is the process, or the only one, that shows progress and writes files."""
    return rank_and_size()[0] == 0


def from_main_process(value):
    """What the main process passed, in all of them."""
    if rank_and_size()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def same_in_all_processes_(tensor):
    """Overwrite it with the main process's, in place."""
    if rank_and_size()[1] > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def sum_over_processes_(tensor):
    """Add up the tensors that the processes pass, in place; the result may round differently in each."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all_processes():
    if rank_and_size()[1] > 1:
        dist.barrier()


# Sharded weights are DTensors (FSDP2).


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor):
    """The whole of a tensor that may be sharded; every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_tensor(tensor):
    """What this process has of a tensor that may be sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def reshard_(model):
    """Let go of the whole weights that FSDP2 keeps after a forward: the parameters are the shards again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def copy_whole_(tensor, value):
    """Copy a whole tensor, the same in all processes, into one that may be sharded."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def share_of_batches(batches):
    """(batch, whether it counts) for this process: every so-many-th, and equally many in each process.

    Sharded weights are gathered by all processes together, so one that has run out runs on with a batch that
    does not count.
    """
    rank, size = rank_and_size()
    mine, number = None, -1
    for number, batch in enumerate(batches):
        if number % size == rank:
            mine = batch
        if number % size == size - 1:
            yield mine, True
            mine = None
    if (number + 1) % size:
        yield (batch, False) if mine is None else (mine, True)


def spread(function, *columns):
    """``function(*columns)``, where it maps lists to one list of results, in order, one a row.

    Where torch.distributed is set up each process is given every so-many-th row; all of them get all the
    results, in the order of the rows, and so must all call this.
    """
    rank, size = rank_and_size()
    share = [column[rank::size] for column in columns]
    results = function(*share) if share[0] else []
    if size == 1:
        return results
    gathered = [None] * size
    dist.all_gather_object(gathered, results)
    merged = [None] * len(columns[0])
    for other, part in enumerate(gathered):
        merged[other::size] = part
    return merged
