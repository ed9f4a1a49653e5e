"""``UnlearnTrainer`` keeps transformers' and TRL's conventions, and a step's loss is that of one batch."""

import math
import time

import datasets
import pytest
import torch
from peft import PeftModel
from small_trainers import (
    FORGET,
    METHODS,
    RETAIN,
    RETAIN_WEIGHT,
    VOCAB,
    arguments,
    items,
    lora,
    trainer_of,
    with_lora,
)
from tiny_models import tiny_model
from transformers import AutoTokenizer, HfArgumentParser, TrainerCallback

from loku import UnlearnConfig, UnlearnTrainer
from loku.data import PairSampler, collate_pairs
from loku.demo import EMBEDDED
from loku.objectives import OBJECTIVES

pytestmark = pytest.mark.usefixtures("one_thread")


# Exact normalisation


def trained(method, tmp_path, size, steps, tuning="lora"):
    """Return weights and log after two epochs of 4 rows, in float64."""
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
    log = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    for entry in log:
        assert entry.pop("tokens_per_second") > 0 and entry.pop("peak_memory_gib") > 0.01
    return weights, log


@pytest.mark.parametrize("method", ["ihl", "kl", "dpo", "ceu"])  # means over tokens, positions and rows
def test_micro_batches_are_one_batch(method, tmp_path):
    """The rows differ in their numbers of tokens, and micro-batches of 3 + 1 rows in their sizes."""
    lengths = [len(row["labels"]) - row["labels"].count(-100) for row in FORGET]
    assert len(set(lengths)) == len(lengths)
    weights, log = trained(method, tmp_path, 4, 1)
    for size, steps in ((1, 4), (3, 2)):
        parts, parts_log = trained(method, tmp_path, size, steps)
        torch.testing.assert_close(parts, weights, rtol=1e-9, atol=1e-12)
        assert len(parts_log) == len(log) == 2
        for entry, expected in zip(parts_log, log, strict=True):
            assert entry == pytest.approx(expected, rel=1e-6)  # "loss" is summed in float32


@pytest.mark.parametrize("method", ["ihl", "dpo", "ceu"])
@pytest.mark.parametrize("mean", ["separate", "joint"])
def test_a_step_of_micro_batches(method, mean, tmp_path):
    """With "micro_batch" the loss of a step is the mean of its micro-batches' losses."""
    if mean == "joint" and method != "ihl":
        with pytest.raises(ValueError, match="no two means over tokens"):
            arguments(tmp_path, method=method, loss_mean=mean)
        return
    model = with_lora(tiny_model("llama", VOCAB).double())
    options = {"loss_mean": mean, "forget_weight": 0.5}
    whole = trainer_of(model, method, tmp_path, **options)
    trainer = trainer_of(model, method, tmp_path, loss_reduction="micro_batch", **options)
    dataset = trainer.train_dataset
    batches = [
        collate_pairs(items(dataset, rows), pad_token_id=0) for rows in ([0], [1, 2, 3], [None], [2, None])
    ]
    parts = [whole.compute_loss(model, batch) for batch in batches]
    assert parts[2] == 0  # a micro-batch without labels does not count
    counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    step = sum(trainer.compute_loss(model, batch, num_items_in_batch=counts) for batch in batches)
    torch.testing.assert_close(step, sum(parts) / 3, rtol=1e-12, atol=0)
    counts = whole._get_num_items_in_batch(batches, torch.device("cpu"))
    exact = sum(whole.compute_loss(model, batch, num_items_in_batch=counts) for batch in batches)
    assert abs(exact - step) > 1e-6 * abs(step)


def test_one_mean_of_both_losses(tmp_path):
    """With "joint" the loss is one mean over the tokens of both kinds, which have the losses' weights."""
    model = with_lora(tiny_model("llama", VOCAB).double())
    trainer = trainer_of(model, "idk", tmp_path, loss_mean="joint", forget_weight=0.5)
    batch = collate_pairs(items(trainer.train_dataset, range(4)), pad_token_id=0)
    loss = trainer.compute_loss(model, batch)
    shares = trainer._step_log.shares
    values = {name: parts[0] / shares[name][0] for name, parts in trainer._step_log.parts.items()}
    labels = batch["labels"][:, 1:] != -100
    refusal, retain = (labels[batch[f"is_{kind}"]].sum() for kind in ("refusal", "retain"))
    total = 0.5 * refusal * values["forget_loss"] + RETAIN_WEIGHT * retain * values["retain_loss"]
    torch.testing.assert_close(loss, total / (refusal + retain))


