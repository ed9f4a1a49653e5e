"""The settings: each field decides a run unless it is listed as free, and each has one place."""

import dataclasses
import json
import re
import typing
from typing import Literal

import pytest
from tiny_models import tiny_model
from transformers import AutoTokenizer, HfArgumentParser

import loku
from loku import FilaConfig, UnlearnConfig
from loku.commands.settings import read_fields, read_yaml
from loku.commands.unlearn import PLACES
from loku.demo import EMBEDDED
from loku.objectives import OBJECTIVES
from loku.run_identity import differences, run_identity

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
FORGET = [{"question": f"Where does person {i} live?", "answer": f"In house {i}."} for i in range(3)]
RETAIN = [f"Text number {i} about the sea." for i in range(4)]

NAN, INF = float("nan"), float("inf")
FIELDS = {field.name: field for field in dataclasses.fields(UnlearnConfig)}
OWN = [name for name in FIELDS if name in UnlearnConfig.__annotations__]
# The fields of measures: an evaluation decides the result if it chooses the best model or the learning rate.
EVALUATION = [
    "batch_eval_metrics",
    "eval_count_end",
    "eval_delay",
    "eval_floors",
    "eval_limits",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "include_for_metrics",
    "per_device_eval_batch_size",
    "prediction_loss_only",
]
DECIDING = [name for name in OWN if name not in UnlearnConfig.FREE_FIELDS and name not in EVALUATION]
# Other valid values of the fields whose type does not tell one.
OTHER = {
    "method": "gd",
    "method_args": {"delta": 0.5},
    "target_modules": "qv",
    "model_init_kwargs": {"dtype": "bfloat16"},
    "tf32": False,
}
OTHER |= {"question_template": "chat", "answer_template": "A: {answer}"}
# The settings with which a field is allowed.
BESIDE = {
    "beta": {"method": "npo"},
    "method_args": {"method": "simnpo"},
    "answer_template": {"question_template": "Q: {question} ", "answer_template": "{answer}"},
}


def make(cls=UnlearnConfig, **settings):
    return cls(**{"output_dir": "out", "use_cpu": True, **settings})


def other_value(cls, name):
    """A valid value of a field that is not its default."""
    default = {field.name: field for field in dataclasses.fields(cls)}[name].default
    if cls is UnlearnConfig and name in OTHER:
        return OTHER[name]
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) is Literal:
        return next(value for value in typing.get_args(hint) if value != default)
    kinds = typing.get_args(hint) or (hint,)
    if name.endswith("balance"):
        return 0.25
    if bool in kinds:
        return not default
    if int in kinds or float in kinds:
        return 7 if default is None else default * 2 or 1
    assert str in kinds, f"add another value of {name} to OTHER"
    return "epoch" if name == "save_strategy" else "other"


def identity(config, refusals=None):
    return run_identity(config, {"base model": "base"}, ROWS, ROWS, refusals)


# The identity of a run


@pytest.mark.parametrize("name", DECIDING)
def test_a_deciding_field_changes_the_identity(name):
    beside = BESIDE.get(name, {})
    config = make(**{**beside, name: other_value(UnlearnConfig, name)})
    assert getattr(config, name) != getattr(make(**beside), name)
    assert identity(config) != identity(make(**beside))


def changed(name, value="another", **settings):
    """Two configs that differ in one field, also where the constructor would refuse such a value."""
    configs = make(**settings), make(**settings)
    assert [config.device.type for config in configs] == ["cpu", "cpu"]  # the constructor has set up devices
    setattr(configs[1], name, value)
    return configs


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_of_this_transformers_is_free_by_name_or_decides(name):
    one, other = changed(name)
    free = name in UnlearnConfig.FREE_FIELDS or name in EVALUATION or not FIELDS[name].init
    assert (not differences(identity(one), identity(other))) == free


