"""Ctrl-C at any moment, once or twice, leaves the model and the process as they were."""

import json
import random
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from interrupter import Interrupter
from model_facts import facts, same_facts
from peft import get_peft_model
from small_trainers import FORGET, RETAIN, VOCAB, arguments, lora, with_lora
from transformers import LlamaConfig, LlamaForCausalLM

import loku
from loku.data import collate
from loku.evaluation.generation import generate_greedy
from loku.fila.initialize import initialize_from_row_scales
from loku.interrupts import uninterrupted, uninterrupted_context

pytestmark = pytest.mark.usefixtures("one_thread")

HELPERS = Path(__file__).parents[1] / "helpers"
FILES = ["/loku/", "/peft/", "/transformers/trainer", "/accelerate/", "contextlib.py"]


def interrupt():
    signal.raise_signal(signal.SIGINT)


class Log:
    """A context that notes what it does, and interrupts itself."""

    def __init__(self):
        self.done = []

    @uninterrupted_context
    def context(self, name, at=()):
        try:
            if "begin" in at:
                interrupt()
            self.done.append(f"begin {name}")
            yield name
        except BaseException as error:
            self.done.append(f"{type(error).__name__} in {name}")
            raise
        finally:
            if "end" in at:
                interrupt()
            self.done.append(f"end {name}")


@pytest.fixture
def log():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield Log()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# The contexts


def test_without_signals_a_context_is_one_of_contextlib(log):
    with log.context("a") as value, log.context("b"):
        log.done.append(value)
    assert log.done == ["begin a", "begin b", "a", "end b", "end a"]
    with pytest.raises(ValueError), log.context("c"):
        raise ValueError
    assert log.done[5:] == ["begin c", "ValueError in c", "end c"]


def test_an_interrupt_of_the_beginning_undoes_it(log):
    with pytest.raises(KeyboardInterrupt), log.context("a"), log.context("b", at=["begin"]):
        log.done.append("block")
    assert log.done == [
        "begin a",
        "begin b",
        "KeyboardInterrupt in b",
        "end b",
        "KeyboardInterrupt in a",
        "end a",
    ]


def test_an_interrupt_of_the_end_waits_for_it(log):
    with pytest.raises(KeyboardInterrupt), log.context("a"), log.context("b", at=["end"]):
        log.done.append("block")
    assert log.done[2:] == ["block", "end b", "KeyboardInterrupt in a", "end a"]


def test_a_second_interrupt_during_the_unwinding_stops_nothing(log):
    with pytest.raises(KeyboardInterrupt), log.context("a", at=["end"]), log.context("b", at=["end"]):
        interrupt()
    assert log.done[2:] == ["KeyboardInterrupt in b", "end b", "KeyboardInterrupt in a", "end a"]


def test_an_interrupt_before_the_end_of_a_block_is_one_of_the_block(log):
    """Between the last instruction of a block and the first of its end."""
    place = Interrupter(["interrupts.py"], at=None)
    place.error_of(lambda: block(log, lambda: None))
    [ending] = [
        number for (code, at), number in place.first.items() if code.co_name == "__exit__" and at < 10
    ]
    log.done.clear()
    assert isinstance(
        Interrupter(["interrupts.py"], ending).error_of(lambda: block(log, None)), KeyboardInterrupt
    )
    assert log.done == ["begin a", "KeyboardInterrupt in a", "end a"]


def block(log, _):
    with log.context("a"):
        pass


def test_a_decorator(log):
    @log.context("a")
    def function(number):
        log.done.append(number)
        return number

    assert [function(1), function(2)] == [1, 2]
    assert log.done == ["begin a", 1, "end a", "begin a", 2, "end a"]


def test_an_uninterrupted_call(log):
    def change():
        interrupt()
        log.done.append("changed")

    with pytest.raises(KeyboardInterrupt), log.context("a"):
        uninterrupted(change)
        log.done.append("more")
    assert log.done == ["begin a", "changed", "KeyboardInterrupt in a", "end a"]


def test_the_handlers_of_the_process_are_called(log, monkeypatch):
    calls = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: calls.append(number))
        with log.context("a", at=["begin", "end"]):
            signal.raise_signal(signal.SIGTERM)
        assert calls == [signal.SIGINT, signal.SIGTERM, signal.SIGINT] and len(log.done) == 2
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with log.context("b", at=["begin", "end"]):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_context_of_another_thread(log):
    def work():
        with log.context("a"):
            log.done.append("block")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert log.done == ["begin a", "block", "end a"]


def test_contexts_that_end_in_another_order(log):
    first, second = log.context("a"), log.context("b", at=["end"])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(KeyboardInterrupt):
        second.__exit__(None, None, None)
    assert log.done[2:] == ["end a", "end b"]