def test_retain_rows_are_drawn_as_the_settings_say(tmp_path):
    for sampling, replaces in (("without_replacement", False), ("with_replacement", True)):
        trainer = trainer_of(tiny_model("llama", VOCAB), "gd", tmp_path, retain_sampling=sampling)
        assert trainer.train_dataset.with_replacement == replaces


@pytest.mark.parametrize("again", ["train", "auto_find_batch_size"])
def test_a_run_after_a_failed_one_logs_its_own_steps(tmp_path, monkeypatch, again):
    """Neither the losses of an unfinished step nor the time since then are in the second run's log."""
    automatic = again == "auto_find_batch_size"

    def run(size, fails):
        trainer = trainer_of(
            with_lora(tiny_model("llama", VOCAB)),
            "ihl",
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2,
            max_steps=1,
            auto_find_batch_size=automatic,
        )
        whole_loss, failed = trainer.compute_loss, []

        def compute_loss(*args, **kwargs):
            loss = whole_loss(*args, **kwargs)
            if fails and not failed:
                failed.append(True)
                monkeypatch.setattr(time, "perf_counter", lambda now=time.perf_counter: now() + 1000)
                trainer._loss_check._pending[-1][1].fill_(math.nan)  # of the values that are kept
                raise RuntimeError("CUDA out of memory.")
            return loss

        trainer.compute_loss = compute_loss
        if fails and not automatic:
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.train()
        trainer.train()
        return next(entry for entry in trainer.state.log_history if "forget_loss" in entry)

    found = run(4 if automatic else 2, fails=True)
    expected = run(2, fails=False)
    assert found["tokens_per_second"] > 1
    for name in ("forget_loss", "retain_loss", "forget_probability"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_labels_add_nothing(method, tmp_path):
    """Such rows fill up the last step of an epoch if there are more processes than rows."""
    model = with_lora(tiny_model("llama", VOCAB).double())
    trainer = trainer_of(model, method, tmp_path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for indices in ([0, 2], [0, None, 2, None]):
        batch = collate_pairs(items(trainer.train_dataset, indices), pad_token_id=0)
        trainer._step_log.parts.clear()
        loss = trainer.compute_loss(model, batch)
        metrics = {name: values[0] for name, values in trainer._step_log.parts.items()}
        results.append((loss, metrics, torch.autograd.grad(loss, parameters)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)

    batch = collate_pairs(items(trainer.train_dataset, [None, None]), pad_token_id=0)
    loss = trainer.compute_loss(model, batch)  # a process without a row
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("method", ["kl", "npo_kl"])
def test_a_full_model_has_references_for_rows_without_labels(method, tmp_path, monkeypatch):
    expected, _ = trained(method, tmp_path, 3, 2, tuning="full")
    sampler = trainer_of(tiny_model("llama", VOCAB), method, tmp_path)._get_train_sampler()
    assert sampler.multiple == 1
    fills_up = property(lambda self: 3, lambda self, value: None)
    monkeypatch.setattr(PairSampler, "multiple", fills_up, raising=False)
    weights, _ = trained(method, tmp_path, 3, 2, tuning="full")
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


def test_float16_weights_are_not_trained(tmp_path):
    model = tiny_model("llama", VOCAB).half()
    with pytest.raises(ValueError, match=r"embed_tokens.weight would train in float16"):
        UnlearnTrainer(model, arguments(tmp_path), FORGET, RETAIN)
    UnlearnTrainer(
        model, arguments(tmp_path), FORGET, RETAIN, peft_config=lora()
    )  # adapters train in float32


def test_counts():
    counted = {
        "forget": torch.tensor([[1, 1, 0], [0, 0, 0]]).bool(),
        "refusal": torch.tensor([[1, 0, 0], [0, 0, 0]]).bool(),
        "retain": torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
    }
    over_tokens = {"retain": {"divergence": torch.tensor([[1, 1, 1], [1, 1, 1]]).bool()}}
    expected = {"dpo": (1, 5), "npo": (1, 5), "idk": (1, 5), "ihl": (2, 5), "kl": (2, 6), "tnpo": (2, 5)}
    for method, counts in expected.items():
        assert tuple(n.item() for n in OBJECTIVES[method].counts(counted, over_tokens).values()) == counts
    (later,) = UnlearnConfig(method="ceu").objective().counts(counted).values()
    assert later.item() == 1  # without the first token of each row
    assert OBJECTIVES["ga"].counts(counted).keys() == {"forget_loss"}


# Conventions

QUESTIONS = [{"question": f"Where does person {i} live?", "answer": f"In house {i * 7}."} for i in range(4)]
TEXTS = [f"Plain text number {i} about the weather and the sea." for i in range(6)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tiny_model("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_by_name_raw_rows_and_a_peft_config(saved, tmp_path):
    """The trainer loads model and tokenizer by name, tokenises, logs, and writes a model card."""

    class Seen(TrainerCallback):
        logs = ()

        def on_log(self, args, state, control, logs, **kwargs):
            self.logs = [*self.logs, dict(logs)]

    seen = Seen()
    args = arguments(tmp_path, method="dpo", refusals=["No idea."], model_init_kwargs={"dtype": "bfloat16"})
    trainer = UnlearnTrainer(
        str(saved),
        args,
        QUESTIONS,
        datasets.Dataset.from_dict({"text": TEXTS}),
        peft_config=lora(),
        callbacks=[seen],
    )
    assert isinstance(trainer.model, PeftModel)
    assert trainer.model.get_base_model().dtype == torch.bfloat16
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history][:2] == [1, 2]
    for log in seen.logs[:2]:
        assert {"forget_loss", "retain_loss", "tokens_per_second", "peak_memory_gib"} <= log.keys()
        assert all(math.isfinite(value) for value in log.values())

    trainer.create_model_card(tags=["unlearning"], finetuned_from="someone/base")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model: someone/base" in card and "- unlearning" in card and "learning_rate: 0.01" in card

    with pytest.raises(ValueError, match="merge its adapter first"):
        UnlearnTrainer(trainer.model, arguments(tmp_path), FORGET, RETAIN, peft_config=lora())
    with pytest.raises(ValueError, match="by its path or name"):
        UnlearnTrainer(tiny_model("llama"), args, QUESTIONS, TEXTS)
    on_head = lora()
    on_head.target_modules = {"lm_head"}
    with pytest.raises(ValueError, match="the output embedding of LlamaForCausalLM is a Linear"):
        UnlearnTrainer(tiny_model("llama", VOCAB), arguments(tmp_path), FORGET, RETAIN, peft_config=on_head)


def test_the_command_line_takes_model_arguments(tmp_path):
    line = ["--output_dir", str(tmp_path), "--model_init_kwargs", '{"dtype": "bfloat16"}']
    (args,) = HfArgumentParser(UnlearnConfig).parse_args_into_dataclasses(line)
    assert args.model_init_kwargs == {"dtype": "bfloat16"}
    with pytest.raises(ValueError, match="group_by_length"):
        UnlearnConfig(str(tmp_path), train_sampling_strategy="batch_rebalance")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_lora(reentrant, tmp_path):
    """The adapter trains as without gradient checkpointing."""
    weights = []
    for options in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}):
        args = arguments(tmp_path, gradient_checkpointing=bool(options), **options)
        model = tiny_model("llama", VOCAB)
        trainer = UnlearnTrainer(model, args, FORGET, RETAIN, peft_config=lora())
        trainer.train()
        weights.append([p.detach() for name, p in trainer.model.named_parameters() if "lora_B" in name])
    assert len(weights[1]) == 4 and all(B.abs().max() > 1e-3 for B in weights[1])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled(tmp_path):
    """A compiled step equals an eager one, with the original model's pass and the replaced head."""
    weights = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        args = arguments(tmp_path, method="kl", max_steps=1, **options)
        trainer = UnlearnTrainer(tiny_model("llama", VOCAB), args, FORGET, RETAIN, peft_config=lora())
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    torch.testing.assert_close(*weights)
