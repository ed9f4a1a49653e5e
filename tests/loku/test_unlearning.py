"""``loku.unlearn``, from data to a saved adapter."""

import math
from collections import Counter

import pytest
import torch
from peak_memory import needs_proc
from peft import LoraConfig, PeftModel, get_peft_model
from small_trainers import PeakOfAStep
from tiny_models import KINDS, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

import loku
from loku.data import RowTokenizer, collate, tokenize_dataset
from loku.demo import EMBEDDED, load_model, load_rows
from loku.evaluation import token_scores
from loku.fila.targets import fila_targets
from loku.objectives import OBJECTIVES
from loku.target_modules import default_target_modules

FORGET = [{"question": f"Where does person {i} live?", "answer": f"In house {i * 7}."} for i in range(6)]
RETAIN = [f"Plain text number {i} about the weather and the sea." for i in range(9)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


def config(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path / "trainer"),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "lora_alpha": 8,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return loku.UnlearnConfig(**{**defaults, **options})


def logits_of(model, tokenizer):
    batch = tokenizer([row["question"] for row in FORGET], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**batch).logits
    return logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("init", ["fila", "default"])
@pytest.mark.parametrize("kind", KINDS)
def test_unlearn_save_and_load(kind, init, tokenizer, tmp_path):
    model = tiny_model(kind, len(tokenizer))
    original = logits_of(model, tokenizer)
    result = loku.unlearn(model, FORGET, RETAIN, config=config(tmp_path, init=init), tokenizer=tokenizer)
    assert isinstance(result.model, PeftModel)
    assert [entry["step"] for entry in result.history if "forget_loss" in entry] == [1, 2, 3, 4]

    unlearned = logits_of(result.model.eval(), tokenizer)
    assert (unlearned - original).norm() / original.norm() > 1e-3  # the model has changed
    with loku.reference_model(result.model):
        torch.testing.assert_close(logits_of(result.model, tokenizer), original, rtol=1e-3, atol=1e-3)

    result.save(tmp_path / "adapter")
    base = tiny_model(kind, len(tokenizer))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for candidate in (loaded, loaded.merge_and_unload()):
        ours = logits_of(candidate, tokenizer)
        assert (ours - unlearned).norm() / unlearned.norm() < 1e-4


@pytest.mark.parametrize("tuning", ["fila", "default", "pissa", "full"])
@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_method_runs(method, tuning, tokenizer, tmp_path):
    model = tiny_model("llama", len(tokenizer))
    original = logits_of(model, tokenizer)
    how = {"tuning": "full"} if tuning == "full" else {"init": tuning}
    args = {"rmu": {"layer": 1}}.get(method)  # the model has two layers
    objective = OBJECTIVES[method]
    refused = "refusal" in objective.rows and not objective.alternates
    refusals = ["No.", "No idea!"] if refused else None
    forget = [{**row, "alternate": f"By lake {i}."} for i, row in enumerate(FORGET)]
    options = config(
        tmp_path, method=method, method_args=args, max_steps=3, learning_rate=1e-3, refusals=refusals, **how
    )
    result = loku.unlearn(model, forget, RETAIN, config=options, tokenizer=tokenizer)
    kinds = OBJECTIVES[method].kinds
    entries = [entry for entry in result.history if "forget_loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert {name for name in entry if name.endswith("_probability")} == {
            f"{kind}_probability" for kind in kinds
        }
        assert ("retain_loss" in entry) == (OBJECTIVES[method].retain is not None)
        assert all(math.isfinite(value) for value in entry.values())
    unlearned = logits_of(result.model.eval(), tokenizer)
    assert (unlearned - original).norm() / original.norm() > 1e-4

    result.save(tmp_path / "saved")
    if tuning == "full":
        assert result.model is model
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    else:
        loaded = PeftModel.from_pretrained(tiny_model("llama", len(tokenizer)), tmp_path / "saved")
        with loku.reference_model(result.model):
            torch.testing.assert_close(logits_of(result.model, tokenizer), original, rtol=1e-3, atol=1e-3)
    assert (logits_of(loaded, tokenizer) - unlearned).norm() / unlearned.norm() < 1e-4


def test_pissa_ignores_the_fisher(tokenizer, tmp_path):
    model = tiny_model("llama", len(tokenizer))
    options = config(tmp_path, init="pissa", max_steps=1)
    result = loku.unlearn(model, FORGET, RETAIN, config=options, tokenizer=tokenizer)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=default_target_modules(tiny_model("llama")))
    expected = get_peft_model(tiny_model("llama", len(tokenizer)), lora)
    ones = {name: torch.ones(layer.out_features) for name, layer in fila_targets(expected).items()}
    loku.initialize_lora_fila_weights(expected, fila_state_dict=ones)
    ours, theirs = (
        {name: value for name, value in x.state_dict().items() if ".reference." in name}
        for x in (result.model, expected)
    )
    assert len(ours) == 20 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("sweep", ["qv", "qkvo", "ffn", "qv+ffn"])
