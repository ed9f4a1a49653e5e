"""The model FLOPs of a step are those that torch counts, and the peaks those of the data sheets."""

from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from small_trainers import FORGET, RETAIN, VOCAB, arguments, lora
from tiny_models import KINDS, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from loku import UnlearnTrainer, step_log, utilization
from loku.utilization import PEAK_FLOPS, device_count, model_flops, peak_flops

pytestmark = pytest.mark.usefixtures("one_thread")

B, T = 2, 11


def counted_flops(model):
    """Count the operations of the linears in a forward and backward of B x T tokens, all before a label."""
    ids = torch.randint(3, VOCAB, (B, T))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for name, n in counts.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm))


def with_input_gradients(model):
    model.enable_input_require_grads()  # the first linears then have a gradient of their input, as all others
    return model.train()


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_torch_counts_the_same(kind, tuning):
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)
        model, targets = GPT2LMHeadModel(config), ["c_attn"]
    else:
        model, targets = tiny_model(kind, VOCAB), ["q_proj", "v_proj"]
    if tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        model.add_adapter("reference", LoraConfig(r=8, target_modules=targets))  # is not active
    flops = model_flops(model)
    assert counted_flops(with_input_gradients(model)) == B * T * (flops.token + flops.label)
    assert flops.label == (4 if tuning == "lora" else 6) * 32 * VOCAB


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ],
    ids=["modules_to_save", "another tuner"],
)
def test_a_wrapped_linear_counts_once(config):
    model = get_peft_model(tiny_model("llama", VOCAB), config)
    assert counted_flops(with_input_gradients(model)) == B * T * sum(model_flops(model))


def test_a_mixture_of_experts_has_no_count():
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
    )
    assert model_flops(MixtralForCausalLM(config)) is None


def test_a_quantised_linear_counts_by_its_sizes():
    class Packed(nn.Module):
        in_features, out_features = 32, 48

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)

    model = tiny_model("llama", VOCAB).requires_grad_(False)
    expected = model_flops(model)
    model.model.layers[0].mlp.gate_proj = Packed()
    assert model_flops(model) == expected


def test_peaks(monkeypatch):
    device = torch.device("cuda", 0)
    for name, expected in {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA H20": None,
        "Tesla V100": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None, name=name: name)
        assert peak_flops(device, torch.bfloat16) == peak_flops(device, torch.float16) == expected
        assert peak_flops(device, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert all(1e14 < peak < 1e16 for peak in PEAK_FLOPS.values())


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(["cuda:0"], 1), (["cuda:0", "cuda:1", "cuda:1"], 2), (["cuda:1", "cpu", "meta"], 1), (["meta"], 1)],
)
def test_devices_that_share_a_model(devices, expected):
    placed = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device(d)) for d in devices])
    for device in ("cuda", "cuda:0"):  # accelerate's device of a single process has no index
        assert device_count(placed, torch.device(device)) == expected


@pytest.mark.parametrize(("options", "dtype"), [({}, torch.float32), ({"bf16": True}, torch.bfloat16)])
def test_the_log(tmp_path, monkeypatch, options, dtype):
    """The log has the share of a known peak, by the tokens of its steps without padding."""
    seen, peak, devices = [], 1e9, 3

    def known_peak(device, dtype):
        seen.append(dtype)
        return peak

    def run():
        trainer = UnlearnTrainer(
            tiny_model("llama", VOCAB), arguments(tmp_path, **options), FORGET, RETAIN, peft_config=lora()
        )
        trainer.train()
        return trainer, [entry for entry in trainer.state.log_history if "forget_loss" in entry]

    assert not any("model_flop_utilization" in entry for entry in run()[1])
    monkeypatch.setattr(step_log, "peak_flops", known_peak)
    monkeypatch.setattr(step_log, "device_count", lambda model, device: devices)
    trainer, log = run()
    assert seen == [dtype] * 2
    flops = utilization.model_flops(trainer.model)
    batches = [*trainer.get_train_dataloader()]
    for entry in log:
        per_token = entry["model_flop_utilization"] * peak * devices / entry["tokens_per_second"]
        shares = [(b["labels"][:, 1:] != -100).sum() / b["token_count"].sum() for b in batches]
        expected = [flops.token + share.item() * flops.label for share in shares]
        assert any(per_token == pytest.approx(value, rel=1e-6) for value in expected)
