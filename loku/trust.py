"""Models and adapters of others: none of their code runs, and their weights are read from safetensors alone.

transformers asks on the standard input whether the code of a repository may run, unless ``trust_remote_code``
is True or False. A pipe of ``yes`` would agree. So every loader of the package passes one of the two. True
needs the user's own argument ``model_init_kwargs={"trust_remote_code": True}``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# The attribute of a model whose repository's code the user trusts. Its tokenizer may then have code, too.
TRUSTED = "_loku_trusts_remote_code"
# Arguments of from_pretrained that say where a repository is, not how a model is made.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# What transformers raises for files that are damaged or hostile.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    SafetensorError,
    StrictDataclassError,  # of a config
    TypeError,
    ValueError,
    re.error,  # of a pattern in the config of an adapter
)
# Words of the RuntimeError that transformers or torch raises for tensors of other shapes.
_MISMATCH = ("ignore_mismatched_sizes", "size mismatch")
# Fields of an adapter's config by which peft reads or imports something else than the adapter's folder. The
# value beside a field is the harmless one.
_FOREIGN_FIELDS = {
    "megatron_config": None,  # peft imports the module that megatron_core names
    "prompt_tuning_init_state_dict_path": None,
    "shadow_model": "mirror",
    "adapters": None,  # of X-LoRA: further adapters
}


def trusts_code(arguments: Mapping[str, Any]) -> bool:
    """Whether the user's arguments of ``from_pretrained`` let the code of the repository run.

    Args:
        arguments: The arguments.

    Raises:
        ValueError: ``trust_remote_code`` is neither true nor false.
    """
    trusted = arguments.get("trust_remote_code")
    if trusted not in (None, True, False):
        raise ValueError(f"trust_remote_code must be true or false, got {trusted!r}")
    return bool(trusted)


@contextmanager
def loading(place: str | os.PathLike) -> Iterator[None]:
    """Name the repository, and what to do, where transformers refuses its code or cannot read its files.

    Args:
        place: The folder or hub name of the repository.

    Raises:
        ValueError: transformers has refused the code, or the files are damaged.
    """
    try:
        yield
    except _DAMAGE as error:
        text = str(error)
        if "trust_remote_code" in text and isinstance(error, ValueError):
            raise ValueError(
                f"{place} needs code of its own, which is never run unasked: read it, and if you trust it "
                'pass model_init_kwargs={"trust_remote_code": True}, on the command line '
                "--model_init_kwargs '{\"trust_remote_code\": true}'"
            ) from error
        if type(error) is ValueError and len(text) < 1000:  # a sentence of transformers
            raise
        raise ValueError(f"{place} cannot be loaded: {type(error).__name__}: {text:.500}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _MISMATCH):  # such as a lack of memory
            raise
        raise ValueError(
            f"{place} cannot be loaded: its weights have other shapes than its config and its base ask for "
            f"({error!s:.500})"
        ) from error


def load_tokenizer(
    place: str | os.PathLike, *, trust_remote_code: bool = False, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        place: The folder or hub name.
        trust_remote_code: Whether code in the repository may run, False by default.
        local_files_only: Whether the hub is left alone, False by default.

    Raises:
        ValueError: The tokenizer needs code of its own, which is not trusted, or its files are damaged.
        OSError: There is no tokenizer.
    """
    from transformers import AutoTokenizer

    with loading(place):
        return AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )


def find_file(place: str | os.PathLike, name: str, hub: Mapping[str, Any]) -> str | None:
    """Find a file of a folder or of a repository on the hub.

    Args:
        place: The folder or hub name.
        name: The name of the file.
        hub: The arguments of ``from_pretrained`` that say where the repository is.

    Returns:
        The path of the file, which is downloaded if need be; None if there is no such file.
    """
    from transformers.utils.hub import cached_file

    quietly = dict.fromkeys(("missing_entries", "connection_errors"), False)
    quietly = {f"_raise_exceptions_for_{name}": flag for name, flag in quietly.items()}
    return cached_file(place, name, **hub, **quietly)


def check_base(model: str | os.PathLike, config: PreTrainedConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse a model whose files ask for a kernel of the hub, or for pickled weights under another name.

    Args:
        model: The folder or hub name.
        config: Its config, as it was read from there.
        arguments: The user's arguments of ``from_pretrained``. They may allow either.

    Raises:
        ValueError: The files ask for one of them.
    """
    configs = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    asked = [getattr(part, "_attn_implementation", None) for part in configs]
    kernels = [name for name in asked if isinstance(name, str) and "/" in name]
    if kernels and arguments.get("attn_implementation") not in kernels:
        raise ValueError(
            f"the config of {model} asks for code from the hub, the kernel {kernels[0]!r}: take it out of "
            f'the config, or pass model_init_kwargs={{"attn_implementation": "{kernels[0]}"}} if you trust it'
        )
    if arguments.get("use_safetensors") is False:
        return
    files = [str(getattr(config, "transformers_weights", None) or "model.safetensors")]
    index = files[0] if files[0].endswith(".index.json") else "model.safetensors.index.json"
    if arguments.get("variant"):
        index = f"{index.removesuffix('json')}{arguments['variant']}.json"
    hub = {key: value for key, value in arguments.items() if key in HUB_ARGUMENTS}
    path = find_file(model, index, hub)
    if path is not None:
        try:
            files += map(str, json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not the index of a model's weights") from error
    pickles = [file for file in files if not file.endswith((".safetensors", ".safetensors.index.json"))]
    if pickles:
        raise ValueError(
            f"{model} names {pickles[0]!r} as a file of its weights, and weights are read from safetensors "
            'alone: pass model_init_kwargs={"use_safetensors": False} if you trust the file'
        )


def check_adapter(
    adapter: str, config: PeftConfig, hub: Mapping[str, Any], *, use_safetensors: bool = True
) -> None:
    """Refuse an adapter without safetensors, or whose config makes peft import or load something else.

    Args:
        adapter: The folder or hub name.
        config: Its config.
        hub: The arguments of ``from_pretrained`` that say where it is.
        use_safetensors: Whether the weights must be safetensors, True by default.

    Raises:
        ValueError: The adapter is refused.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    for field, harmless in _FOREIGN_FIELDS.items():
        value = getattr(config, field, harmless)
        if value != harmless and value:
            raise ValueError(
                f"the config of the adapter {adapter} has {field}, by which peft would import a module or "
                "load other files than the adapter's: remove it, or load and merge the adapter by peft and "
                "pass the model"
            )
    if use_safetensors and find_file(adapter, SAFETENSORS_WEIGHTS_NAME, hub) is None:
        raise ValueError(
            f"the adapter {adapter} has no {SAFETENSORS_WEIGHTS_NAME}, and weights are read from safetensors "
            "alone: if you trust its adapter_model.bin, load it by PeftModel.from_pretrained and save it by "
            "save_pretrained, which writes safetensors"
        )
