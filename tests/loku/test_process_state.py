"""A run leaves the random states, flags and settings of the process as they were."""

import contextlib
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch
from small_trainers import FORGET, RETAIN, arguments, lora, trainer_of
from tiny_models import tiny_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback, logging

import loku
from loku.data import collate
from loku.process_state import process_state_kept, random_states_kept

pytestmark = pytest.mark.usefixtures("one_thread")


def draws():
    """The next numbers of all global generators, which stay as they are."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = random.random(), np.random.random(), torch.rand(1).item()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return numbers


def settings():
    return {
        "random numbers": draws(),
        "environment": dict(os.environ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "products": (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "filters": list(warnings.filters),
        "verbosity": logging.get_verbosity(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise MemoryError


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"full_determinism": True, "log_level": "error", "bf16": True}, {"tuning": "full", "method": "kl"}],
    ids=["default", "determinism", "full"],
)
def test_unlearn_leaves_the_process_as_it_was(options, fails, tmp_path):
    seed_all(11)
    model, config = tiny_model("llama"), arguments(tmp_path, lora_rank=2, **options)
    before = settings()
    try:
        loku.unlearn(model, FORGET, RETAIN, config=config, callbacks=[Fails()] if fails else [])
    except MemoryError:
        assert fails
    assert settings() == before


def test_the_seed_of_the_run_alone_decides_its_result(tmp_path):
    results = []
    for position, seed in enumerate((1, 2)):
        model = tiny_model("gpt_neo")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        model.train()
        seed_all(seed)
        config = arguments(tmp_path / str(position), lora_rank=2, seed=5)
        results.append(loku.unlearn(model, FORGET, RETAIN, config=config).model.state_dict())
    assert all(value.equal(results[1][name]) for name, value in results[0].items())


def test_fila_and_evaluation_draw_no_random_numbers_of_the_caller(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(tiny_model("llama"), lora())
    trainer = trainer_of(model, "ihl", tmp_path)
    batches = DataLoader(FORGET, batch_size=2, collate_fn=lambda rows: collate(rows, pad_token_id=0))
    seed_all(11)
    before = draws()
    scales = loku.get_fila_state_dict(model, batches, batches, progress=False)
    assert draws() == before
    loku.initialize_lora_fila_weights(model, fila_state_dict=scales)
    assert draws() == before
    trainer.evaluate()
    assert draws() == before


def test_the_tokenizer_is_as_it_was(tmp_path):
    _, tokenizer = loku.demo.load_model()
    tokenizer.padding_side = tokenizer.truncation_side = "left"

    def state():
        backend = tokenizer.backend_tokenizer
        names = ("padding_side", "truncation_side", "model_max_length", "special_tokens_map")
        return [*(getattr(tokenizer, name) for name in names), backend.truncation, backend.padding]

    before, config = state(), arguments(tmp_path, lora_rank=2, max_length=12)
    rows = [
        {"prompt": "one two three", "completion": " four five six seven eight nine ten"},
        {"text": "seven"},
    ]
    model = tiny_model("llama", vocab=len(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loku.unlearn(model, rows[:1], rows[1:], config=config, tokenizer=tokenizer)
    assert state() == before


def test_the_context_restores_what_an_interrupted_context_of_torch_leaves():
    before = settings()
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    with pytest.raises(KeyboardInterrupt), process_state_kept():
        torch.autocast("cpu", torch.bfloat16).__enter__()
        torch.no_grad().__enter__()
        warnings.simplefilter("error")
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        raise KeyboardInterrupt
    assert settings() == before
    assert torch.autocast_increment_nesting() == nesting
    torch.autocast_decrement_nesting()


@pytest.mark.parametrize("given", [False, True])
def test_hooks_of_saved_tensors_that_an_interrupt_has_left_go(given):
    """Those of gradient checkpointing would stay for every later forward. The caller's own stay."""
    packed = []

    def forward():
        packed.clear()
        (torch.ones(2, requires_grad=True) * torch.ones(2)).exp().sum()
        return len(packed)

    def pack(tensor):
        packed.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(pack, lambda tensor: tensor) if given else contextlib.nullcontext():
        before = forward()
        with pytest.raises(KeyboardInterrupt), process_state_kept():
            for _ in range(2):
                hooks(lambda tensor: 1 / 0, lambda tensor: tensor).__enter__()
            raise KeyboardInterrupt
        assert forward() == before and (before > 0) == given
    assert forward() == 0


def test_random_states_are_kept_by_a_decorator():
    @random_states_kept()
    def draw():
        return draws(), random.random(), np.random.random(), torch.rand(1)

    seed_all(3)
    before = draws()
    draw()
    assert draws() == before