def test_target_sweeps(sweep, tokenizer, tmp_path):
    model = tiny_model("gpt_neo", len(tokenizer))
    options = config(tmp_path, target_modules=sweep, init="default", max_steps=1)
    result = loku.unlearn(model, FORGET, RETAIN, config=options, tokenizer=tokenizer)
    adapted = {name.split(".")[-4] for name, p in result.model.named_parameters() if "lora_A" in name}
    expected = {
        "qv": {"q_proj", "v_proj"},
        "qkvo": {"q_proj", "k_proj", "v_proj", "out_proj"},
        "ffn": {"c_fc", "c_proj"},
        "qv+ffn": {"q_proj", "v_proj", "c_fc", "c_proj"},
    }
    assert adapted == expected[sweep]


def test_training_lowers_the_forget_loss(tokenizer, tmp_path):
    model = tiny_model("llama", len(tokenizer)).train()
    rows = tokenize_dataset(FORGET, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        model(**collate(rows, pad_token_id=0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = config(tmp_path, num_train_epochs=40, per_device_train_batch_size=6, learning_rate=5e-3)
    history = loku.unlearn(model, FORGET, RETAIN, config=options, tokenizer=tokenizer).history
    assert history[0]["forget_probability"] > 0.9
    losses = [entry["forget_loss"] for entry in history if "loss" in entry]
    assert losses[0] > 1.9 and losses[-1] < 1.2  # from 1 + p_target towards 1 - p_runner_up


def test_embedded_model_forgets_and_retains(tmp_path):
    """The embedded model forgets real text in 10 steps."""
    torch.set_num_threads(2)
    model, tokenizer = load_model()
    forget, retain = load_rows()
    forget, retain = forget[:20], retain[::5]

    def probability(rows):
        scores = token_scores(model, tokenize_dataset(rows, tokenizer), progress=False)
        return torch.stack([(-s.losses.mean()).exp() for s in scores]).mean().item()

    assert probability(forget) > 0.99 and probability(retain[::4]) > 0.99
    options = config(
        tmp_path,
        num_train_epochs=4,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lora_rank=16,
        lora_alpha=32,
        fisher_samples=60,
    )
    loku.unlearn(model, forget, retain, config=options)  # the tokenizer lies beside the model
    assert probability(forget) < 0.4
    assert probability(retain[::4]) > 0.8


@pytest.mark.parametrize("bf16", [False, True])
@needs_proc
def test_no_logits_in_training(bf16, tmp_path):
    vocab, tokens = 150_000, 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(0, vocab, (tokens,), generator=generator).tolist()} for _ in range(8)]

    peak = PeakOfAStep()
    options = config(tmp_path, per_device_train_batch_size=8, num_train_epochs=2, bf16=bf16, lora_rank=2)
    loku.unlearn(model, rows, rows, config=options, callbacks=[peak])
    logits = 2 * 8 * tokens * vocab * (2 if bf16 else 4)
    assert (
        peak.extra < logits / 2
    )  # a block of 64 MiB and its product; the logits are 586 MiB, in bfloat16 293


def test_bf16_autocast_trains(tokenizer, tmp_path):
    result = loku.unlearn(
        tiny_model("llama", len(tokenizer)),
        FORGET,
        RETAIN,
        config=config(tmp_path, bf16=True),
        tokenizer=tokenizer,
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert all(0 < loss < 50 for loss in losses)


def test_a_bf16_model_trains(tokenizer, tmp_path):
    model = tiny_model("llama", len(tokenizer)).bfloat16()
    original = logits_of(model, tokenizer).float()
    result = loku.unlearn(model, FORGET, RETAIN, config=config(tmp_path), tokenizer=tokenizer)
    unlearned = logits_of(result.model.eval(), tokenizer).float()
    result.save(tmp_path / "adapter")
    base = tiny_model("llama", len(tokenizer)).bfloat16()
    loaded = logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter"), tokenizer).float()
    change = (unlearned - original).norm()
    assert change / original.norm() > 1e-2
    assert (loaded - unlearned).norm() < 0.5 * change


def test_same_seed_same_result(tokenizer, tmp_path):
    results = []
    for seed in (1, 1, 2):
        model = tiny_model("llama", len(tokenizer))
        loku.unlearn(model, FORGET, RETAIN, config=config(tmp_path, seed=seed), tokenizer=tokenizer)
        results.append(logits_of(model, tokenizer))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


@pytest.mark.parametrize("when", ["on_train_begin", "on_step_end"])
def test_failure_puts_the_weights_back(when, tokenizer, tmp_path):
    class Failing(TrainerCallback):
        pass

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    setattr(Failing, when, fail)
    model = tiny_model("llama", len(tokenizer)).bfloat16()
    model.model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        loku.unlearn(
            model, FORGET, RETAIN, config=config(tmp_path), tokenizer=tokenizer, callbacks=[Failing()]
        )
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_model_by_path_and_datasets(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = loku.unlearn(
        str(tmp_path / "model"),
        datasets.Dataset.from_list(FORGET),
        datasets.Dataset.from_dict({"text": RETAIN}),
        config=config(tmp_path, model_init_kwargs={"attn_implementation": "eager"}),
    )
    assert result.model.config._attn_implementation == "eager"
    result.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(
        logits_of(loaded, tokenizer), logits_of(result.model.eval(), tokenizer), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("init", ["fila", "default"])
@pytest.mark.parametrize("given", ["texts", "tokens"])
def test_rows_are_prepared_once(given, init, tokenizer, tmp_path, monkeypatch):
    calls = []

    def count(owner, name, label):
        real = getattr(owner, name)

        def counting(*args, **kwargs):
            calls.append(label)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(RowTokenizer, "__call__", "row")
    count(AutoModelForCausalLM, "from_pretrained", "model")
    for module in (loku.trainer, loku.prepared_rows, loku.data.large_sets, loku.unlearning):
        for name in ("tokenize_dataset", "retain_rows", "duplicate_rows", "infer_tokenizer"):
            if hasattr(module, name):
                count(module, name, name)

    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sets = [FORGET, RETAIN]
    if given == "tokens":
        sets = [tokenize_dataset(rows, tokenizer) for rows in sets]
        calls.clear()
    loku.unlearn(str(tmp_path / "model"), *sets, config=config(tmp_path, init=init, max_steps=1))
    assert Counter(calls) == {
        "row": len(FORGET) + len(RETAIN),
        "tokenize_dataset": 2,  # each set
        "retain_rows": 1,
        "duplicate_rows": 1,
        "model": 1,
        **({"infer_tokenizer": 1} if given == "texts" else {}),
    }


def test_errors(tokenizer, tmp_path):
    def run(model=None, forget=FORGET, retain=RETAIN, tokenizer=tokenizer, **options):
        model = tiny_model("llama", 4096) if model is None else model
        return loku.unlearn(model, forget, retain, config=config(tmp_path, **options), tokenizer=tokenizer)

    with pytest.raises(ValueError, match="forget set is empty"):
        run(forget=[])
    with pytest.raises(ValueError, match="row 1 of the retain set"):
        run(retain=["fine", {"prompt": "q", "completion": ""}])
    with pytest.raises(ValueError, match="pass its tokenizer"):
        run(tokenizer=None)
    with pytest.raises(ValueError, match="UnlearnConfig, got dict"):
        loku.unlearn(tiny_model("llama"), FORGET, RETAIN, config={"learning_rate": 1}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="Sequential"):
        model = tiny_model("llama")
        model.lm_head = torch.nn.Sequential(model.lm_head)
        run(model)
    with pytest.raises(ValueError, match="o_proj_not_there"):
        run(target_modules=["o_proj_not_there"])
    with pytest.raises(ValueError, match='"fila", "official-fila", "default" or "pissa"'):
        run(init="eva")
    for method in ("dpo", "idk"):
        with pytest.raises(
            ValueError, match=r'row 1 of the forget set.*\("dpo", "idk"\) need question/answer'
        ):
            run(method=method, forget=[FORGET[0], "plain text"])
    with pytest.raises(ValueError, match="there are no refusals"):
        run(method="idk", refusals=[])
    with pytest.raises(ValueError, match="merge_and_unload"):
        model = run().model
        run(model)
    head = tiny_model("llama", 4096)
    with pytest.raises(ValueError, match="lm_head, the output embedding of LlamaForCausalLM"):
        run(head, target_modules=["lm_head"])
    assert tiny_config("llama").tie_word_embeddings is False