# The calls that change a model


def given():
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_(False)
    model.mine = {"an attribute": "of the user"}
    return model


def unlearn(model, path):
    config = arguments(path, lora_rank=2, max_steps=1, gradient_checkpointing=True)
    return loku.unlearn(model, FORGET[:2], RETAIN[:2], config=config).model


def construct(model, path):
    config = arguments(path, gradient_checkpointing=True)
    return loku.UnlearnTrainer(
        model, config, FORGET, RETAIN, peft_config=lora(init_lora_weights="pissa")
    ).model


def initialize(model, path):
    names = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    layers = {name: model.get_base_model().get_submodule(name) for name in names}
    initialize_from_row_scales(model, {n: torch.ones(layer.out_features) for n, layer in layers.items()})
    return model


def measure(model, path):
    batches = [collate(FORGET[:2], pad_token_id=0)]
    loku.get_fila_state_dict(model, batches, batches, progress=False)
    return model


def evaluate(model, path):
    loku.UnlearnTrainer(model, arguments(path, bf16=True), FORGET, RETAIN).evaluate()
    return model


def generate(model, path):
    generate_greedy(model, [row["input_ids"][:3] for row in FORGET], [3] * len(FORGET), progress=False)
    return model


CALLS = {
    "unlearn": (given, unlearn, 150),
    "UnlearnTrainer with peft_config": (given, construct, 30),
    "initialize_from_row_scales": (lambda: get_peft_model(given(), lora()), initialize, 30),
    "evaluate": (given, evaluate, 30),
    "generate_greedy": (given, generate, 30),
    "get_fila_state_dict": (lambda: get_peft_model(given(), lora()), measure, 20),
}


def logits(model):
    with torch.no_grad():
        return model(**collate(FORGET, pad_token_id=0)).logits


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_every_kind_of_place(call, tmp_path):
    """The second ones fall into the unwinding."""
    make, function, trials = CALLS[call]
    function(make(), tmp_path / "first")  # which fills the caches of the libraries
    fresh = logits(function(make(), tmp_path / "fresh"))
    every = Interrupter(FILES)
    assert every.error_of(lambda: function(make(), tmp_path / "every")) is None
    places = random.Random(0).sample(sorted(every.first.values()), trials)
    model = make()
    before, outputs, interrupted = facts(model), logits(model), 0
    for number, place in enumerate(places):
        interrupter = Interrupter(FILES, place, again=0.4 * (number % 3 > 0))
        error = interrupter.error_of(partial(function, model, tmp_path / str(number)))
        if error is None:  # Python drops an exception in a generator that it closes
            model = make()
            before = facts(model)
            continue
        interrupted += 1
        assert isinstance(error, KeyboardInterrupt), interrupter.where
        same = same_facts(before, facts(model))
        if not all(same.values()):  # the work was complete, and the signal was raised after it
            assert "/loku/interrupts.py" in interrupter.where and logits(model).equal(fresh), (
                place,
                interrupter.where,
                [name for name in same if not same[name]],
            )
            model = make()
            before = facts(model)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert torch.is_grad_enabled(), interrupter.where
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, interrupter.where
    assert interrupted > trials / 4  # some places are passed in the first call alone
    assert logits(model).equal(outputs)
    assert logits(function(model, tmp_path / "again")).equal(fresh)


def test_a_trainer_of_a_trained_adapter_that_is_interrupted(tmp_path):
    """Its weights stay trained. The frozen copy, the fused classes and all else go."""
    model = with_lora(given())
    config = arguments(tmp_path, method="npo", max_steps=1, gradient_checkpointing=True, bf16=True)
    trainer = loku.UnlearnTrainer(model, config, FORGET, RETAIN)
    before, every = facts(model), Interrupter(FILES)
    assert every.error_of(trainer.train) is None
    for number, place in enumerate(random.Random(1).sample(sorted(every.first.values()), 40)):
        interrupter = Interrupter(FILES, place, again=0.4 * (number % 2))
        error = interrupter.error_of(trainer.train)
        assert error is None or isinstance(error, KeyboardInterrupt), interrupter.where
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"), interrupter.where
        same = same_facts(before, facts(model))
        assert [name for name in same if not same[name] and name != "weights"] == [], interrupter.where
        assert list(model.peft_config) == ["default"]


def test_two_signals_of_the_system(tmp_path):
    """Real signals at random times, the second up to 3 ms after the first or during the restoring."""
    arguments = [sys.executable, HELPERS / "interrupted_runs.py", tmp_path]
    report = json.loads(subprocess.run(arguments, capture_output=True, check=True, timeout=1200).stdout)
    assert report["broken"] == [] and report["interrupted"] >= 8, report
