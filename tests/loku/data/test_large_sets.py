"""Retain sets too large to hold, packed rows, and rows of both sets."""

import copy
import re
import warnings

import datasets
import pytest
import torch
from peft import get_peft_model
from small_trainers import FORGET, RETAIN, VOCAB, arguments, lora
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import loku.data.large_sets
from loku import UnlearnTrainer, unlearn
from loku.data import PairSampler, collate, tokenize_dataset
from loku.data.large_sets import LazyRows, StreamedRows, retain_rows
from loku.fingerprints import ordered_rows_fingerprint
from loku.head import check_packing, token_triplets
from loku_kernels import cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")


def taught(forget, retain, tmp_path, **options):
    """Return a trained adapter, as one vector, and its trainer."""
    model = get_peft_model(tiny_model("llama", VOCAB), lora())
    trainer = UnlearnTrainer(model, arguments(tmp_path, **options), forget, retain)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), trainer


# Streams


class Row(dict):
    """A row that counts how many rows are alive, and the most that were."""

    alive = most = 0

    def __init__(self, **columns):
        super().__init__(**columns)
        Row.alive += 1
        Row.most = max(Row.most, Row.alive)

    def __del__(self):
        Row.alive -= 1


class Stream:
    """A stream of rows, made one by one: row i repeats a token of its own four times."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return (Row(input_ids=[3 + i % 90] * 4) for i in range(self.count))


def test_a_stream_is_read_as_it_is_used_and_not_held():
    rows = retain_rows(Stream(10**6), None)
    assert isinstance(rows, StreamedRows) and retain_rows(rows, None) is rows
    asked = [0, 1, 7, 10**6 - 1, 10**6, 10**6 + 1, 2]  # forward, over the end, and back
    assert [rows[k]["input_ids"] for k in asked] == [[3 + k % 10**6 % 90] * 4 for k in asked]
    assert Row.most <= 2


def test_training_on_a_stream(tmp_path):
    """Rows come in their order for any batch size, and the order decides the adapter."""
    weights, trainer = taught(FORGET, Stream(10**6), tmp_path, max_steps=4)
    assert trainer.train_dataset.retain._next == 8 and Row.most <= 2
    parts = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    again, _ = taught(FORGET, Stream(10**6), tmp_path, max_steps=4, **parts)
    torch.testing.assert_close(again, weights, rtol=1e-4, atol=1e-5)
    other, _ = taught(FORGET, Stream(3), tmp_path, max_steps=4)
    assert not torch.allclose(other, weights, rtol=1e-4, atol=1e-5)

    dataset = trainer.train_dataset
    dataset.set_epoch(0)
    draws = list(PairSampler(dataset, 0, "group_by_length", step=2))
    assert [draw.position for draw in draws] == [0, 1, 2, 3]
    assert {draw.row for draw in draws} == {0, 1, 2, 3}
    drawn = [dataset[draw]["retain"]["input_ids"][0] for draw in draws]
    dataset.set_epoch(1)
    assert drawn + [dataset[draw]["retain"]["input_ids"][0] for draw in draws] == list(range(3, 11))


def test_kl_and_fila_on_a_datasets_stream(tmp_path):
    """Full tuning keeps the original model's outputs for all rows to come; FILA measures the first rows."""
    retain = datasets.Dataset.from_list(RETAIN).to_iterable_dataset()
    trainer = UnlearnTrainer(
        tiny_model("llama", VOCAB), arguments(tmp_path, method="kl", max_steps=3), FORGET, retain
    )
    trainer.train()
    assert sorted(key for _, key in trainer.train_dataset.originals) == list(
        range(8)
    )  # the rows of two epochs
    assert trainer.state.log_history[0]["retain_loss"] == pytest.approx(0, abs=1e-5)

    adapters = []
    for rows, samples in ((retain, 3), (RETAIN[:3], None)):
        config = arguments(tmp_path, fisher_samples=samples, max_steps=1, lora_rank=4)
        model = unlearn(tiny_model("llama", VOCAB), FORGET[:3], rows, config=config).model
        adapters.append({name: p for name, p in model.state_dict().items() if ".reference." in name})
    assert len(adapters[0]) == 20
    for name, ours in adapters[0].items():
        torch.testing.assert_close(ours, adapters[1][name])
    with pytest.raises(ValueError, match="set fisher_samples"):
        unlearn(tiny_model("llama", VOCAB), FORGET, retain, config=arguments(tmp_path))


def test_streams_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="generator, which can be read only once"):
        retain_rows((row for row in RETAIN), None)
    with pytest.raises(ValueError, match="retain set is empty"):
        retain_rows(Stream(0), None)[0]
    with pytest.raises(ValueError, match="dataloader_num_workers=0"):
        UnlearnTrainer(
            tiny_model("llama", VOCAB), arguments(tmp_path, dataloader_num_workers=1), FORGET, Stream(9)
        )
    with pytest.raises(ValueError, match='leave retain_sampling="with_replacement" out'):
        args = arguments(tmp_path, retain_sampling="with_replacement")
        UnlearnTrainer(tiny_model("llama", VOCAB), args, FORGET, Stream(9))
    with pytest.raises(ValueError, match="row 1 of the retain set: there is no label"):
        retain_rows(
            datasets.Dataset.from_list([{"input_ids": [1, 2]}, {"input_ids": [1]}]).to_iterable_dataset(),
            None,
        )[3]


