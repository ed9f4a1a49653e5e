"""Pairs of forget and retain rows, with refusals, and the order of an epoch."""

from functools import partial

import pytest
import torch
from small_trainers import FORGET, RETAIN, Refusals, items
from small_trainers import row as a_row

from loku.data import PairedDataset, PairSampler, collate_pairs
from loku.data.pairs import Draw

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_retain_row_is_drawn_once_before_any_is_drawn_twice():
    forget = [{"input_ids": [i, i], "labels": [i, i]} for i in range(5)]
    retain = [{"input_ids": [10 + i] * 3, "labels": [10 + i] * 3} for i in range(3)]
    dataset = PairedDataset(forget, retain, seed=0)

    def draw(epoch, order=range(5)):
        dataset.set_epoch(epoch)
        order = list(order)
        return {
            i: item["retain"]["input_ids"][0] for i, item in zip(order, items(dataset, order), strict=True)
        }

    first, second = draw(0), draw(1)
    assert first != second and draw(0, [4, 1, 0, 3, 2]) == first  # independent of the order
    drawn = [*first.values(), *second.values()]
    assert all(sorted(drawn[i : i + 3]) == [10, 11, 12] for i in (0, 3, 6))  # each once before any twice
    assert PairedDataset(forget, retain, seed=1).key("retain", Draw(0, 0)) in range(3)

    batch = collate_pairs(items(dataset, [0, 1]), pad_token_id=7)
    assert batch["is_forget"].tolist() == [True, True, False, False]
    assert batch["input_ids"][0].tolist() == [0, 0, 7] and batch["attention_mask"][0].tolist() == [1, 1, 0]


def test_retain_rows_with_replacement():
    """Each draw is one of all rows, and depends on the seed, the epoch and the forget row alone."""
    forget = [{"input_ids": [i], "labels": [i]} for i in range(40)]
    make = partial(PairedDataset, forget, forget[:5], with_replacement=True)

    def drawn(dataset, epoch):
        dataset.set_epoch(epoch)
        return [dataset.key("retain", Draw(i, i)) for i in range(40)]

    dataset = make(seed=0)
    first, second = drawn(dataset, 0), drawn(dataset, 1)
    assert first != second and drawn(make(seed=0), 0) == first and drawn(make(seed=1), 0) != first
    counts = [first.count(row) for row in range(5)]
    assert min(counts) > 0 and max(counts) > 8  # without replacement each would come 8 times
    assert any(len(set(first[i : i + 5])) < 5 for i in range(0, 40, 5))


def test_pairs_with_refusals():
    kinds = ("forget", "refusal", "retain")
    make = partial(PairedDataset, FORGET, RETAIN, refusals=Refusals(), kinds=kinds)

    def drawn(dataset, epoch, order=range(4)):
        dataset.set_epoch(epoch)
        return {i: dataset.key("refusal", Draw(i, i))[1] for i in order}

    dataset = make(seed=0)
    epochs = [drawn(dataset, epoch) for epoch in range(8)]
    assert len({tuple(epoch.values()) for epoch in epochs}) > 3  # anew each epoch
    assert {refusal for epoch in epochs for refusal in epoch.values()} == {0, 1, 2}
    assert drawn(make(seed=0), 5, [3, 0, 2, 1]) == epochs[5]  # a function of seed, epoch and row
    assert [drawn(make(seed=1), epoch) for epoch in range(8)] != epochs

    (item,) = items(dataset, [2])
    assert list(item) == list(kinds)
    assert item["refusal"]["input_ids"][:3] == FORGET[2]["input_ids"][:3]
    batch = collate_pairs(items(dataset, [0, 1]), pad_token_id=0)
    for number, kind in enumerate(kinds):
        assert batch[f"is_{kind}"].tolist() == [i // 2 == number for i in range(6)]
    assert not [name for name in batch if name.startswith("original")]
    dataset.originals["retain", dataset.key("retain", Draw(0, 0))] = {"states": torch.ones(2, 3)}
    dataset.originals["forget", 1] = {"states": torch.zeros(1, 3), "log": torch.tensor([-3.0])}
    batch = collate_pairs(items(dataset, [0, 1]), 0)
    assert batch["original_log"].tolist() == [-3.0]  # each name is concatenated by itself
    assert batch["original_states"][:, 0].tolist() == [0.0, 1.0, 1.0]  # in the order of the batch's rows


def test_the_order_is_of_the_seed_and_the_epoch():
    dataset = PairedDataset(FORGET, RETAIN, seed=0)
    orders = [list(PairSampler(dataset, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] and sorted(draw.row for draw in orders[0]) == [0, 1, 2, 3]
    dataset.set_epoch(1)
    assert list(PairSampler(dataset, 0)) != orders[0] == orders[1]
    dataset.set_epoch(0)
    whole = PairSampler(dataset, 0, multiple=3)
    assert list(whole) == [*orders[0], Draw(4, None), Draw(5, None)] and len(whole) == 6


def test_workers_that_outlive_an_epoch_follow_it():
    rows = [{"input_ids": [i], "labels": [i]} for i in range(6)]
    dataset = PairedDataset(rows, rows, 3)
    sampler = PairSampler(dataset, 3, "sequential")
    options = {"batch_size": 2, "collate_fn": list, "sampler": sampler}
    kept = torch.utils.data.DataLoader(dataset, num_workers=1, persistent_workers=True, **options)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(list(kept))
        assert epochs[-1] == list(torch.utils.data.DataLoader(dataset, **options))
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_of_like_length_run_together():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 60, (64,), generator=generator).tolist()
    forget = [a_row(i, 1, n) for i, n in enumerate(lengths)]
    dataset = PairedDataset(forget, RETAIN[:1], seed=0)  # a row of 7 tokens
    pairs = items(dataset, range(64))

    def padding(order):
        batches = [[max(lengths[i], 7) for i in order[k : k + 4]] for k in range(0, 64, 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    orders = {
        s: [draw.row for draw in PairSampler(dataset, 0, s, step=4)]
        for s in ("random", "group_by_length", "sequential")
    }
    assert all(sorted(order) == list(range(64)) for order in orders.values())
    assert orders["sequential"] == list(range(64))
    assert padding(orders["group_by_length"]) < 0.5 * padding(orders["random"])
    assert items(dataset, range(64)) == pairs
    dataset.set_epoch(1)
    again = [draw.row for draw in PairSampler(dataset, 0, "group_by_length", step=4)]
    assert again != orders["group_by_length"]
