"""``UnlearnTrainer``: a step's loss is that of one batch, wherever its rows are run."""

import pytest
import torch
from models import tiny_model
from test_objectives import FORGET, METHODS, RETAIN, VOCAB, trainer_of, with_lora

from loku.objectives import OBJECTIVES
from loku.trainer import PairedDataset, PairSampler, collate_pairs

pytestmark = pytest.mark.usefixtures("one_thread")


# Exact normalisation


def trained(method, tmp_path, size, steps, tuning="lora"):
    """Weights and log after two epochs of 4 rows, in float64."""
    model = tiny_model("llama", VOCAB).double()
    model = with_lora(model) if tuning == "lora" else model
    trainer = trainer_of(
        model,
        method,
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        optim="sgd",
        learning_rate=0.1,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return weights, [entry for entry in trainer.state.log_history if "forget_loss" in entry]


@pytest.mark.parametrize("method", ["ihl", "kl", "dpo"])  # means over tokens, and over rows
def test_micro_batches_are_one_batch(method, tmp_path):
    """Rows have unlike numbers of tokens, and the last micro-batch of 3 + 1 fewer rows."""
    lengths = [len(row["labels"]) - row["labels"].count(-100) for row in FORGET]
    assert len(set(lengths)) == len(lengths)
    weights, log = trained(method, tmp_path, 4, 1)
    for size, steps in ((1, 4), (3, 2)):
        parts, parts_log = trained(method, tmp_path, size, steps)
        torch.testing.assert_close(parts, weights, rtol=1e-9, atol=1e-12)
        assert len(parts_log) == len(log) == 2
        for entry, expected in zip(parts_log, log, strict=True):
            assert entry == pytest.approx(expected, rel=1e-6)  # "loss" is summed in float32


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_labels_add_nothing(method, tmp_path):
    """What fills up the last step of an epoch where there are more processes than rows."""
    model = with_lora(tiny_model("llama", VOCAB).double())
    trainer = trainer_of(model, method, tmp_path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for indices in ([0, 2], [0, None, 2, None]):
        batch = collate_pairs([trainer.train_dataset[i] for i in indices], pad_token_id=0)
        trainer._batch_metrics.clear()
        loss = trainer.compute_loss(model, batch)
        metrics = {name: values[0] for name, values in trainer._batch_metrics.items()}
        results.append((loss, metrics, torch.autograd.grad(loss, parameters)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)

    batch = collate_pairs([trainer.train_dataset[None]] * 2, pad_token_id=0)
    loss = trainer.compute_loss(model, batch)  # a process that has no row at all
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("method", ["kl", "npo"])
def test_a_full_model_has_references_for_rows_without_labels(method, tmp_path, monkeypatch):
    expected, _ = trained(method, tmp_path, 3, 2, tuning="full")
    sampler = trainer_of(tiny_model("llama", VOCAB), method, tmp_path)._get_train_sampler()
    assert sampler.multiple == 1
    fills_up = property(lambda self: 3, lambda self, value: None)
    monkeypatch.setattr(PairSampler, "multiple", fills_up, raising=False)
    weights, _ = trained(method, tmp_path, 3, 2, tuning="full")
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


def test_the_order_is_of_the_seed_and_the_epoch():
    dataset = PairedDataset(FORGET, RETAIN, seed=0)
    orders = [list(PairSampler(dataset, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] and sorted(orders[0]) == [0, 1, 2, 3]
    dataset.set_epoch(1)
    assert list(PairSampler(dataset, 0)) != orders[0] == orders[1]
    dataset.set_epoch(0)
    whole = PairSampler(dataset, 0, multiple=3)
    assert list(whole) == [*orders[0], None, None] and len(whole) == 6


def test_counts():
    counted = {
        "forget": torch.tensor([[1, 1, 0], [0, 0, 0]]).bool(),
        "refusal": torch.tensor([[1, 0, 0], [0, 0, 0]]).bool(),
        "retain": torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
    }
    expected = {"dpo": (1, 5), "npo": (1, 5), "idk": (1, 5), "ihl": (2, 5), "kl": (2, 5)}
    for method, counts in expected.items():
        assert tuple(n.item() for n in OBJECTIVES[method].counts(counted).values()) == counts
    assert OBJECTIVES["ga"].counts(counted).keys() == {"forget_loss"}
