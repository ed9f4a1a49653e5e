"""The step log's values are those of a count by hand, over several processes and logs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loku import step_log
from loku.step_log import StepLog
from loku.utilization import ModelFlops

PROCESSES, PEAK, FLOPS = 2, 1e6, ModelFlops(token=1000, label=70)


@pytest.fixture
def clock(monkeypatch):
    """A clock of seconds that the test sets, beside a card of a known peak."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(step_log, "peak_flops", lambda device, dtype: PEAK)
    monkeypatch.setattr(step_log, "model_flops", lambda model: FLOPS)
    return clock


def take(log):
    """Take the values of processes that all have this log."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=PROCESSES,
        reduce=lambda values, how: [PROCESSES * value for value in values],
        gather=lambda value: value.expand(PROCESSES),
    )
    return log.take(accelerator, nn.Linear(2, 2), torch.bfloat16)


def micro_batch(log, tokens, labels, loss, share):
    log.start()
    log.count(torch.tensor(tokens), torch.tensor(labels))
    log.add({"forget_loss": torch.tensor(loss)}, {"forget_loss": torch.tensor(share)})


def test_each_log_counts_its_own_steps(clock):
    log = StepLog()
    assert take(log) == {}
    micro_batch(log, tokens=30, labels=20, loss=2.0, share=0.25)
    clock.now += 3
    micro_batch(log, tokens=50, labels=10, loss=4.0, share=0.75)
    clock.now += 1
    first = take(log)  # 80 tokens and 30 labels of each process in 4 s
    clock.now += 1
    micro_batch(log, tokens=20, labels=20, loss=8.0, share=1.0)
    clock.now += 1
    second = take(log)  # 20 tokens and 20 labels of each process in 2 s
    for values, loss, tokens, labels, seconds in ((first, 3.5, 80, 30, 4), (second, 8.0, 20, 20, 2)):
        assert values["forget_loss"] == loss
        assert values["tokens_per_second"] == PROCESSES * tokens / seconds
        flops = PROCESSES * (1000 * tokens + 70 * labels)
        assert values["model_flop_utilization"] == pytest.approx(flops / (seconds * PROCESSES * PEAK))
        assert 0.01 < values["peak_memory_gib"] < 100
    assert take(log) == {}
