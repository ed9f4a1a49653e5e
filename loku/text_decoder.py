"""The part of a model that reads text: its decoder, and the linears whose calls compute its output."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from loku.models import unwrapped

# The names that transformers' multimodal models give to modules which rows of text do not reach.
_TOWERS = {
    "audio_embed",
    "audio_encoder",
    "audio_tower",
    "connector",
    "embed_audio",
    "embed_tokens_extend",
    "embed_vision",
    "image_embed",
    "image_encoder",
    "image_tower",
    "img_processor",
    "multi_modal_projector",
    "perceiver_resampler",
    "qformer",
    "speech_encoder",
    "vision_encoder",
    "vision_model",
    "vision_tower",
    "visual",
    "visual_projection",
    "vqmodel",
}
# Attention to another model's states, which a causal LM skips.
_CROSS_ATTENTION = re.compile(r"cross_?att|gated_cross|encoder_attn", re.IGNORECASE)

# The functions of a module that read weights to initialise them.
_INITIALISERS = {"__init__", "_init_weights", "init_weights", "reset_parameters"}
_DIRECT_READ = re.compile(
    r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|data)\b|\[|, torch\.Tensor\))"
)
_PARAMETER_READ = re.compile(r"self\.(\w+)\.(\w+)\b(?!\.(?:dtype|device|shape|size)\b|\()")
_SLICED_READ = re.compile(r"self\.(\w+)\.weight\[")


def check_causal_lm(model: nn.Module) -> None:
    """Check that a model predicts each token from the tokens before it alone, by its class and config.

    Args:
        model: The model, with the wrappers of DDP and peft or without.

    Raises:
        ValueError: It is an encoder-decoder such as T5, or its tokens see later tokens, as those of BERT do.
    """
    base: Any = unwrapped(model)
    kind = type(base).__name__
    config: Any = getattr(base, "config", None)
    if config is None:
        return
    advice = "pass a decoder-only causal LM, as transformers.AutoModelForCausalLM loads"
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config())):
        raise ValueError(f"{kind} is an encoder-decoder, which has no causal LM loss here; {advice}")
    masked = kind.endswith("ForMaskedLM") or config.model_type == "xlnet"
    # XLM's config has causal. Those of BERT's kind have the other two. GPT-NeoX's is_decoder has no effect.
    masked |= getattr(config, "causal", None) is False
    encoder = getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention")
    if masked or encoder:
        trained = ", or load it with is_decoder=True if it was trained so" if encoder else ""
        raise ValueError(f"the tokens of {kind} see later tokens: it is no causal LM; {advice}{trained}")


def text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that compute on rows of text, by their names in the model.

    They are the decoder of a multimodal model, without its vision and audio towers, its projectors and its
    cross attention. They are all modules of another causal LM but its output embedding.

    Args:
        model: The causal LM, without an adapter.
    """
    everything = dict(model.named_modules())
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    # ModernBERT's get_decoder() returns its output embedding.
    prefix = next((n for n, module in everything.items() if module is decoder and module is not head), "")
    within = prefix + "." if prefix else ""
    text: dict[str, nn.Module] = {}
    outside: tuple[str, ...] = ()
    for name, module in everything.items():  # a module comes before its own modules
        if not name.startswith(within) or name.startswith(outside) or module is head:
            continue
        if name and _is_outside(module, name, model):
            outside += (name + ".",)
        else:
            text[name] = module
    return text


def _is_outside(module: nn.Module, name: str, model: nn.Module) -> bool:
    leaf = name.rpartition(".")[2]
    if leaf in _TOWERS or _CROSS_ATTENTION.search(leaf) or "CrossAttention" in type(module).__name__:
        return True
    return isinstance(module, PreTrainedModel) and module.main_input_name not in (
        "input_ids",
        "inputs_embeds",
        getattr(model, "main_input_name", "input_ids"),
    )


def directly_read(model: nn.Module) -> set[str]:
    """The names of the modules whose weights another module's forward reads without calling them.

    An adapter acts in the call of its module alone, so it has no effect there. Mamba's ``dt_proj`` is one,
    and so are ``x_proj`` and ``out_proj`` where a fused kernel takes their weights in training on CUDA. The
    names of other parameters that are read so are among them, such as those of DBRX's experts.

    Args:
        model: The causal LM, without an adapter.
    """
    config = getattr(model, "config", None)
    # Bloom slices its weights with these two settings alone.
    sliced = (getattr(config, "pretraining_tp", 1) or 1) > 1 and getattr(config, "slow_but_exact", False)
    names = set()
    for name, module in model.named_modules():
        prefix = name + "." if name else ""
        kind: Any = type(module)
        weights, parameters = _read_children(kind, sliced)
        names |= {prefix + child for child in weights if hasattr(module, child)}
        for child, parameter in parameters:
            held = getattr(getattr(module, child, None), "_parameters", {}).get(parameter)
            if held is not None and parameter not in ("weight", "bias"):
                names.add(f"{prefix}{child}.{parameter}")
    return names


@cache
def _read_children(cls: Any, sliced: bool) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """The children whose weight a class reads, and the pairs of a child and another attribute of it."""
    found: set[str] = set()
    attributes: set[tuple[str, str]] = set()
    for part in cls.__mro__:
        if part in (nn.Module, PreTrainedModel) or part.__module__.startswith("torch."):
            continue
        for name, function in vars(part).items():
            if name in _INITIALISERS or not inspect.isfunction(function):
                continue
            try:
                source = inspect.getsource(function)
            except (OSError, TypeError):  # it was made without a source file
                continue
            found |= set(_DIRECT_READ.findall(source))
            attributes |= set(_PARAMETER_READ.findall(source))
            if sliced:
                found |= set(_SLICED_READ.findall(source))
    return frozenset(found), frozenset(attributes)