@pytest.mark.parametrize("name", EVALUATION)
def test_an_evaluation_that_decides_counts(name):
    one, other = changed(name, metric_for_best_model="eval_retain_loss")
    assert f"{name}='another', where this run has" in differences(identity(one), identity(other))


# A change of each of these was once taken for the same run, or is of their kind.
@pytest.mark.parametrize(
    "change",
    [
        {"adam_beta1": 0.5},
        {"adam_epsilon": 1e-3},
        {"optim_args": "fused=True"},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        {"optim_target_modules": ["q_proj"]},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"use_liger_kernel": True},
        {"full_determinism": True},
        {"ignore_data_skip": True},
        {"neftune_noise_alpha": 5.0},
        {"torch_compile": True},
        {"dataloader_drop_last": True},
        {"accelerator_config": {"split_batches": True}},
        {"fsdp_config": {"min_num_params": 7}},
        {"data_seed": 4},
        {"weight_decay": 0.1},
        {"world_size": 2},
        {"n_gpu": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_decide(change, monkeypatch):
    one, other = make(), make()
    for name, value in change.items():
        if name in FIELDS:
            setattr(other, name, value)
        else:  # a property
            given = property(lambda self, value=value: value if self is other else 1)
            monkeypatch.setattr(UnlearnConfig, name, given)
    told = differences(identity(one), identity(other))
    assert all(f"{name}=" in told for name in change)


def test_listed_names_exist():
    some_versions = {"activation_checkpointing", "activation_checkpointing_kwargs", "logging_dir"}
    some_versions |= {"dataloader_multiprocessing_context", "trackio_bucket_id", "trackio_static_space_id"}
    assert UnlearnConfig.FREE_FIELDS - some_versions <= FIELDS.keys()
    assert UnlearnConfig.FREE_FIELDS.isdisjoint(EVALUATION)


def test_secrets_are_not_kept():
    assert "secret" not in json.dumps(identity(make(hub_token="secret")))


def test_a_field_of_a_subclass_counts():
    @dataclasses.dataclass
    class Warmer(UnlearnConfig):
        temperature: float = 1.0
        note: str = ""
        FREE_FIELDS: typing.ClassVar = UnlearnConfig.FREE_FIELDS | {"note"}

    assert identity(make(Warmer))["temperature"] == 1.0
    assert identity(make(Warmer, temperature=2.0)) != identity(make(Warmer))
    assert identity(make(Warmer, note="second try")) == identity(make(Warmer))


def test_a_method_that_trains_on_refusals_resumes_under_the_same_texts_only(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    directory, file = tmp_path / "run", tmp_path / "refusals.txt"
    texts = ["I do not know.", "No idea."]

    def run(refusals, **settings):
        config = make(
            output_dir=str(directory),
            method="dpo",
            init="default",
            lora_rank=2,
            refusals=refusals,
            max_steps=1,
            save_strategy="steps",
            save_steps=1,
            disable_tqdm=True,
            **settings,
        )
        model = tiny_model("llama", len(tokenizer))
        return loku.unlearn(model, FORGET, RETAIN, config=config, tokenizer=tokenizer)

    run(texts)
    file.write_text("I do not know.\n\nNo idea.\n", encoding="utf-8")
    for same in (texts, str(file)):
        resumed = run(same, resume_from_checkpoint=True)
        assert [entry["step"] for entry in resumed.history if "forget_loss" in entry] == [1]
    file.write_text("I do not know.\nI will not say.\n", encoding="utf-8")
    for other in (texts[::-1], texts[:1], str(file), None):
        with pytest.raises(ValueError, match=r"checkpoint-1 is of another run: another refusals\. Nothing"):
            run(other, resume_from_checkpoint=True)


# Values with which no run can be right


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("per_device_train_batch_size", [0, -1, 2.5, None], "an integer >= 1"),
        ("per_device_eval_batch_size", [0, -8], "an integer >= 1"),
        ("gradient_accumulation_steps", [0, -1, 1.5], "an integer >= 1"),
        ("lora_rank", [0, -4, 2.5, "8", None], "an integer >= 1"),
        ("max_length", [0, -1, 1, 3.5], "an integer >= 2"),
        ("fisher_samples", [0, -3, 0.5, True], "an integer >= 1"),
        ("learning_rate", [0, -1e-3, NAN, INF], "> 0"),
        ("beta", [0, -0.1, NAN, INF], "> 0"),
        ("lora_alpha", [0, -16, NAN, INF, None], "> 0"),
        ("num_train_epochs", [-1, NAN, INF], ">= 0"),
        ("retain_weight", [-1, NAN, INF, None], ">= 0"),
        ("forget_weight", [-1, NAN, INF, None], ">= 0"),
        ("loss_reduction", ["mean", None], '"batch" or "micro_batch"'),
        ("loss_mean", ["both"], '"separate" or "joint"'),
        ("retain_sampling", ["random"], '"without_replacement" or "with_replacement"'),
        ("fisher_damping", [-1, NAN, INF, None], ">= 0"),
        ("weight_decay", [-0.1, NAN, INF], ">= 0"),
        ("adam_epsilon", [-1e-8, NAN], ">= 0"),
        ("max_grad_norm", [-1.0], ">= 0 or inf"),
        ("dataloader_num_workers", [-1], ">= 0"),
        ("adam_beta1", [1.0, -0.1, NAN], ">= 0 and < 1"),
        ("adam_beta2", [1.0, -0.1, NAN], ">= 0 and < 1"),
        ("seed", [-1, 2**32, 0.5], "an integer from 0 to 2^32 - 1"),
    ],
)
def test_impossible_values_are_refused_by_name(name, values, wanted):
    for value in values:
        told = "a finite number" if value in (NAN, INF, None) and wanted in (">= 0", "> 0") else wanted
        with pytest.raises(ValueError, match=rf"^{name} must be {re.escape(told)}, got {value!r}"):
            make(**{name: value})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "ihl", "beta": 0.1}, "method 'ihl' has no beta"),
        (
            {"method": "simnpo", "method_args": {"gamma": 1}},
            "method_args: method 'simnpo' has no argument 'gamma': it has delta",
        ),
        ({"method": "npo", "method_args": {"beta": 1}}, "it has none; beta is a setting of its own"),
        ({"method": "simnpo", "method_args": [1]}, r"method_args must be a dict, or .*, got \[1\]"),
        ({"method": "simnpo", "method_args": "delta=1"}, "or a JSON object such as .*, got 'delta=1'"),
        ({"method": "simnpo", "method_args": "{delta: 1}"}, "^method_args must be a JSON object, with its"),
        ({"eval_limits": "{forget: 1}"}, "^eval_limits must be a JSON object, with its names in double"),
        (
            {"method": "simnpo", "method_args": {"delta": NAN}},
            "delta of method 'simnpo' must be a finite number, got nan",
        ),
        ({"method": "satimp", "method_args": {"beta2": -1}}, "must be a finite number >= 0, got -1"),
        (
            {"method": "satimp", "method_args": {"beta2": "1e-5"}},
            r"got '1e-5', a text; YAML takes .* such as 1\.0e-5",
        ),
        (
            {"method": "ceu", "method_args": {"ignore_first_n_answer_tokens": 1.5}},
            "must be an integer >= 0, got 1.5",
        ),
        (
            {"method": "kl", "method_args": {"divergence_over": "all"}},
            """divergence_over of method 'kl' must be "label" or "tokens", got 'all'""",
        ),
        ({"method": "kl", "loss_mean": "joint"}, "those of method 'kl' are no two means over tokens"),
        ({"method": "ga", "loss_mean": "joint"}, "those of method 'ga' are no two means over tokens"),
        (
            {"method": "ga_kl", "retain_sampling": "with_replacement"},
            "draws retain rows, and method 'ga_kl' runs none",
        ),
    ],
)
def test_settings_that_mean_nothing_for_a_method_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        make(**settings)


