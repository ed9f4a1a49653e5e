"""The loss of each method against plain torch on whole logits, and the registry of methods."""

import copy

import pytest
import torch
from peak_memory import needs_proc
from small_trainers import (
    BETA,
    FORGET,
    METHODS,
    RETAIN,
    RETAIN_WEIGHT,
    VOCAB,
    PeakOfAStep,
    Refusals,
    items,
    trainer_of,
    with_lora,
)
from tiny_models import tiny_model
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from loku import UnlearnConfig, UnlearnTrainer
from loku.data import collate_pairs
from loku.data.pairs import Draw
from loku.head import next_token_labels
from loku.objectives import OBJECTIVES, Batch, Divergence, Objective, Rows, lm_loss, retain_loss
from loku_kernels import softmax_triplet

pytestmark = pytest.mark.usefixtures("one_thread")


def token_log_probabilities(logits, labels):
    return -cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # an ignored token adds 0


def sequence_log_probability(logits, labels):
    return token_log_probabilities(logits, labels).sum(1)


def plain_losses(method, logits, reference, labels):
    """Return the forget loss, and the retain loss or None, by the papers' formulas.

    ``logits``, ``reference`` (B, T, V) and ``labels`` (B, T) are dicts by kind of row.
    """

    def ratio(kind):
        now, before = (sequence_log_probability(x[kind], labels[kind]) for x in (logits, reference))
        return now - before

    def lm(kind):
        return cross_entropy(logits[kind].flatten(0, 1), labels[kind].flatten())

    counted = {kind: label != -100 for kind, label in labels.items()}
    log_p = token_log_probabilities(logits["forget"], labels["forget"]) if "forget" in logits else None
    if method == "ihl":
        p, target = logits["forget"].softmax(-1)[counted["forget"]], labels["forget"][counted["forget"]]
        others = p.scatter(1, target[:, None], -1).amax(1)
        forget = (1 + p.gather(1, target[:, None])[:, 0] - others).mean()
    elif method in ("dpo", "dpo_kl"):
        forget = -(BETA * (ratio("refusal") - ratio("forget"))).sigmoid().log().mean()
    elif method in ("npo", "npo_kl"):
        forget = 2 / BETA * (1 + ratio("forget").exp() ** BETA).log().mean()
    elif method == "simnpo":
        mean = log_p.sum(1) / counted["forget"].sum(1)
        forget = 2 / BETA * (1 + (BETA * mean).exp()).log().mean()
    elif method in ("wga", "satimp", "tnpo"):
        log_p, p = log_p[counted["forget"]], log_p[counted["forget"]].exp().detach()
        if method == "tnpo":
            before = token_log_probabilities(reference["forget"], labels["forget"])[counted["forget"]].exp()
            weight = 2 * p**BETA / (p**BETA + before**BETA)
        else:
            weight = p**BETA if method == "wga" else p**5 * (1 - p)
        forget = (weight * log_p).mean()
    elif method == "ceu":
        later = counted["forget"] & (counted["forget"].cumsum(1) > 1)
        forget = -(1 - log_p[later].exp()).log().mean()
    elif method == "idk":
        forget = lm("refusal")
    else:
        forget = -lm("forget")
    if method in ("ga", "ceu"):
        return forget, None
    if method.endswith("kl"):
        kind = "forget" if method == "ga_kl" else "retain"
        log_p, log_q = (log_softmax(x[kind][counted[kind]], -1) for x in (logits, reference))
        return forget, kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return forget, lm("retain")


