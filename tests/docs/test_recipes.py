"""The recipes of docs/integrations.md for other frameworks, against the formulas on whole logits."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import tiny_model
from transformers import Trainer, TrainingArguments

from loku_kernels.backends.reference import inverted_hinge_loss

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"<!-- recipe: ([\w-]+) -->\n```python\n(.*?)^```", PAGE, re.S | re.M))

LEARNING_RATE = 1.0  # so that a step is large beside the rounding of the weights

pytestmark = pytest.mark.usefixtures("one_thread")


def run_recipe(name, names):
    exec(compile(RECIPES[name], f"docs/integrations.md, {name}", "exec"), names)
    return names


def batch(rows, seed=0):
    """Rows of different lengths, padded, with unlabelled prompts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, 9), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :3] = -100
    for row in range(0, rows, 2):
        mask[row, 6:], labels[row, 6:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def row_dataset(inputs):
    return [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]


def stacked(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def eager_loss(model, inputs, kind):
    """The mean over all labelled tokens, from whole logits."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    counted = labels != -100
    if kind == "ihl":
        return inverted_hinge_loss(logits[counted], labels[counted]).mean()
    return torch.nn.functional.cross_entropy(logits[counted], labels[counted])


def arguments(tmp_path, **more):
    return TrainingArguments(
        output_dir=str(tmp_path),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        lr_scheduler_type="constant",
        optim="sgd",
        learning_rate=LEARNING_RATE,
        max_grad_norm=0.0,
        **more,
    )


def change(model, before):
    return torch.cat(
        [(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)]
    )


def expected_change(losses, model):
    gradients = torch.autograd.grad(sum(losses), list(model.parameters()))
    return torch.cat([-LEARNING_RATE * gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer(kind, accumulation, tmp_path):
    trainer_class = run_recipe("trainer", {})["IHLTrainer"]
    inputs = batch(4)
    model = tiny_model(kind)
    expected = expected_change([eager_loss(model, inputs, "ihl")], model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = trainer_class(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=row_dataset(inputs),
        data_collator=stacked,
    )
    trainer.train()
    step = change(model, before)
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert expected.abs().max() > 1e-3  # a step that could be missed


def test_open_unlearning(tmp_path, monkeypatch):
    # The parts of the framework that a trainer touches: the registry, the base class, the constructor.
    registry = {}

    class FinetuneTrainer(Trainer):
        def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
            super().__init__(*args, **kwargs)

    modules = {name: ModuleType(name) for name in ("trainer", "trainer.unlearn", "trainer.unlearn.base")}
    modules["trainer"]._register_trainer = lambda cls: registry.update({cls.__name__: cls})
    modules["trainer.unlearn.base"].UnlearnTrainer = FinetuneTrainer
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    run_recipe("open-unlearning", run_recipe("trainer", {}))

    model, forget, retain = tiny_model("llama"), batch(4), batch(4, seed=1)
    losses = [eager_loss(model, forget, "ihl"), 0.5 * eager_loss(model, retain, "nll")]
    expected = expected_change(losses, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    pairs = [
        {"forget": f, "retain": r} for f, r in zip(row_dataset(forget), row_dataset(retain), strict=True)
    ]
    trainer = registry["IHL"](
        model=model,
        train_dataset=pairs,
        eval_dataset=None,
        data_collator=lambda rows: {name: stacked([row[name] for row in rows]) for name in rows[0]},
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=4),
        evaluators=None,
        template_args=None,
        alpha=0.5,
    )
    trainer.train()
    step = change(model, before)
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