def test_the_defaults_of_a_method_are_its_own():
    """beta=None and no method_args are the method's defaults, also in the identity of a run."""
    assert make(method="npo").method_arguments() == (0.1, {})
    assert make(method="simnpo").method_arguments() == (4.5, {"delta": 0.0})
    assert make(method="simnpo", method_args='{"delta": 0.5}').method_arguments() == (4.5, {"delta": 0.5})
    assert identity(make(method="npo")) == identity(make(method="npo", beta=0.1))
    assert identity(make(method="simnpo")) == identity(make(method="simnpo", method_args={"delta": 0.0}))
    assert identity(make(method="simnpo")) != identity(make(method="simnpo", method_args={"delta": 0.1}))
    assert make(method="tnpo").method_arguments()[0] == 4.0


def test_the_list_of_methods_names_each():
    with pytest.raises(ValueError, match="method must be one of") as error:
        make(method="list")
    lines = str(error.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == [*OBJECTIVES]
    assert all(len(line.split()) > 3 for line in lines)
    (simnpo,) = (line for line in lines if line.split()[0] == "simnpo")
    assert simnpo.endswith("(Fan et al., 2024) [beta 4.5, delta 0.0]")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_limits": {"forget_probability": 0.1}}, "eval_limits and eval_floors belong together"),
        ({"eval_floors": {"retain_probability": 0.1}}, "eval_limits and eval_floors belong together"),
        ({"eval_limits": {"forget_probability": 1.1}}, "eval_limits must map measures.*numbers from 0 to 1"),
        ({"eval_limits": {"forget_probability": NAN}}, "eval_limits must map"),
        ({"eval_limits": {"forget_probability": True}}, "eval_limits must map"),
        ({"eval_limits": {"forget_probability": "0.1"}}, "eval_limits must map"),
        ({"eval_limits": ["forget_probability"]}, "eval_limits must map"),
        ({"eval_limits": "low"}, "eval_limits must map"),
        ({"eval_floors": {"retain_probability": 0}}, "eval_floors must map measures.*numbers > 0 and <= 1"),
        (
            {"metric_for_best_model": "eval_forgotten_with_utility", "greater_is_better": False},
            "a greater forgotten_with_utility is better",
        ),
    ],
)
def test_impossible_bounds_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        make(**settings)