def a_batch(seed=0, masked=True, b=4, t=6, v=23):
    """Make logits, reference logits, both float64, and labels, by kind of row."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference, labels = {}, {}, {}
    for kind in ("forget", "refusal", "retain"):
        labels[kind] = torch.randint(0, v, (b, t), generator=generator)
        logits[kind] = 3 * torch.randn(b, t, v, generator=generator, dtype=torch.float64)
        logits[kind][:2].scatter_(2, labels[kind][:2, :, None], 9.0)  # memorised
        reference[kind] = logits[kind] + torch.randn(b, t, v, generator=generator, dtype=torch.float64)
        labels[kind][0, 2:4] = labels[kind][-1, 1:] = -100
        logits[kind].requires_grad_()
    return logits, reference, labels


def batch_of(method, logits, reference, labels):
    rows = {}
    for kind in OBJECTIVES[method].kinds:
        triplet, _ = softmax_triplet(logits[kind], labels[kind])
        log_probabilities = token_log_probabilities(reference[kind], labels[kind])
        log_p, log_q = log_softmax(logits[kind], -1), log_softmax(reference[kind], -1)
        divergence = kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        counted = labels[kind] != -100
        values = {"original_log_probability": log_probabilities, "divergence": divergence}
        rows[kind] = Rows(triplet, counted, values, dict.fromkeys(values, counted))
    arguments = {name: argument.default for name, argument in OBJECTIVES[method].arguments.items()}
    return Batch(**rows, beta=BETA, arguments=arguments)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_papers(method):
    logits, reference, labels = a_batch()
    losses = OBJECTIVES[method].losses(batch_of(method, logits, reference, labels))
    forget, retain = plain_losses(method, logits, reference, labels)
    torch.testing.assert_close(losses["forget_loss"], forget)
    assert ("retain_loss" in losses) == (retain is not None)
    total, exact = losses["forget_loss"], forget
    if retain is not None:
        torch.testing.assert_close(losses["retain_loss"], retain)
        total, exact = total + RETAIN_WEIGHT * losses["retain_loss"], exact + RETAIN_WEIGHT * retain
    ours, theirs = (
        torch.autograd.grad(loss, list(logits.values()), allow_unused=True) for loss in (total, exact)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            torch.testing.assert_close(our, their)


def test_limits():
    """NPO is GA of whole answers for beta -> 0 (Zhang et al., Prop. 1), and both start at known values."""
    logits, reference, labels = a_batch()
    batch = batch_of("npo", logits, reference, labels)
    small = Batch(batch.forget, retain=batch.retain, beta=1e-6)
    grad, ascent = (
        torch.autograd.grad(loss, logits["forget"], retain_graph=True)[0]
        for loss in (OBJECTIVES["npo"].forget(small), batch.forget.log_probability().mean())
    )
    torch.testing.assert_close(grad, ascent, rtol=1e-4, atol=1e-8)
    start = batch_of("dpo", logits, logits, labels)
    assert OBJECTIVES["dpo"].forget(start).item() == pytest.approx(0.693147, abs=1e-6)
    assert OBJECTIVES["npo"].forget(start).item() == pytest.approx(2 / BETA * 0.693147, abs=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_tnpo_of_a_token_of_probability_0_is_finite(epsilon):
    """beta x its loss is 1600 nats, whose exp is Inf. The weight is 2 / (1 + ref^beta / p^beta) of equals."""
    triplet = torch.tensor([[[-200.0, 200.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    counted = torch.ones(1, 1, dtype=torch.bool)
    values = {"original_log_probability": torch.tensor([[-400.0]], dtype=torch.float64)}
    rows = Rows(triplet, counted, values, dict.fromkeys(values, counted))
    loss = OBJECTIVES["tnpo"].forget(Batch(rows, beta=4.0, arguments={"epsilon": epsilon}))
    loss.backward()
    assert loss.item() == pytest.approx(0.0 if epsilon else -400.0)  # p^beta is far below epsilon
    assert triplet.grad.isfinite().all()


# Through the model and the trainer


def logits_by_kind(model, batch, kinds):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return {kind: logits[batch[f"is_{kind}"]] for kind in kinds}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_the_trainers_loss_is_that_of_whole_logits(kind, method, tmp_path):
    original = tiny_model(kind, VOCAB).double()
    model = with_lora(copy.deepcopy(original))
    trainer = trainer_of(model, method, tmp_path)
    dataset, kinds = trainer.train_dataset, OBJECTIVES[method].kinds
    batch = collate_pairs(items(dataset, range(4)), pad_token_id=0)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs["triplet"].shape == (4 * len(kinds), batch["input_ids"].shape[1], 3)

    labels = next_token_labels(batch["labels"])
    labels = {kind: labels[batch[f"is_{kind}"]] for kind in kinds}
    with torch.no_grad():
        reference = logits_by_kind(original, batch, kinds)
    forget, retain = plain_losses(method, logits_by_kind(model, batch, kinds), reference, labels)
    exact = forget if retain is None else forget + RETAIN_WEIGHT * retain
    torch.testing.assert_close(loss, exact)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) >= 8
    # GPT-Neo's attention is float32 in a float64 model, so its gradients have float32 rounding.
    share = 1e-6 if kind == "gpt_neo" else 1e-9
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(exact, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=share * theirs.abs().max().item())


@pytest.mark.parametrize("method", ["kl", "dpo", "npo", "tnpo", "dpo_kl"])
def test_a_full_model_keeps_the_references_of_the_original(method, tmp_path):
    """The whole training is as with a second model for the reference."""
    original = tiny_model("gpt_neo", VOCAB).double()  # one trained weight for both embeddings
    model = copy.deepcopy(original)
    options = {"per_device_train_batch_size": 3, "optim": "sgd", "learning_rate": 0.1}
    trainer = trainer_of(model, method, tmp_path, **options)
    trainer.train()

    twin = copy.deepcopy(original)

    class Plain(UnlearnTrainer):
        def train(self):
            return super(UnlearnTrainer, self).train()

        def compute_loss(self, model, batch, **kwargs):
            kinds = self.objective.kinds
            labels = next_token_labels(batch["labels"])
            labels = {kind: labels[batch[f"is_{kind}"]] for kind in kinds}
            with torch.no_grad():
                reference = logits_by_kind(original, batch, kinds)
            forget, retain = plain_losses(method, logits_by_kind(model, batch, kinds), reference, labels)
            return forget + RETAIN_WEIGHT * retain

    plain = Plain(twin, trainer.args, FORGET, RETAIN, refusals=Refusals())
    plain.train()
    ours, theirs, before = (
        torch.cat([parameter.detach().flatten() for parameter in x.parameters()])
        for x in (model, twin, original)
    )
    assert (ours - before).norm() > 0.1
    assert (ours - theirs).norm() < 1e-6 * (ours - before).norm()
    untrained = trainer_of(model, method, tmp_path)
    with pytest.raises(ValueError, match="without an adapter needs the original"):
        untrained.compute_loss(model, collate_pairs(items(untrained.train_dataset, [0]), pad_token_id=0))


@pytest.mark.parametrize("method", ["kl", "ga_kl", "npo_kl", "dpo_kl", "undial", "tnpo"])
def test_a_row_that_fills_up_a_batch_adds_nothing(method, tmp_path):
    """The last batch of a process may have such rows, and a divergence over all tokens has no labels."""
    args = {"divergence_over": "tokens"} if method.endswith("kl") else None
    model = with_lora(tiny_model("llama", VOCAB).double())
    trainer = trainer_of(model, method, tmp_path, method_args=args)
    rows = items(trainer.train_dataset, range(3))
    filled = [*rows, trainer.train_dataset[Draw(3, None)]]
    alone, together = (trainer.compute_loss(model, collate_pairs(x, pad_token_id=0)) for x in (rows, filled))
    torch.testing.assert_close(alone, together)


def test_a_loss_without_a_token_is_refused(tmp_path):
    """Of an answer of one token CE-U counts none."""
    one = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    with pytest.raises(ValueError, match="'ceu' counts no token of any forget row, so it would forget"):
        trainer_of(tiny_model("llama", VOCAB), "ceu", tmp_path, forget=[one, one])
    with pytest.warns(UserWarning, match="'ceu' counts no token of 1 of the 2 forget rows"):
        trainer_of(tiny_model("llama", VOCAB), "ceu", tmp_path, forget=[one, FORGET[0]])
    args = {"ignore_first_n_answer_tokens": 0}
    trainer_of(tiny_model("llama", VOCAB), "ceu", tmp_path, forget=[one, one], method_args=args)


def one_step(method, tmp_path, rate=1e-3):
    """Return the metrics of a batch before and after one step of gradient descent on it."""
    model = with_lora(tiny_model("llama", VOCAB).double())
    trainer = trainer_of(model, method, tmp_path)
    dataset = trainer.train_dataset
    batch = collate_pairs(items(dataset, range(4)), pad_token_id=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for _ in range(2):
        trainer._step_log.parts.clear()
        loss = trainer.compute_loss(model, batch)
        results.append({name: values[0].item() for name, values in trainer._step_log.parts.items()})
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(rate * grad / norm)
    return results


@pytest.mark.parametrize("method", METHODS)
def test_one_step_lowers_the_losses(method, tmp_path):
    before, after = one_step(method, tmp_path)

    def total(values):
        return values["forget_loss"] + RETAIN_WEIGHT * values.get("retain_loss", 0.0)

    weighted = method in ("wga", "satimp", "tnpo")  # the weight has no gradient, so the value may rise
    assert weighted or total(after) < total(before)
    assert weighted or after["forget_loss"] < before["forget_loss"]
    if method in ("ga", "gd", "kl", "npo", "simnpo", "wga", "tnpo", "ceu"):  # the others change further ones
        assert after["forget_probability"] < before["forget_probability"]
    assert ("forget_probability" in before) == (method != "idk")
    if method in ("dpo", "dpo_kl", "idk"):
        assert after["refusal_probability"] > before["refusal_probability"]
    assert ("retain_loss" in before) == (method not in ("ga", "ceu"))
    assert ("retain_probability" in before) == (method not in ("ga", "ceu", "ga_kl"))


# The registry


def test_a_new_objective_is_a_function_and_a_line(tmp_path, monkeypatch):
    def unlikelihood(batch):
        return (-lm_loss(batch.forget)).exp()

    monkeypatch.setitem(OBJECTIVES, "mine", Objective(unlikelihood))
    trainer = trainer_of(with_lora(tiny_model("llama", VOCAB)), "mine", tmp_path)
    trainer.train()
    history = trainer.state.log_history
    assert 0 < history[0]["forget_loss"] < 1 and history[0]["retain_loss"] > 0


def test_the_command_line_takes_the_config(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--method", "npo", "--refusals", "mine.txt"]
    (args,) = HfArgumentParser(UnlearnConfig).parse_args_into_dataclasses(arguments)
    assert (args.method, args.refusals, args.report_to) == ("npo", "mine.txt", [])
    assert args.target_modules == UnlearnConfig(str(tmp_path)).target_modules == "qv+ffn"


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"method must be one of .*'ihl'.*, got 'ihll'"):
        UnlearnConfig(output_dir=str(tmp_path), method="ihll")
    with pytest.raises(ValueError, match='tuning must be "lora" or "full"'):
        UnlearnConfig(output_dir=str(tmp_path), tuning="half")
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        UnlearnConfig(output_dir=str(tmp_path), beta=0)
    with pytest.raises(ValueError, match=r"target_modules='\*all' is no regular expression"):
        UnlearnConfig(output_dir=str(tmp_path), target_modules="*all")
    with pytest.raises(ValueError, match="'idk' trains on refusals"):
        UnlearnTrainer(tiny_model("llama"), UnlearnConfig(str(tmp_path), method="idk"), FORGET, RETAIN)
    for options, message in [
        ({"rows": ("retain",)}, '"forget" and "refusal"'),
        ({"rows": ()}, '"forget" and "refusal"'),
        ({"retain_on": "refusal"}, '"retain" or one of rows'),
        ({"quantities": {"retain": (Divergence(),)}, "retain": None}, r"run, \('forget',\), got 'retain'"),
        ({"forget_over": "logits"}, '"tokens", "rows" or a quantity of the forget rows'),
        (
            {"quantities": {"forget": (Divergence(),), "retain": (Divergence("tokens"),)}},
            "two different quantities 'divergence'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            Objective(retain_loss, **options)


@pytest.mark.parametrize(
    ("method", "tuning"),
    [
        *(
            ("kl", "lora"),
            ("kl", "full"),
            ("dpo", "lora"),
            ("undial", "lora"),
            ("rmu", "full"),
            ("pdu", "lora"),
        )
    ],
)
@needs_proc
def test_no_logits_in_training(method, tuning, tmp_path):
    vocab, tokens, rows = 100_000, 48, 8
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    ids = torch.randint(0, vocab, (rows, tokens)).tolist()
    data = [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in ids]

    class SameRows:
        refusals = ("",)

        def draw(self, generator):
            return generator.integers(1, size=rows)

        def __getitem__(self, key):
            return data[key[0]]

    peak = PeakOfAStep()
    if tuning == "lora":
        model = with_lora(model)
    args = UnlearnConfig(
        str(tmp_path),
        method=method,
        method_args={"layer": 0} if method == "rmu" else None,
        per_device_train_batch_size=rows,
        num_train_epochs=1,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    UnlearnTrainer(model, args, data, data, refusals=SameRows(), callbacks=[peak]).train()
    logits = len(OBJECTIVES[method].kinds) * rows * tokens * vocab * 4
    weights = 0 if tuning == "lora" else 3 * sum(p.numel() * 4 for p in model.parameters())
    assert peak.extra < logits / 2 + weights  # the gradients and the optimizer's copies are allowed
