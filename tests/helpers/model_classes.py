"""A tiny random model of each class of causal LM, and what one run of it shows."""

import copy
import inspect
import math
import warnings
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TrainerCallback
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loku import UnlearnConfig, unlearn
from loku.adapters import linear_weight
from loku.objectives import OBJECTIVES

VOCAB = 61

# Configs name one size in many ways. A config takes those that it knows.
SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the width
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "attention_hidden_size": 32,
    "lru_width": 32,
    # the MLP
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "dff": 48,
    "d_inner": 48,
    "d_ff": 48,
    # the depth
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    # the heads
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "head_dim": 8,
    "rotary_dim": 8,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    # the context
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "context_length": 64,
    "sliding_window": 16,
    # multi-head latent attention
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # state spaces
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    # without dropout, which would make every value random
    "dropout": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "embed_dropout": 0.0,
    "resid_dropout": 0.0,
    "residual_dropout": 0.0,
    "dropout_rate": 0.0,
    "layerdrop": 0.0,
    "activation_dropout": 0.0,
    # others
    "dim_model_base": 16,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
MLA = {"head_dim": None, "num_key_value_heads": 4}

# The settings of a class beside SIZES; None takes a name out of SIZES.
SETTINGS = {
    "axk1": {**MLA},
    "axk2": {**MLA},
    "deepseek_v2": {**MLA},
    "deepseek_v3": {**MLA},
    "deepseek_v32": {**MLA},
    "glm4_moe_lite": {**MLA},
    "glm_moe_dsa": {**MLA},
    "longcat_flash": {**MLA},
    "minicpm3": {**MLA},
    "youtu": {**MLA},
    "cohere": {"logit_scale": 0.5},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 2.0},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "hyperclovax": {"logits_scaling": 0.5},
    "nanochat": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "xlstm": {"output_logit_soft_cap": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {
        "final_logit_softcapping": 3.0,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
}


# The model types that are run: decoder-only classes of all kinds, and a few that must be refused.
KINDS = """
    apertus arcee bamba bert biogpt bitnet bloom codegen cohere cohere2 ctrl dbrx deepseek_v2
    deepseek_v3 dory ernie4_5 exaone4 falcon falcon_h1 falcon_mamba gemma gemma2 gemma3_text
    gemma3n_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe
    granitemoeshared helium hrm_text hunyuan_v1_dense hyperclovax jamba jetmoe lfm2 llama llama4_text
    mamba mamba2 minicpm3 mistral mixtral mpt nanochat nemotron olmo2 olmoe openai-gpt opt persimmon phi
    phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss smollm3
    stablelm starcoder2 t5 xglm xlnet xlstm zamba2
""".split()


def tiny_config(kind):
    """Make the config of a model type, with the sizes above."""
    config_class = CONFIG_MAPPING[kind]
    names = set(inspect.signature(config_class.__init__).parameters)
    names |= set(getattr(config_class, "__dataclass_fields__", ()))
    aliases = set(getattr(config_class, "attribute_map", ()))
    sizes = {name: size for name, size in SIZES.items() if name in names and name not in aliases}
    sizes |= copy.deepcopy(SETTINGS.get(kind, {}))
    return config_class(**{name: size for name, size in sizes.items() if size is not None})


def make_model(kind):
    """Make a fresh copy of the class's model, the same each time, in evaluation mode.

    Its matrices are larger than transformers makes them, so that every layer changes the predictions.
    """
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        model = auto.from_config(tiny_config(kind)).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.is_floating_point() and "conv" not in name:
                nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    return model


def row(seed, length, prompt=2):
    """Make a row of random tokens, whose prompt carries no label."""
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


FORGET = [row(seed, 6 + seed % 3) for seed in range(3)]
RETAIN = [row(10 + seed, 9 - seed % 3) for seed in range(3)]
IDS = torch.tensor([row(seed, 8)["input_ids"] for seed in (20, 21)])


@torch.no_grad()
def logits(model):
    """Return the logits of a few rows, float64."""
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits.double()


def off_by(actual, expected):
    """Return the largest difference, relative to the largest expected number."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def in_float64(model):
    """Return a copy of a model in float64, whose experts are computed one by one."""
    model = copy.deepcopy(model).double()
    for module in model.modules():  # the products of grouped experts have no float64
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return model.eval()


def exact_row_scales(model, names):
    """FILA's row scales of some modules, as measured, by float64 autograd on one row after the other."""
    model = in_float64(model)
    weights = {name: linear_weight(model.get_submodule(name)) for name in names}
    model.requires_grad_(False)
    stored = [model.get_submodule(name).weight.requires_grad_() for name in names]

    def fisher(rows):
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            predicted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            loss = cross_entropy(predicted[:-1].double(), labels[1:], ignore_index=-100, reduction="sum")
            gradients = torch.autograd.grad(loss, stored)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                total[name] += (gradient if gradient.shape == weight.shape else gradient.T) ** 2 / len(rows)
        return total

    forget, retain = fisher(FORGET), fisher(RETAIN)
    squares = {name: (forget[name] / (retain[name] + retain[name].mean())).sum(1) for name in names}
    return {name: square.sqrt() for name, square in squares.items()}


def exact_gradients(peft_model, batch, retain_weight):
    """The gradients of an adapter under IHL and the LM loss, by float64 autograd on the paper's formulas."""
    model = in_float64(peft_model)
    labels = batch["labels"][:, 1:]
    predicted = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits[:, :-1]
    counted = labels != -100
    p = predicted.double().softmax(-1)
    target = p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    others = p.scatter(-1, labels.clamp(min=0)[..., None], -math.inf).amax(-1)
    forget = (1 + target - others)[counted & batch["is_forget"][:, None]].mean()
    retain = -target.log()[counted & batch["is_retain"][:, None]].mean()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = forget + retain_weight * retain
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return dict(zip(trained, gradients, strict=True))


class _Watch(TrainerCallback):
    """Note the logits at the start of training, and the first gradients beside the exact ones."""

    def __init__(self):
        self.started = False

    def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs):
        training = [(module, module.training) for module in model.modules()]
        self.logits = logits(model.eval())
        self.batch = next(iter(train_dataloader))
        self.exact = exact_gradients(model, self.batch, args.retain_weight)
        for module, mode in training:
            module.training = mode

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if not self.started:
            self.started = True
            self.gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@dataclass