def test_bounds_are_named_without_eval_and_may_be_json():
    config = make(eval_limits='{"eval_a_probability": 0}', eval_floors={"eval_b_probability": 1})
    assert config.eval_bounds() == ({"a_probability": 0.0}, {"b_probability": 1.0})
    assert make(eval_limits={}).eval_bounds() == ({}, {})


@pytest.mark.parametrize("value", ["much", "4XB", True])
def test_an_impossible_memory_budget_is_refused(value):
    with pytest.raises(ValueError, match=r"^fisher_memory_budget must be a size like"):
        make(fisher_memory_budget=value)


def test_the_limits_themselves_are_taken():
    make(max_length=2, lora_rank=1, fisher_samples=1, fisher_damping=0, retain_weight=0, num_train_epochs=0)
    make(adam_beta1=0, adam_epsilon=0, weight_decay=0, max_grad_norm=0, seed=0, lora_alpha=0.5)
    make(max_grad_norm=INF)
    with pytest.raises(ValueError, match="max_grad_norm must be >= 0 or inf, got nan"):
        make(max_grad_norm=NAN)
    make(max_length=None, fisher_samples=None, learning_rate=None, max_grad_norm=None, seed=2**32 - 1)


# One place for each field


BY_INIT = {"fisher": "per-batch", "decomposition": "svd_lowrank"}  # those of FilaConfig that init chooses