# Large sets


def test_a_large_set_is_tokenised_as_it_is_drawn(tmp_path, monkeypatch):
    rows = [{"input_ids": [3 + i] * 5} for i in range(60)]
    expected, _ = taught(FORGET, rows, tmp_path)
    monkeypatch.setattr(loku.data.large_sets, "LAZY_ROWS", 50)
    calls = []
    call = loku.data.large_sets.RowTokenizer.__call__
    monkeypatch.setattr(
        loku.data.large_sets.RowTokenizer,
        "__call__",
        lambda self, i, row: calls.append(i) or call(self, i, row),
    )
    weights, trainer = taught(FORGET, datasets.Dataset.from_list(rows), tmp_path)
    assert isinstance(trainer.train_dataset.retain, LazyRows)
    assert len(calls) == 4 + len(FORGET)  # two steps of two rows
    assert torch.equal(weights, expected)
    lazy = trainer.train_dataset.retain
    held = ordered_rows_fingerprint(tokenize_dataset(rows, None))
    assert ordered_rows_fingerprint(lazy.first()) == held  # a fingerprint reads 100 rows, and there are 60
    assert len(lazy) == 60 and lazy[59] == tokenize_dataset(rows, None)[59] and len(list(lazy)) == 60


# Reports


def test_rows_of_both_sets_are_reported(tmp_path):
    retain = [*RETAIN, FORGET[2], FORGET[1]]
    with pytest.warns(
        UserWarning, match=r"2 of the 7 rows of the retain set are also .* row 5 \(row 2 of the f"
    ):
        UnlearnTrainer(tiny_model("llama", VOCAB), arguments(tmp_path), FORGET, retain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*retain set.*")
        UnlearnTrainer(tiny_model("llama", VOCAB), arguments(tmp_path), FORGET, RETAIN)
        UnlearnTrainer(tiny_model("llama", VOCAB), arguments(tmp_path, method="ga"), FORGET, retain)


def test_a_stream_reports_the_first_of_a_kind():
    stream = datasets.Dataset.from_list([*RETAIN, FORGET[2], FORGET[1]]).to_iterable_dataset()
    rows = retain_rows(stream, None, max_length=11, forget=FORGET)
    with pytest.warns() as caught:
        for k in range(14):
            rows[k]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert re.match("row 3 of the retain set was cut to max_length=11", messages[0])
    assert re.match(r"row 5 of the retain set is also in the forget set \(row 2\)", messages[1])


# Packed rows


def packed(*rows):
    """Pack several rows into one, as TRL does; prompts stay unlabelled."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [len(row["input_ids"]) for row in rows],
    }


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt_neo"])
def test_documents_of_a_row_do_not_see_each_other(kind):
    model = tiny_model(kind, VOCAB).double()
    check_packing(model)
    apart = collate(FORGET, 0)
    together = collate(tokenize_dataset([packed(*FORGET[:3]), FORGET[3]], None), 0)
    assert together.keys() == {"input_ids", "labels", "position_ids"}
    losses = []
    for batch in (apart, together):
        triplet, counted = token_triplets(model, **batch)
        losses.append(cross_entropy(triplet)[counted])
    assert len(losses[0]) == sum(label != -100 for row in FORGET for label in row["labels"])
    torch.testing.assert_close(*losses)


def test_packed_rows_train_as_their_documents(tmp_path):
    """The losses are means over tokens, so the documents may share rows in any way."""
    options = {"train_sampling_strategy": "sequential", "max_steps": 1, "per_device_train_batch_size": 4}
    expected, _ = taught(FORGET, RETAIN[:4], tmp_path, **options)
    rows = [packed(*FORGET[:2]), packed(*FORGET[2:])]
    retain = [packed(RETAIN[0], RETAIN[2]), packed(RETAIN[1], RETAIN[3])]
    weights, _ = taught(rows, retain, tmp_path, **options)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)

    adapters = []
    for sets in ((FORGET, RETAIN[:4]), (rows, retain)):  # FILA's samples are documents
        config = arguments(tmp_path, lora_rank=4, max_steps=1)
        model = unlearn(tiny_model("llama", VOCAB), *copy.deepcopy(sets), config=config).model
        adapters.append({name: p for name, p in model.state_dict().items() if ".reference." in name})
    for name, ours in adapters[0].items():
        torch.testing.assert_close(ours, adapters[1][name], rtol=1e-3, atol=1e-5)


def test_packing_that_a_model_ignores_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("llama", VOCAB)).eval()
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(
        ValueError, match=r"several documents .* LlamaForCausalLM .*'sdpa' lets them see each"
    ):
        UnlearnTrainer(model, arguments(tmp_path), FORGET, [packed(*RETAIN)])
    model.model.forward = forward
    for settings, told in (
        ({"method": "npo"}, "compares whole answers"),
        ({"method": "ceu"}, "counts the tokens of whole answers"),
        ({"method": "kl", "method_args": {"divergence_over": "tokens"}}, "takes rows of one document"),
    ):
        with pytest.raises(ValueError, match=told):
            UnlearnTrainer(model, arguments(tmp_path, **settings), [packed(*FORGET)], RETAIN)
