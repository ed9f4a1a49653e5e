"""Small tokenised data sets, and trainers of tiny models on them."""

import torch
from peak_memory import PeakMemory
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from loku import UnlearnConfig, UnlearnTrainer
from loku.data.pairs import Draw
from loku.objectives import OBJECTIVES
from loku.target_modules import default_target_modules

METHODS = [
    "ihl",
    "ga",
    "gd",
    "kl",
    "ga_kl",
    "dpo",
    "dpo_kl",
    "npo",
    "npo_kl",
    "simnpo",
    "wga",
    "satimp",
    "tnpo",
]
METHODS += ["ceu", "idk"]
VOCAB = 97
BETA = 0.3
RETAIN_WEIGHT = 0.7


def row(seed, prompt, length):
    """Make a tokenised row of random ids, whose first ``prompt`` tokens carry no label."""
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


FORGET = [row(i, 3, 8 + i) for i in range(4)]
RETAIN = [row(10 + i, 2, 7 + 2 * i) for i in range(5)]


class Refusals:
    """A stand-in for ``loku.data.RefusalRows``: the prompt of a forget row, then a refusal."""

    refusals = ("a", "b", "c")

    def draw(self, generator):
        return generator.integers(len(self.refusals), size=len(FORGET))

    def __getitem__(self, key):
        index, refusal = key
        prompt, answer = FORGET[index]["input_ids"][:3], row(20 + refusal, 0, 4 + refusal)["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * 3 + answer}


def items(dataset, rows):
    """Return the items of a ``PairedDataset`` for these rows, in their order."""
    return [dataset[Draw(position, row)] for position, row in enumerate(rows)]


def with_lora(model):
    """Add an adapter that changes the outputs; the model without it stays the original."""
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=default_target_modules(model), task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def greedy_rows(model, count=4, prompt=3, length=10):
    """Make tokenised rows whose labels are the model's likeliest words after a random prompt."""
    rows = []
    for seed in range(count):
        ids = row(seed, 0, prompt)["input_ids"]
        while len(ids) < length:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids], dtype=torch.int64)).logits
            ids.append(logits[0, -1].argmax().item())
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def trainer_of(model, method, tmp_path, forget=FORGET, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        **({} if OBJECTIVES[method].retain is None else {"retain_weight": RETAIN_WEIGHT}),
        "beta": BETA if OBJECTIVES[method].beta else None,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = UnlearnConfig(**{**defaults, **options}, method=method)
    return UnlearnTrainer(model, args, forget, RETAIN, refusals=Refusals())


def arguments(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return UnlearnConfig(**{**defaults, **options})


def lora(**options):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


class PeakOfAStep(TrainerCallback):
    """``extra`` is the peak memory of the last step, in bytes, above the memory before the step."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.memory = PeakMemory()

    def on_step_end(self, args, state, control, **kwargs):
        self.extra = self.memory.extra()