class Shown:
    """What a run of a class shows.

    Args:
        kind: The model type.
        class_name: The class of the model.
        modules: The names of the linears with an adapter, as the adapter's config has them.
        parameters: The names of the tensors with an adapter of their own (experts).
        init: The initialisation that works: "fila", "default" where FILA is refused, or "" for neither.
        refusal: The message of the refusal, or "".
        errors: The measured differences, by what was measured.
    """

    kind: str
    class_name: str
    modules: list = field(default_factory=list)
    parameters: list = field(default_factory=list)
    init: str = ""
    refusal: str = ""
    errors: dict = field(default_factory=dict)

    def facts(self):
        """What the table of docs/models.md has of the run."""
        return {
            "kind": self.kind,
            "class": self.class_name,
            "modules": self.modules,
            "parameters": self.parameters,
            "init": self.init,
            "refusal": self.refusal,
        }

    def wrong(self):
        """The errors that are more than rounding."""
        wrong = {name: error for name, error in self.errors.items() if name != "change" and not error <= 2e-5}
        if self.init and not self.errors["change"] > 1e-3:  # a run that changes nothing would show nothing
            wrong["change"] = self.errors["change"]
        return wrong


def _gradient_error(gradient, exact):
    if gradient is None or exact is None:
        return float((gradient is None) != (exact is None))
    if not exact.any():
        return gradient.abs().max().item()
    return off_by(gradient.double(), exact)


def _config(tmp_path, **options):
    return UnlearnConfig(
        **{
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": len(FORGET),
            "max_steps": 2,
            "learning_rate": 2e-2,
            "max_grad_norm": 0.0,
            "lora_rank": 4,
            "lora_alpha": 8,
            "fisher_cache_dir": str(tmp_path / "cache"),
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        }
    )


def run(kind, tmp_path, **options):
    """Unlearn with a class's model by FILA, or by default LoRA if FILA is refused, and measure the errors.

    Args:
        kind: The model type.
        tmp_path: A folder for the saves.
        options: Further settings of the runs.

    Returns:
        The ``Shown`` with the errors: of the outputs at the start, the row scales, the first gradients, the
        first values of NPO and KL, and the outputs of each save in a fresh model. A refused model's error is
        1 if the refusal changed it.
    """
    refusal, changed = "", 0.0
    for init in ("fila", "default"):
        model = make_model(kind)
        before = copy.deepcopy(model.state_dict())
        try:
            shown = _run(kind, model, tmp_path / init, init, options)
        except (ValueError, RuntimeError) as error:
            refusal = refusal or str(error)
            after = model.state_dict()
            same = list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
            changed = max(changed, float(not same))
        else:
            shown.refusal, shown.errors["refused model"] = refusal, changed
            return shown
    return Shown(kind, type(model).__name__, refusal=refusal, errors={"refused model": changed})


def _run(kind, model, tmp_path, init, options):
    original, watch = logits(model), _Watch()
    config = _config(tmp_path, init=init, **options)
    result = unlearn(model, FORGET, RETAIN, config=config, callbacks=[watch])
    adapter = result.model.peft_config["default"]
    # A regular expression is a text.
    modules = [adapter.target_modules] if isinstance(adapter.target_modules, str) else adapter.target_modules
    shown = Shown(
        kind, type(model).__name__, sorted(modules or []), sorted(adapter.target_parameters or []), init
    )
    errors = shown.errors
    errors["start"] = off_by(watch.logits, original)
    errors["gradients"] = max(
        _gradient_error(gradient, watch.exact[name]) for name, gradient in watch.gradients.items()
    )
    if init == "fila":
        (file,) = (tmp_path / "cache").glob("row_scales-*.safetensors")
        row_scales = load_file(file)
        exact = exact_row_scales(make_model(kind), sorted(row_scales))
        errors["row scales"] = max(off_by(row_scales[name], exact[name]) for name in exact)
    trained = logits(result.model.eval())
    errors["change"] = off_by(trained, original)
    for save in ("portable", "residual", "merged"):
        path = tmp_path / save
        result.save(path, save)
        errors[save] = off_by(logits(load(kind, path, save).eval()), trained)
    npo = 2 / OBJECTIVES["npo"].beta * math.log(2)
    for method, name, expected in (("npo", "forget_loss", npo), ("kl", "retain_loss", 0.0)):
        config = _config(tmp_path, init=init, method=method, max_steps=1, **options)
        history = unlearn(make_model(kind), FORGET, RETAIN, config=config).history
        errors[method] = abs(history[0][name] - expected)
    return shown


def load(kind, path, save):
    """Load a save as a user would."""
    if save == "merged":
        return AutoModelForCausalLM.from_pretrained(path)
    if save == "residual":
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(path / "base"), path / "adapter"
        )
    return PeftModel.from_pretrained(make_model(kind), path)
