"""The change of the answers is that between two adapters that peft loads."""

import math

import pytest
import torch
from fila_models import initialized, train
from fila_models import make_base as fila_base
from peft import PeftModel
from saved_models import EXPERTS, make_base, make_peft, perturb

import loku
from loku.adapter_folders import read_adapter
from loku.evaluation.answer_changes import answer_changes
from loku.evaluation.report import plot_rank_errors
from loku.saving.adapter import plain_adapter
from loku.saving.compression import compressed_adapter

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

SETS = {
    "forget": [
        {"input_ids": [3, 9, 4, 11, 5], "labels": [-100, -100, 4, 11, 5]},
        {"input_ids": [7, 2, 9], "labels": [-100, -100, 9]},
        {"input_ids": [7, 2, 9, 8, 30, 31], "labels": [-100, 2, 9, 8, 30, 31]},
    ],
    "retain": [{"input_ids": [20, 21, 22, 23]}],
}


@torch.no_grad()
def row_facts(model, row):
    """The logits before the labelled tokens, and the answer probability, one row at a time."""
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    at = [i for i in range(1, len(ids)) if labels[i] != -100]
    logits = model(input_ids=torch.tensor([ids])).logits[0, [i - 1 for i in at]]
    losses = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([ids[i] for i in at]))
    return logits, math.exp(-losses)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "up_proj", "embed_tokens"], "lora_alpha": 7}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "use_rslora": True}),
        ("gpt_neox", {"target_modules": ["dense"], "lora_bias": True}),
    ],
    ids=["embedding", "experts", "bias"],
)
@pytest.mark.filterwarnings("ignore:.*(embedding|invalid shape)")
def test_it_is_that_of_the_saved_adapters(kind, options, tmp_path):
    model = perturb(make_peft(kind, **options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loku.save_portable_adapter(model, tmp_path, rank=2)
    small = PeftModel.from_pretrained(make_base(kind), tmp_path)
    config, state, _ = compressed_adapter(*plain_adapter(model, "default"), 2)
    found = answer_changes(model, config, state, None, SETS, batch_size=2, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, rows in SETS.items():
        exact, theirs = ([row_facts(each, row) for row in rows] for each in (model, small))
        logit = max((a - b).abs().max().item() for (a, _), (b, _) in zip(exact, theirs, strict=True))
        changes = [abs(a - b) for (_, a), (_, b) in zip(exact, theirs, strict=True)]
        assert found[name] == pytest.approx(
            {
                "rows": len(rows),
                "tokens": sum(len(logits) for logits, _ in exact),
                "largest_logit_change": logit,
                "exact_probability": sum(p for _, p in exact) / len(rows),
                "probability": sum(p for _, p in theirs) / len(rows),
                "largest_probability_change": max(changes),
            },
            rel=1e-3,
            abs=1e-6,
        )
        assert found[name]["largest_logit_change"] > 1e-2


def test_on_the_residual_base_of_fila(tmp_path):
    """The same as on the untouched base, without a second model."""
    model = initialized("llama", use_rslora=True, lora_alpha=3)
    train(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loku.save_portable_adapter(model, tmp_path / "exact")
    loku.save_portable_adapter(model, tmp_path / "small", rank=5)
    exact = PeftModel.from_pretrained(fila_base("llama"), tmp_path / "exact")
    config, state = read_adapter(tmp_path / "small")
    ours, theirs = (
        answer_changes(each, config, state, None, SETS, progress=False)["forget"] for each in (model, exact)
    )
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5) and ours["largest_logit_change"] > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_adapters_of_other_modules_are_refused():
    model = make_peft("llama", target_modules=["q_proj"])
    other = make_peft("llama", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="v_proj: it has an adapter in one of the model"):
        answer_changes(model, *plain_adapter(other, "default"), None, SETS)
    larger = make_peft("llama", target_modules=["q_proj"], r=6)
    with pytest.raises(ValueError, match="has rank 6, and that of the model less"):
        answer_changes(model, *plain_adapter(larger, "default"), None, SETS)


def test_an_exact_adapter_changes_nothing_and_nan_is_no_measure():
    model = perturb(make_peft("llama", target_modules=["q_proj"]))
    config, state, _ = compressed_adapter(*plain_adapter(model, "default"), 4)
    found = answer_changes(model, config, state, None, SETS, progress=False)
    assert {figures["largest_logit_change"] for figures in found.values()} == {0}
    model.get_base_model().lm_head.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="forget: a logit is NaN"):
        answer_changes(model, config, state, None, SETS, progress=False)
    with pytest.raises(ValueError, match="batch_size"):
        answer_changes(model, config, state, None, SETS, batch_size=0)


def test_the_picture_of_the_errors_is_drawn(tmp_path):
    change = {"largest_logit_change": 0.5}
    lines = [
        {"rank": rank, "relative_error": 1 / rank, "sets": {"forget": change, "other": change}}
        for rank in (2, 4, 8)
    ]
    plot_rank_errors(tmp_path / "new" / "both.png", lines)
    plot_rank_errors(tmp_path / "alone.png", [{**line, "sets": {}} for line in lines])
    pictures = [(tmp_path / name).read_bytes() for name in ("new/both.png", "alone.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and len(set(pictures)) == 2
    plot_rank_errors(tmp_path / "again.png", [{**line, "sets": {}} for line in lines])
    assert (tmp_path / "again.png").read_bytes() == pictures[1]
