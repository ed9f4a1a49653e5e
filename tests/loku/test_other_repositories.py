"""The loss and its gradient by the code of other repositories, on one batch, by which setting of ours.

The figures were made by running each repository's own ``compute_loss`` on the batch of ``a_batch``:

- open-unlearning: locuslab/open-unlearning, d3d7cf9e, src/trainer/unlearn/*.py
- TOFU: locuslab/tofu, bdc209ea, dataloader.py, CustomTrainerForgetting
- NPO: licong-lin/negative-preference-optimization, 1207bbe9, TOFU/dataloader.py, the same class
- SimNPO: OPTML-Group/Unlearn-Simple, f1a355d3, TOFU/dataloader.py, the same class
- G-effect: tmlr-group/G-effect, ef368eea, dataloader.py, the same class

A model of the batch is a table: the logits after a token are the table's row of the token, and no token comes
twice. So the gradient of the table is the gradient of the logits. A figure has the loss, the norm of that
gradient and its product with ``DIRECTION``.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from transformers import LlamaConfig

from loku import UnlearnConfig
from loku.head import next_token_labels
from loku.loss_shares import LossShares
from loku.objectives import OBJECTIVES, Batch, Rows, with_divergence
from loku.token_values import original_values, token_values

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("forget", "refusal", "retain")
VOCAB, ROWS, TOKENS = 13, 3, 7
COUNT = len(KINDS) * ROWS * TOKENS


def numbers(rate, bend):
    """Numbers (COUNT, VOCAB) between -1 and 1 without a random generator."""
    k = torch.arange(COUNT * VOCAB, dtype=torch.float64)
    return torch.sin(rate * k + bend * k * k).view(COUNT, VOCAB)


DIRECTION = numbers(1.3, 0.0)


def a_batch():
    """The tables of the model and of the original, and the ids and labels (ROWS, TOKENS) of each kind."""
    table = 3 * numbers(0.37, 0.011)
    original = table + 0.8 * numbers(0.91, 0.003)
    ids, labels = {}, {}
    for number, kind in enumerate(KINDS):
        ids[kind] = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) + number * ROWS * TOKENS
        labels[kind] = (5 * ids[kind] + ids[kind] ** 2) % VOCAB
        for row, prompt in enumerate((2, 3 - number % 2, 4)):
            labels[kind][row, :prompt] = -100
    for at in range(2, TOKENS):  # the first forget row is memorised
        table[ids["forget"][0, at - 1], labels["forget"][0, at]] += 7.0
    return table, original, ids, labels


class TableModel(nn.Module):
    """A causal LM whose logits after a token are the row of the token in a table (COUNT, VOCAB)."""

    def __init__(self, table):
        super().__init__()
        self.config = LlamaConfig()
        self.lm_head = nn.Linear(COUNT, VOCAB, bias=False, dtype=torch.float64)
        self.lm_head.weight = nn.Parameter(table.t().contiguous())

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.lm_head(one_hot(input_ids, COUNT).double()))


def our_loss(tmp_path, method, **settings):
    """The loss of a step of one batch, and the gradient (COUNT, VOCAB) of the table."""
    weight = {} if OBJECTIVES[method].retain is None else {"retain_weight": 1.0}
    config = UnlearnConfig(str(tmp_path), method=method, **{**weight, **settings})
    objective, (beta, arguments) = config.objective(), config.method_arguments()
    table, original_table, ids, labels = a_batch()
    model, original = TableModel(table), TableModel(original_table)
    kinds = objective.kinds
    masks = {kind: torch.arange(len(kinds) * ROWS) // ROWS == i for i, kind in enumerate(kinds)}
    tokens = {
        "input_ids": torch.cat([ids[kind] for kind in kinds]),
        "labels": torch.cat([labels[kind] for kind in kinds]),
        "attention_mask": torch.ones(len(kinds) * ROWS, TOKENS, dtype=torch.int64),
    }
    needed = objective.rows_of(masks)
    originals = original_values(original, needed=needed, **tokens)
    found = token_values(
        model, needed=needed, originals=originals, original_head=(original.lm_head.weight, None), **tokens
    )
    rows = {
        kind: Rows(
            found.triplet[mask],
            found.counted[mask],
            {name: value[mask] for name, value in found.values.items()},
            {name: where[mask] for name, where in found.positions.items()},
        )
        for kind, mask in masks.items()
    }
    losses = objective.losses(Batch(**rows, beta=beta, arguments=arguments))
    shares = LossShares(objective, config.loss_reduction, config.loss_mean)
    counts = shares.counts({**tokens, **{f"is_{kind}": mask for kind, mask in masks.items()}})
    factors = shares.shares(counts, counts).losses
    loss = config.forget_weight * losses["forget_loss"] * factors["forget_loss"]
    if "retain_loss" in losses:
        loss = loss + config.retain_weight * losses["retain_loss"] * factors["retain_loss"]
    (grad,) = torch.autograd.grad(loss, model.lm_head.weight)
    return loss.item(), grad.t()


TOKENS_OF_ALL = {"divergence_over": "tokens"}
# (repository, its name of the method, our settings, (loss, norm of the gradient, its product with DIRECTION))
FIGURES = [
    ("open-unlearning", "GradAscent", {"method": "ga"}, (-2.75062258874, 0.23795568393, 0.0442270203403)),
    ("open-unlearning", "GradDiff", {"method": "gd"}, (0.364693431197, 0.369352191029, 0.134771108746)),
    (
        "open-unlearning",
        "GradDiff, retain_loss_type=KL",
        {"method": "kl", "method_args": TOKENS_OF_ALL},
        (-2.6400441312, 0.242061967867, 0.0677659605804),
    ),
    ("open-unlearning", "NPO, beta=0.1", {"method": "npo"}, (25.4955316156, 0.977616941335, 0.20741779397)),
    (
        "open-unlearning",
        "NPO, beta=0.1, gamma=0.5, alpha=2",
        {"method": "npo", "forget_weight": 0.5, "retain_weight": 2.0},
        (17.4207398377, 0.733605290079, 0.239525029594),
    ),
    (
        "open-unlearning",
        "NPO, beta=0.1, retain_loss_type=KL",
        {"method": "npo_kl", "method_args": TOKENS_OF_ALL},
        (22.4907940532, 0.936967362962, 0.140412645804),
    ),
    (
        "open-unlearning",
        "DPO, beta=0.1",
        {"method": "dpo", "forget_weight": 2 / 0.1},
        (25.9802671329, 1.9467045583, -0.984272640943),
    ),
    (
        "open-unlearning",
        "DPO, beta=0.1, retain_loss_type=KL",
        {"method": "dpo_kl", "forget_weight": 2 / 0.1, "method_args": TOKENS_OF_ALL},
        (22.9755295706, 1.9266114275, -1.05127778911),
    ),
    (
        "open-unlearning",
        "SimNPO, beta=4.5, delta=0.25, gamma=0.125",
        {"method": "simnpo", "forget_weight": 0.125, "method_args": {"delta": 0.25}},
        (3.1326519167, 0.282526706945, 0.0881303263381),
    ),
    ("open-unlearning", "WGA, beta=1", {"method": "wga"}, (3.01756362584, 0.284085988964, 0.061507626427)),
    (
        "open-unlearning",
        "SatImp, beta1=5, beta2=1, gamma=0.1",
        {"method": "satimp", "forget_weight": 0.1},
        (3.11504049109, 0.282485681638, 0.0904034788881),
    ),
    ("TOFU", "grad_ascent", {"method": "ga"}, (-2.75062258874, 0.23795568393, 0.0442270203403)),
    ("TOFU", "grad_diff", {"method": "gd"}, (0.364693431197, 0.369352191029, 0.134771108746)),
    (
        "TOFU",
        "KL",
        {"method": "kl", "method_args": TOKENS_OF_ALL},
        (-2.6400441312, 0.242061967867, 0.0677659605804),
    ),
    (
        "TOFU",
        "idk",
        {"method": "idk", "loss_mean": "joint"},
        (3.49190044195, 0.202223895236, -0.0446350577563),
    ),
    (
        "NPO",
        "grad_ascent_forgetKL",
        {"method": "ga_kl", "method_args": TOKENS_OF_ALL},
        (-2.04617252761, 0.267883582369, -0.122919380022),
    ),
    (
        "NPO",
        "dpo, beta=0.1",
        {"method": "dpo", "forget_weight": 2 / 0.1, "retain_weight": 0.0},
        (22.864951113, 1.92609981668, -1.07481672935),
    ),
    (
        "NPO",
        "dpo_grad_diff, beta=0.1",
        {"method": "dpo", "forget_weight": 2 / 0.1},
        (25.9802671329, 1.9467045583, -0.984272640943),
    ),
    (
        "NPO",
        "dpo_KL, beta=0.1",
        {"method": "dpo_kl", "forget_weight": 2 / 0.1, "method_args": TOKENS_OF_ALL},
        (22.9755295706, 1.9266114275, -1.05127778911),
    ),
    (
        "NPO",
        "npo, beta=0.1",
        {"method": "npo", "retain_weight": 0.0},
        (22.3802155956, 0.935914926947, 0.116873705564),
    ),
    (
        "NPO",
        "npo_grad_diff, beta=0.1",
        {"method": "npo"},
        (25.4955316156, 0.977616941335, 0.20741779397),
    ),
    (
        "NPO",
        "npo_KL, beta=0.1",
        {"method": "npo_kl", "method_args": TOKENS_OF_ALL},
        (22.4907940532, 0.936967362962, 0.140412645804),
    ),
    (
        "SimNPO",
        "simnpo, beta=2.5, gamma=0.25",
        {"method": "simnpo", "beta": 2.5, "method_args": {"delta": 0.25}, "retain_weight": 0.0},
        (0.219293730043, 0.0355409914613, -0.0177986171581),
    ),
    (
        "SimNPO",
        "simnpo_grad_diff, beta=2.5, gamma=0.25, npo_coeff=0.125",
        {"method": "simnpo", "beta": 2.5, "method_args": {"delta": 0.25}, "forget_weight": 0.125},
        (3.14272773619, 0.282520566349, 0.0883192612613),
    ),
    (
        "G-effect",
        "wga, beta=5",
        {"method": "wga", "beta": 5.0, "retain_weight": 0.0},
        (-0.0152988431823, 0.00842891674968, -0.0109472843584),
    ),
    (
        "G-effect",
        "tnpo, beta=4",
        {"method": "tnpo", "method_args": {"epsilon": 1e-5}, "retain_weight": 0.0},
        (-0.29485304789, 0.0961564871189, -0.042275398832),
    ),
    (
        "G-effect",
        "npo_kl, beta=1",
        {"method": "npo_kl", "beta": 1.0, "method_args": TOKENS_OF_ALL},
        (13.426608684, 0.638920336582, 0.101340304117),
    ),
]


@pytest.mark.parametrize(
    ("settings", "figure"),
    [case[2:] for case in FIGURES],
    ids=[f"{repository}: {name}" for repository, name, *_ in FIGURES],
)
def test_loss_and_gradient_are_theirs(settings, figure, tmp_path):
    loss, grad = our_loss(tmp_path, **settings)
    assert loss == pytest.approx(figure[0], rel=1e-10)
    assert grad.norm().item() == pytest.approx(figure[1], rel=1e-10)
    assert (grad * DIRECTION).sum().item() == pytest.approx(figure[2], rel=1e-9)


@pytest.mark.parametrize(
    ("method", "settings", "figure"),
    [
        ("wga", {"beta": 5.0}, (0.0952796143589, 0.0451899923692, 0.0125916558817)),
        ("tnpo", {"method_args": {"epsilon": 1e-5}}, (-0.184274590348, 0.105911089069, -0.0187364585919)),
    ],
)
def test_g_effects_methods_with_kl(method, settings, figure, tmp_path, monkeypatch):
    """``wga_kl`` and ``tnpo_kl`` of G-effect, by ``with_divergence``."""
    monkeypatch.setitem(OBJECTIVES, "mine", with_divergence(OBJECTIVES[method]))
    args = {**settings.pop("method_args", {}), **TOKENS_OF_ALL}
    loss, grad = our_loss(tmp_path, "mine", method_args=args, **settings)
    assert loss == pytest.approx(figure[0], rel=1e-10)
    assert grad.norm().item() == pytest.approx(figure[1], rel=1e-10)
    assert (grad * DIRECTION).sum().item() == pytest.approx(figure[2], rel=1e-9)


@pytest.mark.parametrize(
    ("ignored", "figure"),
    [
        (1, (2.75076069818, 0.209911199326, -0.191831094484)),
        (0, (2.95906773378, 0.18273965991, -0.20017920895)),
    ],
)
def test_ceu_is_open_unlearnings(ignored, figure, tmp_path):
    """Their loss is ours and the entropy of the target distribution, which has no gradient."""
    loss, grad = our_loss(tmp_path, "ceu", method_args={"ignore_first_n_answer_tokens": ignored})
    table, _, ids, labels = a_batch()
    targets = next_token_labels(labels["forget"])
    counted = targets != -100
    counted &= counted.cumsum(1) > ignored
    logits = table[ids["forget"]][counted].scatter(1, targets[counted][:, None], -torch.inf)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert loss + entropy == pytest.approx(figure[0], rel=1e-10)
    assert grad.norm().item() == pytest.approx(figure[1], rel=1e-10)
    assert (grad * DIRECTION).sum().item() == pytest.approx(figure[2], rel=1e-9)
