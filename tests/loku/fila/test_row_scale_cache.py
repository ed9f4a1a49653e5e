"""The cache serves a second run of the same settings, and no other run."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch.utils.data import DataLoader

from loku import FilaConfig, get_fila_state_dict
from loku.data import collate
from loku.fila import row_scales
from loku.fingerprints import tensors_fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 97, (5 + i,), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


@pytest.fixture
def passes(monkeypatch):
    """A list with one entry for each forward and backward pass so far."""
    counted = []

    def counting(*args):
        counted.append(1)
        return negative_log_likelihood(*args)

    negative_log_likelihood = row_scales.negative_log_likelihood
    monkeypatch.setattr(row_scales, "negative_log_likelihood", counting)
    return counted


class Run:
    """A run whose adapter has random weights of its own, as in another process."""

    def __init__(self, cache, passes):
        self.cache, self.passes, self.number = cache, passes, 0

    def __call__(self, change=None, forget=None, retain=None, batch_size=2, shuffle=False, **settings):
        """Return the row scales, and whether this run measured them."""
        self.number += 1
        model = tiny_model("llama")
        if change is not None:
            change(model)
        torch.manual_seed(self.number)
        peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
        loaders = [
            DataLoader(part, batch_size=batch_size, collate_fn=lambda r: collate(r, 0), shuffle=shuffle)
            for part in (forget or rows(5, 0), retain or rows(6, 1))
        ]
        before = len(self.passes)
        config = FilaConfig(fisher_cache_dir=self.cache, **settings)
        scales = get_fila_state_dict(peft_model, *loaders, config=config, progress=False)
        return scales, len(self.passes) > before


@pytest.fixture
def run(tmp_path, passes):
    return Run(str(tmp_path / "cache"), passes)


def test_a_second_run_measures_nothing(run, tmp_path):
    first, measured = run()
    assert measured and len(first) == 4
    for same in ({}, {"batch_size": 3}, {"shuffle": True}, {"fisher_memory_budget": "1MiB"}, {"seed": 1}):
        scales, measured = run(**same)
        assert not measured and scales.keys() == first.keys()
        assert all(torch.equal(scales[name], first[name]) for name in first)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no unfinished file is left


def test_the_balance_changes_no_file_and_the_per_batch_fisher_has_its_own(run, tmp_path):
    first, _ = run()
    quarter, measured = run(balance=0.25)
    assert not measured and all(torch.allclose(quarter[name], 0.25 * first[name]) for name in first)
    paper, measured = run(balance="paper")
    assert not measured and not any(torch.allclose(paper[name], first[name]) for name in first)

    official, measured = run(fisher="per-batch")
    assert measured and not any(torch.equal(official[name], first[name]) for name in first)
    again, measured = run(fisher="per-batch", decomposition="svd_lowrank")
    assert not measured and all(torch.equal(again[name], official[name]) for name in first)
    for grouping in ({"batch_size": 3}, {"shuffle": True}):
        _, measured = run(fisher="per-batch", **grouping)
        assert measured
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_another_model_other_rows_and_other_settings_are_measured_anew(run):
    def one_weight(model):
        weight = model.model.layers[1].input_layernorm.weight.data
        weight[3] = torch.nextafter(weight[3], torch.tensor(2.0))

    def swapped_weights(model):
        up, gate = (
            model.model.layers[0].mlp.up_proj.weight.data,
            model.model.layers[0].mlp.gate_proj.weight.data,
        )
        up.copy_(up.flip(0)), gate.copy_(gate.flip(0))

    other_token, other_label = rows(5, 0), rows(5, 0)
    other_token[2]["input_ids"][0] += 1
    other_label[2]["labels"][2] = -100
    run()
    others = [
        {"change": one_weight},
        {"change": swapped_weights},
        {"change": lambda model: model.bfloat16()},
        {"change": lambda model: setattr(model.config, "rms_norm_eps", 1e-5)},
        {"forget": other_token},
        {"forget": other_label},
        {"retain": rows(7, 1)},
        {"forget": rows(6, 1), "retain": rows(5, 0)},
        {"damping": 0.5},
        {"damping_mode": "absolute"},
        {"fisher_samples": 3},
        {"fisher_samples": 3, "seed": 1},
    ]
    assert all(run(**other)[1] for other in others)
    assert not any(run(**other)[1] for other in others)  # each has a file of its own now


def hook(module, inputs, output):
    return output * 2


def test_a_model_that_computes_otherwise_is_measured_anew(run):
    """Each of these has the weights and the config of the first model."""
    first, _ = run()
    others = [
        lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 0.1),
        lambda m: setattr(m.model.layers[1].mlp, "act_fn", torch.nn.Tanh()),
        lambda m: setattr(m.model.layers[1].self_attn, "scaling", 2.0),
        lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    ]
    for change in others:
        scales, measured = run(change=change)
        assert measured and not all(torch.equal(scales[name], first[name]) for name in first)
        assert not run(change=change)[1]


def double(hidden_states):
    return hidden_states * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.model.layers[0].register_forward_hook(hook), r"model\.layers\.0 has the hook .*hook"),
        (lambda m: setattr(m.model.norm, "forward", double), r"model\.norm has a forward of its own"),
    ],
)
def test_a_hook_is_never_served_from_the_cache(run, tmp_path, change, reason):
    """Its content has no digest: an equal hook may compute otherwise."""
    first, _ = run()
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"fisher_cache_dir is not used: {reason}"):
            scales, measured = run(change=change)
        assert measured and not all(torch.equal(scales[name], first[name]) for name in first)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_gradient_checkpointing_is_no_hook(run):
    run()
    assert not run(change=lambda m: (m.gradient_checkpointing_enable(), m.enable_input_require_grads()))[1]


def damaged(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (damaged, "is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (
            lambda file: file.write_bytes(sorted(file.parent.iterdir())[0].read_bytes()),
            "belongs to something else",
        ),
    ],
)
def test_a_bad_file_is_measured_anew(run, tmp_path, spoil, problem):
    cache = tmp_path / "cache"
    run(damping=0.5)
    (other,) = cache.iterdir()
    expected, _ = run()
    (file,) = set(cache.iterdir()) - {other}
    other.rename(other.with_name("a"))  # sorts first
    spoil(file)
    with pytest.warns(UserWarning, match=rf"row_scales-\w+\.safetensors {problem}.*measured anew"):
        scales, measured = run()
    assert measured and all(torch.equal(scales[name], expected[name]) for name in expected)
    assert not run()[1]  # the bad file was replaced


def nan(values):
    values[0] = float("nan")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (nan, "holds impossible values"),
        (lambda values: values.fill_(float("inf")), "holds impossible values"),
        (lambda values: values.neg_(), "holds impossible values"),
        (lambda values: values.zero_(), "holds impossible values"),
        (lambda values: values.double(), "belongs to something else"),
        (lambda values: values.view(torch.int32), "belongs to something else"),
        (lambda values: values.to(torch.float8_e4m3fn), "belongs to something else"),
        (lambda values: values[:-1].clone(), "belongs to something else"),
        (lambda values: values[:, None].clone(), "belongs to something else"),
        (lambda values: {"further": values.clone()}, "belongs to something else"),
    ],
)
def test_a_hostile_file_is_measured_anew(run, tmp_path, change, problem):
    """Its key and its checksum are right."""
    expected, _ = run()
    (file,) = (tmp_path / "cache").iterdir()
    with safe_open(file, "pt") as opened:
        key = opened.metadata()["key"]
    tensors = load_file(file)
    name = next(iter(tensors))
    changed = change(tensors[name])
    if isinstance(changed, dict):
        tensors |= changed
    elif changed is not None:
        tensors[name] = changed
    save_file(tensors, file, metadata={"key": key, "checksum": tensors_fingerprint(tensors)})
    with pytest.warns(UserWarning, match=rf"{problem}; the row scales are measured anew"):
        scales, measured = run()
    assert measured and all(torch.equal(scales[name], expected[name]) for name in expected)
    assert not run()[1]


def test_no_pickle_is_read(run, tmp_path):
    expected, _ = run()
    (file,) = (tmp_path / "cache").iterdir()
    torch.save(expected, file)
    with pytest.warns(UserWarning, match=r"cannot be read .*measured anew"):
        assert run()[1]


def test_a_cache_that_cannot_be_written_costs_nothing_else(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loku.fila.row_scale_cache.save_file", full)
    with pytest.warns(UserWarning, match="could not be kept .*No space left"):
        assert len(run()[0]) == 4


def test_a_cache_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"fisher_cache_dir cannot be made .*; nothing was measured: .*cache"):
        run()
    assert not run.passes and (tmp_path / "cache").read_text() == "a file"
