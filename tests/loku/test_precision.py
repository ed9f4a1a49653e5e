"""TF32 is chosen where the settings leave it open, the card has it and float32 products exist."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_trainers import BETA, FORGET, RETAIN, VOCAB, arguments, lora, trainer_of
from tiny_models import tiny_model
from torch import nn
from transformers import TrainerCallback

from loku import UnlearnTrainer, trainer
from loku.precision import chooses_tf32, float32_products
from loku.unlearning import _OnceSharded

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32, BFLOAT16 = nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()
MIXED = nn.Sequential(BFLOAT16, FLOAT32)
NORMS_ALONE = nn.Sequential(BFLOAT16, nn.LayerNorm(2))


def settings(**changes):
    return SimpleNamespace(
        **{"tf32": None, "bf16": False, "fp16": False, "device": torch.device("cuda", 0), **changes}
    )


@pytest.fixture
def card(monkeypatch):
    """Let torch report an NVIDIA card of a compute capability."""

    def report(capability, cuda="13.0"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    report((9, 0))
    return report


def precision():
    return torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize(
    ("changes", "model", "expected"),
    [
        ({}, FLOAT32, True),
        ({}, MIXED, True),  # float32 adapters of a bfloat16 model
        ({}, BFLOAT16, False),
        ({}, NORMS_ALONE, False),
        ({"tf32": False}, FLOAT32, False),
        ({"tf32": True}, FLOAT32, False),  # transformers has set it
        ({"bf16": True}, FLOAT32, False),
        ({"fp16": True}, FLOAT32, False),
        ({"device": torch.device("cpu")}, FLOAT32, False),
    ],
)
def test_the_choice(card, changes, model, expected):
    assert chooses_tf32(settings(**changes), model) is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_the_cards(card, capability, expected):
    card(capability)
    assert chooses_tf32(settings(), FLOAT32) is expected
    card(capability, cuda=None)  # ROCm
    assert not chooses_tf32(settings(), FLOAT32)


def test_the_precision_is_put_back():
    before = precision()
    with pytest.raises(KeyError), float32_products("tf32"):
        assert precision() == "tf32"
        with float32_products(None):
            assert precision() == "tf32"
        with float32_products("ieee"):
            assert precision() == "ieee"
        assert precision() == "tf32"
        raise KeyError
    assert precision() == before


def older_settings():
    """The settings that say the same by older names. torch raises if they contradict the newer one."""
    return torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()


def test_the_older_names_stay_readable():
    """Compilers, libraries and users read them during a run."""
    before = precision(), older_settings()
    with float32_products("tf32"):
        assert older_settings() == (True, "high")
        with float32_products("ieee"):
            assert older_settings() == (False, "highest")
        assert (precision(), older_settings()) == ("tf32", (True, "high"))
    assert (precision(), older_settings()) == before


@pytest.mark.parametrize("choice", ["high", "medium"])
def test_a_choice_of_the_user_stays(choice):
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.set_float32_matmul_precision(choice)
    try:
        with float32_products("tf32"):
            assert torch.get_float32_matmul_precision() == choice
        assert torch.get_float32_matmul_precision() == choice
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before
        torch.backends.cuda.matmul.fp32_precision = "none"


class Seen(TrainerCallback):
    def __init__(self):
        self.precisions = []

    def on_step_end(self, args, state, control, **kwargs):
        self.precisions.append(precision())


@pytest.mark.parametrize("chosen", [True, False])
def test_the_run_and_its_log(tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(trainer, "chooses_tf32", lambda args, model: chosen)
    before, seen = precision(), Seen()
    run = UnlearnTrainer(
        tiny_model("llama", VOCAB), arguments(tmp_path), FORGET, RETAIN, peft_config=lora(), callbacks=[seen]
    )
    run.train()
    assert seen.precisions == ["tf32" if chosen else before] * 2
    assert precision() == before
    assert [entry.get("tf32") for entry in run.state.log_history[:2]] == [1.0 if chosen else None, None]


@pytest.mark.parametrize(("tf32", "expected"), [(None, "ieee"), (True, "tf32")])
def test_fila_under_fsdp_is_in_float32(tf32, expected):
    """It runs within training, in TF32 only if the user has asked for it."""
    seen = []
    with float32_products("tf32"):
        callback = _OnceSharded(lambda: seen.append(precision()))
        callback.on_train_begin(settings(tf32=tf32), None, None)
    assert seen == [expected]


@pytest.mark.parametrize("method", ["npo", "kl"])
def test_references_of_full_tuning_are_in_the_precision_of_training(method, tmp_path):
    """At the first step the model is the original, so NPO's ratios are 1 and the divergence is 0."""
    trainer = trainer_of(tiny_model("llama"), method, tmp_path, bf16=True, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    if method == "npo":
        assert log["forget_loss"] == pytest.approx(2 / BETA * math.log(2), rel=1e-6)
    else:
        assert log["retain_loss"] == pytest.approx(0, abs=1e-9)
