"""The lines that serve a result, for each server, and the files beside it that a server reads."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from loku.serving.rules import SERVERS, max_lora_rank

BASE_GGUF, ADAPTER_GGUF, MODEL_GGUF = "base.gguf", "adapter.gguf", "model.gguf"
LINES, MODELFILE = "lines.txt", "Modelfile"
VLLM_PORT, TGI_PORT, LLAMA_PORT = 8000, 3000, 8080
_PROMPT = "Once upon a time"


def serving_lines(
    target: str,
    place: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    rank: int | None = None,
    name: str = "unlearned",
    files: str | os.PathLike = "serving",
) -> list[str]:
    """The exact lines that serve a result. A line with # is a remark; all others can be pasted into a shell.

    Args:
        target: The server, one of ``loku.serving.rules.SERVERS``. "peft" gives lines of Python.
        place: The folder of the adapter, or of the whole model for "merged".
        base: The folder or hub name of the untouched base; None only for "merged".
        rank: The greatest rank of a module of the adapter, for "vllm".
        name: The name that a request calls the model by, "unlearned" by default.
        files: The folder of the GGUF files and the Modelfile, "serving" by default.

    Raises:
        ValueError: There is no such server, or it needs a base or a rank that is not given, or vLLM serves no
            adapter of this rank.
    """
    if target not in SERVERS:
        raise ValueError(f"target must be one of {list(SERVERS)}, got {target!r}")
    place, files = os.fspath(place), Path(files)
    if target == "merged":
        return _merged_lines(place, name, files)
    if base is None:
        raise ValueError(f"{target} serves an adapter on its base: pass the folder or hub name of the base")
    base = os.fspath(base)
    if target == "peft":
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f'base = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")',
            f"model = PeftModel.from_pretrained(base, {place!r})",
        ]
    if target == "vllm":
        if rank is None:
            raise ValueError("vLLM must know the rank of the adapter: pass rank")
        options = ["--enable-lora", "--lora-modules", f"{name}={place}"]
        return [
            _line("vllm", "serve", base, *options, "--max-lora-rank", max_lora_rank(rank)),
            _completion(VLLM_PORT, name),
        ]
    if target == "tgi":
        body = {"inputs": _PROMPT, "parameters": {"adapter_id": name, "max_new_tokens": 16}}
        return [
            _line("text-generation-launcher", "--model-id", base, "--lora-adapters", f"{name}={place}"),
            _post(TGI_PORT, "/generate", body),
        ]
    if target == "ollama":
        return [_convert(base, files / BASE_GGUF, hub=not os.path.isdir(base)), *_ollama(name, files)]
    return [
        _convert(base, files / BASE_GGUF, hub=not os.path.isdir(base)),
        _line("llama-server", "--model", files / BASE_GGUF, "--lora", files / ADAPTER_GGUF),
        _completion(LLAMA_PORT, name),
        *_ollama(name, files),
    ]


def _merged_lines(place: str, name: str, files: Path) -> list[str]:
    return [
        "# vLLM",
        _line("vllm", "serve", place, "--served-model-name", name),
        "# TGI",
        _line("text-generation-launcher", "--model-id", place),
        "# llama.cpp, and Ollama after the first of its lines",
        _convert(place, files / MODEL_GGUF),
        _line("llama-server", "--model", files / MODEL_GGUF),
        *_ollama(name, files),
    ]


def modelfile(target: str) -> str:
    """The text of Ollama's Modelfile, which lies beside the GGUF files.

    Args:
        target: "merged" for a whole model, or "gguf" or "ollama" for an adapter on its base.
    """
    if target == "merged":
        return f"FROM ./{MODEL_GGUF}\n"
    return f"FROM ./{BASE_GGUF}\nADAPTER ./{ADAPTER_GGUF}\n"


def write_serving_files(
    directory: str | os.PathLike,
    target: str,
    place: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    rank: int | None = None,
    name: str = "unlearned",
) -> list[Path]:
    """Write the lines, and the files that the server reads: Ollama's Modelfile, and the adapter as GGUF.

    The lines are for a shell in the folder above ``directory``, with paths from there, so the whole may be
    moved.

    Args:
        directory: The folder to write into, which is made if need be. Its files of these names are replaced.
        target: The server, as for ``serving_lines``.
        place: The folder of the adapter or of the whole model.
        base: As for ``serving_lines``.
        rank: As for ``serving_lines``.
        name: As for ``serving_lines``.

    Returns:
        The files that were written.

    Raises:
        ImportError: "gguf" and "ollama" need the package gguf.
        ValueError: The errors of ``serving_lines`` and of ``loku.serving.gguf_adapter.write_gguf_adapter``.
        OSError: A file cannot be written.
    """
    from loku.saving.directories import whole_file

    directory = Path(os.path.abspath(directory))
    here = os.path.relpath(place, directory.parent)
    lines = serving_lines(target, here, base=base, rank=rank, name=name, files=directory.name)
    language = "in Python" if target == "peft" else "in a shell"
    head = f"# {language}, in the folder that holds {here} and {directory.name}"
    texts = {LINES: "\n".join([head, *lines, ""])}
    if target in ("merged", "gguf", "ollama"):
        texts[MODELFILE] = modelfile(target)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    if target in ("gguf", "ollama"):
        from loku.serving.gguf_adapter import write_gguf_adapter

        assert base is not None  # serving_lines has refused it
        write_gguf_adapter(place, base, directory / ADAPTER_GGUF)
        written.append(directory / ADAPTER_GGUF)
    for file, text in texts.items():
        with whole_file(directory / file) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        written.append(directory / file)
    return written


def _line(*words: Any) -> str:
    return shlex.join(str(word) for word in words)


def _post(port: int, path: str, body: dict[str, Any]) -> str:
    header = ("-H", "Content-Type: application/json")
    return _line("curl", f"http://localhost:{port}{path}", *header, "-d", json.dumps(body))


def _completion(port: int, name: str) -> str:
    """A request by the interface of OpenAI."""
    return _post(port, "/v1/completions", {"model": name, "prompt": _PROMPT, "max_tokens": 16})


def _convert(model: str, outfile: Path, *, hub: bool = False) -> str:
    """The line of llama.cpp's converter, which lies in llama.cpp's own folder."""
    remote = ("--remote",) if hub else ()
    return _line("python", "convert_hf_to_gguf.py", model, *remote, "--outfile", outfile)


def _ollama(name: str, files: Path) -> list[str]:
    return [_line("ollama", "create", name, "-f", files / MODELFILE), _line("ollama", "run", name)]