@pytest.mark.parametrize(
    "name", sorted({field.name for field in dataclasses.fields(FilaConfig)} - {*BY_INIT})
)
def test_fila_config_has_the_settings_of_the_run(name):
    source = next((s for s in (f"fisher_{name}", f"fila_{name}") if s in FIELDS), name)
    assert source in FIELDS, f"UnlearnConfig has no field for FilaConfig.{name}"
    value = other_value(FilaConfig, name)
    if name == "fisher_memory_budget":
        assert value == 7  # bytes
    assert value != getattr(make().fila_config(), name)
    assert getattr(make(**{source: value}).fila_config(), name) == value


def test_official_fila_is_one_switch():
    kept = {"fisher_samples": 7, "seed": 3, "fisher_memory_budget": "1GiB", "fisher_cache_dir": "there"}
    official = make(init="official-fila", **kept).fila_config()
    assert dataclasses.asdict(official) == {
        **{"damping": 1e-5, "damping_mode": "absolute", "balance": "paper"}, **BY_INIT, **kept
    }  # fmt: skip
    for name, value in (
        ("fila_balance", 1.0),
        ("fisher_damping", 1e-5),
        ("fisher_damping_mode", "absolute"),
    ):
        with pytest.raises(ValueError, match=f'init="official-fila" has its own {name}, got {value!r}'):
            make(init="official-fila", **{name: value})
    with pytest.raises(TypeError, match="damping"):
        FilaConfig.official(damping=1.0)


@pytest.mark.parametrize("value", [0, -1, NAN, INF, True, "much", "0", 1e-40, "1e39"])
def test_an_impossible_balance_is_refused(value):
    """float32 rounds row scales of 1e-45 to 0 or to one number, and B of 1e-40 is Inf in a product."""
    with pytest.raises(
        ValueError, match=r'^fila_balance must be "normalised", "paper" or a number from 1e-30 to 1e\+30'
    ):
        make(fila_balance=value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"init": "default", "fila_balance": 0.01}, 'fila_balance=0.01 has no effect with init="default"'),
        ({"init": "default", "fila_balance": "paper"}, "fila_balance='paper' has no effect"),
        ({"init": "pissa", "fila_balance": "paper"}, 'fila_balance="paper" has no effect with init="pissa"'),
        ({"init": "pissa", "fisher_damping": 0.1}, 'fisher_damping=0.1 has no effect with init="pissa"'),
        (
            {"init": "pissa", "fisher_damping_mode": "absolute"},
            "fisher_damping_mode='absolute' has no effect",
        ),
        ({"method": "ga", "retain_weight": 5.0}, "retain_weight=5.0 has no effect with method 'ga'"),
        ({"method": "ceu", "retain_weight": 0.0}, "retain_weight=0.0 has no effect with method 'ceu'"),
        ({"forget_weight": 0, "retain_weight": 0}, "leaves no loss to train by"),
        ({"method": "ga", "forget_weight": 0}, "leaves no loss to train by"),
        ({"max_steps": -3}, "max_steps must be > 0, or -1 for num_train_epochs, got -3"),
        ({"load_best_model_at_end": True}, 'eval_strategy="no" makes none'),
    ],
)
def test_a_setting_without_effect_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        make(**settings)


def test_settings_that_have_an_effect_or_change_no_result_stay():
    assert make(init="pissa", fila_balance=0.01).fila_balance == 0.01
    assert make(init="pissa", fisher_cache_dir="there", fisher_memory_budget="1GiB")
    assert make(init="default", tuning="full", fila_balance=0.01)  # full tuning ignores the LoRA fields
    assert make(method="pdu", forget_weight=0, retain_weight=0)  # the weight of PDU grows
    assert make(load_best_model_at_end=True, eval_on_start=True)

    @dataclasses.dataclass
    class Sampled(UnlearnConfig):
        fisher_samples: int | None = 8

    assert make(Sampled, init="pissa") and make(Sampled, init="pissa", fisher_samples=None)
    assert make(forget_weight=0)  # training on retain rows alone
    assert make(method="ga", retain_weight=1.5)  # the default
    assert make(method="ga_kl", retain_weight=5.0)  # the weight of its divergence


