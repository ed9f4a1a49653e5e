"""Digests of models and rows change with each fact that counts, and with no other."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from tiny_models import KINDS, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from loku import fingerprints
from loku.data import collate
from loku.fila.initialize import initialize_from_row_scales, release_base_copy_, restore_base_
from loku.fila.targets import fila_targets
from loku.fingerprints import (
    base_fingerprint,
    batches_fingerprint,
    ordered_rows_fingerprint,
    parameters_fingerprint,
    tensors_fingerprint,
    texts_fingerprint,
)
from loku.model_description import without_description
from loku.target_modules import default_target_modules

pytestmark = pytest.mark.usefixtures("one_thread")


def with_adapter(model, **settings):
    targets = default_target_modules(model)
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, **settings))


# The base model


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_change_a_base(kind, tmp_path):
    model = tiny_model(kind)
    plain = base_fingerprint(model)
    model.train()
    model.gradient_checkpointing_enable()
    model(torch.arange(90)[None])
    model.generate(torch.arange(5)[None], max_new_tokens=2)
    assert base_fingerprint(model) == plain
    model.save_pretrained(tmp_path)
    assert base_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == plain
    assert base_fingerprint(with_adapter(tiny_model(kind))) == plain
    copied = with_adapter(tiny_model(kind), modules_to_save=["lm_head"])
    copied.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(1)
    assert base_fingerprint(copied) == plain


def test_the_base_before_fila_counts_after_it():
    plain = base_fingerprint(tiny_model("gpt_neo"))
    peft_model = with_adapter(tiny_model("gpt_neo"))
    ones = {name: torch.ones(len(layer.weight)) for name, layer in fila_targets(peft_model).items()}
    initialize_from_row_scales(peft_model, ones)
    assert base_fingerprint(peft_model) == plain
    residual = copy.deepcopy(peft_model)
    release_base_copy_(residual)  # the residual base is then all that there is
    assert base_fingerprint(residual)["weights"] != plain["weights"]
    assert base_fingerprint(restore_base_(peft_model)) == plain


def add_one(tensor, index):
    tensor.data.view(-1)[index] += 1


def hook(module, inputs, output):
    return output * 2


@pytest.mark.parametrize(
    ("part", "kind", "change"),
    [
        ("weights", "llama", lambda m: add_one(m.model.embed_tokens.weight, 1501)),
        ("weights", "llama", lambda m: add_one(m.model.layers[0].mlp.up_proj.weight, 1)),
        ("weights", "llama", lambda m: add_one(m.model.layers[1].input_layernorm.weight, -1)),
        ("weights", "gpt_neo", lambda m: m.transformer.h[1].attn.attention.bias.view(-1)[1].fill_(True)),
        ("weights", "llama", lambda m: m.model.rotary_emb.inv_freq.mul_(2)),
        ("weights", "llama", lambda m: m.bfloat16()),
        ("weights", "llama", lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.zeros(97)))),
        ("weights", "gpt_neo", lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.data))),
        ("config", "llama", lambda m: setattr(m.config, "rms_norm_eps", 1e-5)),
        ("config", "llama", lambda m: m.set_attn_implementation("eager")),
        ("modules", "llama", lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 1e-5)),
        ("modules", "gpt_neo", lambda m: setattr(m.transformer.ln_f, "eps", 1e-6)),
        ("modules", "gpt_neo", lambda m: setattr(m.transformer.h[0].attn.attention.resid_dropout, "p", 0.1)),
        ("modules", "llama", lambda m: setattr(m.model.layers[0].self_attn, "attention_dropout", 0.1)),
        ("modules", "llama", lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU())),
        ("modules", "llama", lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.SiLU(inplace=True))),
        ("modules", "llama", lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.5)),
        ("modules", "llama", lambda m: setattr(m.model.layers[0].self_attn, "is_causal", False)),
        ("modules", "llama", lambda m: m.model.layers[0].register_forward_hook(hook)),
        ("modules", "llama", lambda m: setattr(m.model.norm, "forward", hook)),
    ],
)
def test_what_changes_a_base(part, kind, change):
    model = tiny_model(kind)
    plain = base_fingerprint(model)
    change(model)
    changed = base_fingerprint(model)
    assert changed[part] != plain[part]
    change(with_it := tiny_model(kind))
    assert base_fingerprint(with_it) == changed
    assert base_fingerprint(with_adapter(with_it)) == changed


def test_a_hook_of_all_modules_counts():
    plain = base_fingerprint(tiny_model("llama"))
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert base_fingerprint(tiny_model("llama"))["modules"] != plain["modules"]
        assert without_description(tiny_model("llama")) == "all modules have the hook test_fingerprints.hook"
    finally:
        handle.remove()
    assert base_fingerprint(tiny_model("llama")) == plain


def test_every_piece_of_a_large_tensor_counts(monkeypatch):
    monkeypatch.setattr(fingerprints, "_PIECE", 64)
    values = torch.arange(1000, dtype=torch.int16)
    plain = tensors_fingerprint({"a": values})
    for index in (0, 31, 32, 500, 999):
        other = values.clone()
        other[index] ^= 1
        assert tensors_fingerprint({"a": other}) != plain
    assert tensors_fingerprint({"a": values.clone()}) == plain
    monkeypatch.setattr(fingerprints, "THREADS", 1)  # as on another machine
    assert tensors_fingerprint({"a": values}) == plain
    assert tensors_fingerprint({"a": values.repeat(2)[::2].repeat(2)[:1000]}) != plain
    assert tensors_fingerprint({"a": torch.stack([values, values], 1)[:, 0]}) == plain  # not contiguous


class Quantised(nn.Linear):
    """A linear with its scale beside its parameters, as bitsandbytes keeps it."""

    scale = torch.ones(2)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = self.scale


def test_the_scales_of_quantised_weights_count():
    torch.manual_seed(0)
    model = nn.Sequential(Quantised(3, 2))
    plain = parameters_fingerprint(model)
    model[0].scale = torch.tensor([1.0, 2.0])
    assert parameters_fingerprint(model) != plain


def test_weights_that_lie_elsewhere_are_read():
    plain = base_fingerprint(tiny_model("llama"))
    assert base_fingerprint(cpu_offload(tiny_model("llama"), torch.device("cpu"))) == plain
    changed = tiny_model("llama")
    add_one(changed.model.layers[1].mlp.up_proj.weight, 7)
    assert base_fingerprint(cpu_offload(changed, torch.device("cpu")))["weights"] != plain["weights"]
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has no values .*meta"):
        base_fingerprint(tiny_model("llama").to("meta"))


# Rows, texts and tensors


def test_where_packed_documents_begin_counts():
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
    packed = [row, {**row, "position_ids": [0, 1, 0, 1]}, {**row, "position_ids": [0, 1, 2, 0]}]
    assert len({batches_fingerprint([collate([row], 0)]) for row in packed}) == 3
    assert len({ordered_rows_fingerprint([row]) for row in packed}) == 3


ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]


def test_rows_in_their_order():
    plain = ordered_rows_fingerprint(ROWS)
    assert ordered_rows_fingerprint(iter(ROWS)) == plain
    others = [ROWS[::-1], ROWS[:1], [*ROWS, ROWS[0]], [{**ROWS[0], "labels": [-100, -100, 7]}, ROWS[1]]]
    joined = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}]
    assert len({plain, *map(ordered_rows_fingerprint, [*others, joined])}) == 6


def test_batches_in_any_order_grouping_and_padding():
    plain = batches_fingerprint([collate(ROWS, 0)])
    for same in ([collate(ROWS[::-1], 0)], [collate([row], 0) for row in ROWS], [collate(ROWS, 3)]):
        assert batches_fingerprint(same) == plain
    assert batches_fingerprint([collate(ROWS[:1], 0)]) != plain
    assert batches_fingerprint([collate([*ROWS, ROWS[0]], 0)]) != plain


def test_the_number_of_columns_counts():
    """Two columns of three numbers have the bits of three columns of two."""
    two = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[4, 5, 6]])}
    three = {"input_ids": [[1, 2]], "labels": [[3, 4]], "position_ids": [[5, 6]]}
    three = {name: torch.tensor(column) for name, column in three.items()}
    assert batches_fingerprint([two]) != batches_fingerprint([three])


def test_texts():
    others = [["a", "b"], ["b", "a"], ["ab"], ["a"], [], ["a\0end of text\0b"], ["a2 b"], ["\ud800"]]
    assert len(set(map(texts_fingerprint, others))) == len(others)
    assert texts_fingerprint(iter(["a", "b"])) == texts_fingerprint(["a", "b"])


def test_tensors():
    a, b = torch.ones(3), torch.zeros(2)
    assert tensors_fingerprint({"a": a, "b": b}) == tensors_fingerprint({"b": b, "a": a})
    others = [
        {"a": a},
        {"a": -a},
        {"c": a},
        {"a": a, "b": b},
        {"a": b, "b": a},
        {"a": a[None]},
        {"a": a.view(torch.int32)},
        {"a": torch.ones(3, dtype=torch.int32)},
        {"a": a.bfloat16()},
        {"a": torch.tensor(1.0)},
        {"a": torch.ones(1)},
        {"a": torch.ones(0)},
    ]
    assert len(set(map(tensors_fingerprint, others))) == len(others)