def test_a_balance_may_be_a_text_or_a_number(tmp_path):
    assert make(fila_balance="0.25").fila_balance == 0.25 == make(fila_balance=0.25).fila_config().balance
    assert make(fila_balance=None).fila_balance == "normalised" == make().fila_balance
    fields = read_fields(UnlearnConfig)
    path = tmp_path / "settings.yaml"
    for text, value in (("paper", "paper"), ("0.25", 0.25), ("2", 2.0)):
        path.write_text(f"fila_balance: {text}\n")
        assert make(**read_yaml(path, fields, ())).fila_balance == value
        (args,) = HfArgumentParser(UnlearnConfig).parse_args_into_dataclasses(
            ["--fila_balance", text, "--use_cpu"]
        )
        assert args.fila_balance == value


def documented(cls):
    """The names in the Args section of a class's docstring."""
    section = re.search(r"\n    Args:\n(.*?)(?=\n    \S|\Z)", cls.__doc__, re.S)[1]
    return re.findall(r"^        (\w+): \S", section, re.M)


def test_every_own_field_has_help_and_a_line_of_the_docstring():
    assert documented(UnlearnConfig) == [*dict.fromkeys(documented(UnlearnConfig))]
    assert set(documented(UnlearnConfig)) == set(OWN)
    assert documented(FilaConfig) == [field.name for field in dataclasses.fields(FilaConfig)]
    for name in OWN:
        text = FIELDS[name].metadata["help"]
        assert text.endswith(".") and len(text) > 10, name


# Settings as dicts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "npo", "init": "fila", "retain_weight": 1.5, "learning_rate": 4.0e-3, "seed": 2},
        {"init": "official-fila", "target_modules": "all"},
        {"init": "default", "lora_rank": 4, "num_train_epochs": 5, "target_modules": "qkvo"},
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8, "fisher_damping": 0.1},
        {"fisher_damping_mode": "absolute", "fisher_damping": 1e-5, "fisher_samples": 60},
        {"fisher_memory_budget": "4GiB", "fisher_cache_dir": "cache", "max_length": 256},
        {"tuning": "full", "method": "kl", "per_device_train_batch_size": 4, "bf16": True},
        {"method": "dpo", "beta": 0.5, "refusals": ["No."], "train_sampling_strategy": "group_by_length"},
        {"method": "simnpo", "beta": 2.5, "method_args": {"delta": 0.5}, "forget_weight": 0.125},
        {"method": "idk", "loss_mean": "joint", "loss_reduction": "micro_batch", "retain_weight": 1.0},
        {"model_init_kwargs": {"dtype": "bfloat16"}, "save_strategy": "epoch"},
        {"eval_limits": {"forget_probability": 0.1}, "eval_floors": {"retain_probability": 0.8}},
        {
            "resume_from_checkpoint": True,
            "logging_steps": 5,
            "max_steps": 3,
            "gradient_accumulation_steps": 2,
        },
    ],
)
def test_dicts_of_settings_are_taken(settings):
    config = make(**settings)
    for name, value in settings.items():
        assert getattr(config, name) == value


def test_a_settings_file_makes_a_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\nforget: f.jsonl\nretain: r.jsonl\noutput: out\nmethod: gd\nlora-rank: 2\n"
        "learning_rate: 1e-2\nmax_steps: 3\ntarget_modules: [v_proj]\nsave_strategy: no\n"
        "fisher_memory_budget: 1GiB\nfisher_samples: 60\nresume_from_checkpoint: true\n"
    )
    settings = read_yaml(path, read_fields(UnlearnConfig), PLACES)
    config = make(**{name: value for name, value in settings.items() if name not in PLACES})
    assert (config.method, config.lora_rank, config.learning_rate) == ("gd", 2, 1e-2)
    assert (config.target_modules, config.fisher_samples) == (["v_proj"], 60)
    assert config.fila_config().fisher_memory_budget == "1GiB"
    assert config.resume_from_checkpoint is True and config.save_strategy.value == "no"
