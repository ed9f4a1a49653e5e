"""Serve saved adapters for real, by the servers that are installed, and compare with transformers and peft.

    python scripts/check_serving.py                           # write the table of the committed results
    python scripts/check_serving.py --run --llama-cpp DIR     # check first (minutes), and write the results

It unlearns with the embedded model, saves, and asks what each server makes of the save:

- peft: the logits of a plain load on the untouched base, and of the merged model.
- vLLM: the checks and the reader of its LoRA adapters (``PEFTHelper``, ``LoRAModel``), which need no GPU. Its
  layers do, and are replaced by empty classes here. So vLLM generates nothing in this check.
- llama.cpp (``llama-cpp-python``, and a source folder with its converters): the tensors of
  ``convert_lora_to_gguf.py`` and ours, then logits and greedy answers of base + adapter and of the merged
  model. The converter refuses tokenizers that it does not know. Rows go in as tokens, so another name of the
  tokenizer changes nothing, and it gets one.
- Further classes: tiny random models with random adapters, in llama.cpp, too.

A server that is not installed keeps the results of its last run. ``tests/loku/test_serving_table.py``
compares the page with them.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "serving_table.json"
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- what was run -->", "<!-- /what was run -->"

Facts = dict[str, Any]
TOKENS = 48  # tokens of a row that logits are compared for
GREEDY = 24  # tokens of a greedy answer
STEPS = 6
ROWS = 64  # retain rows of the run
# A converter of llama.cpp, with a name for the tokenizers that it does not know.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import conversion.base
known = conversion.base.TextModel.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"
conversion.base.TextModel.get_vocab_base_pre = named
script = sys.argv[1] + "/" + sys.argv[2]
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def table(results: list[Facts]) -> str:
    """Return the table of some results, in Markdown.

    Args:
        results: The results of each check: its ``server``, ``version``, ``check`` and ``result``.
    """
    rows = [
        f"| {fact['server']} | {fact['version']} | {fact['check']} | {fact['result']} |" for fact in results
    ]
    return "\n".join(["| server | version | what was run | what came out |", "|---|---|---|---|", *rows])


def render(page: str, results: list[Facts]) -> str:
    """Return a page with the table of some results between its markers."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def _figure(value: float) -> str:
    return f"{value:.1e}"


class _Subject:
    """A model, its folder, a saved adapter and rows of tokens, with the logits that transformers gives."""

    def __init__(
        self, name: str, base: Path, adapter: Path, merged: Path | None, rows: list[list[int]]
    ) -> None:
        self.name, self.base, self.adapter, self.merged, self.rows = name, base, adapter, merged, rows

    def peft_model(self) -> Any:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32, trust_remote_code=False)
        return PeftModel.from_pretrained(base, self.adapter).eval()

    def logits(self, model: Any) -> list[Any]:
        """The logits (tokens, vocabulary) of each row, float32."""
        import torch

        with torch.no_grad():
            return [model(torch.tensor([row])).logits[0].float().numpy() for row in self.rows]

    def greedy(self, model: Any) -> list[list[int]]:
        """The likeliest tokens one after the other, an end of text among them, after half of each row."""
        import torch

        answers = []
        for row in self.rows:
            tokens = row[: TOKENS // 2]
            start = len(tokens)
            for _ in range(GREEDY):
                with torch.no_grad():
                    tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
            answers.append(tokens[start:])
        return answers


def _unlearned(folder: Path, rank: int) -> tuple[_Subject, Any]:
    """Unlearn with the embedded model, and save the adapter and the merged model."""
    import loku
    from loku.demo import EMBEDDED, load_model, load_rows

    forget, retain = load_rows()
    model, tokenizer = load_model()
    config = loku.UnlearnConfig(
        lora_rank=rank,
        lora_alpha=2 * rank,
        learning_rate=2e-3,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        retain_weight=1.5,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        output_dir=str(folder / "run"),
    )
    result = loku.unlearn(model, forget, retain[:ROWS], config=config, tokenizer=tokenizer)
    result.save(folder / "adapter")
    result.save(folder / "merged", "merged")
    rows = []
    for row in [*forget[:4], *retain[:4]]:
        rows.append(tokenizer(" ".join(map(str, row.values())))["input_ids"][:TOKENS])
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return _Subject("embedded Llama", EMBEDDED, folder / "adapter", folder / "merged", rows), result


def _largest(found: list[Any], expected: list[Any]) -> float:
    return max(float(abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def check_peft(folder: Path) -> list[Facts]:
    """A plain load of the default save, and of the merged one."""
    import torch
    from transformers import AutoModelForCausalLM

    facts = []
    for rank in (8, 16):
        subject, result = _unlearned(folder / f"rank{rank}", rank)
        model = result.model.float().eval()
        expected = subject.logits(model)
        size = max(float(abs(logits).max()) for logits in expected)
        loaded = subject.peft_model()
        served = loaded.peft_config["default"].r
        error = _largest(subject.logits(loaded), expected) / size
        merged = AutoModelForCausalLM.from_pretrained(
            subject.merged, dtype=torch.float32, trust_remote_code=False
        ).eval()
        merged_error = _largest(subject.logits(merged), expected) / size
        result_text = (
            f"largest error of a logit {_figure(error)} of the largest, of the merged save "
            f"{_figure(merged_error)}"
        )
        facts.append(
            {
                "server": "peft",
                "version": metadata.version("peft"),
                "check": f"`PeftModel.from_pretrained`, trained at rank {rank}, served at {served}",
                "result": result_text,
            }
        )
    return facts


class _EmptyLayers(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """vLLM's layers and models, which need its kernels, as modules of empty classes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.startswith(("vllm.model_executor", "vllm.lora.layers")) and name not in sys.modules:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module: Any = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: _empty_class(name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _empty_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def check_vllm(folder: Path) -> list[Facts]:
    """vLLM's own checks and reader on the default saves."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    sys.meta_path.insert(0, _EmptyLayers())
    import vllm.lora.lora_model

    from loku.serving import max_lora_rank

    vllm.lora.lora_model.PIN_MEMORY = False  # there is no GPU to copy to
    facts = []
    for rank in (8, 16):
        adapter = folder / f"rank{rank}" / "adapter"
        subject = _Subject("", ROOT / "loku" / "embedded", adapter, None, [])
        helper = PEFTHelper.from_local_dir(str(adapter), 512)
        fits = max_lora_rank(helper.r)
        helper.validate_legal(LoRAConfig(max_lora_rank=fits))
        refusal = ""
        if fits > 16:
            try:
                helper.validate_legal(LoRAConfig())
            except ValueError as error:
                refusal = f"; the default is refused: {error}"
        names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        read = vllm.lora.lora_model.LoRAModel.from_local_checkpoint(str(adapter), names, helper, device="cpu")
        peft_layers = dict(subject.peft_model().get_base_model().named_modules())
        worst = 0.0
        for name, layer in read.loras.items():
            layer.optimize()
            expected = peft_layers[name].get_delta_weight("default").detach()
            found = layer.lora_b @ layer.lora_a
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
        facts.append(
            {
                "server": "vLLM",
                "version": metadata.version("vllm"),
                "check": f"`validate_legal` and `LoRAModel.from_local_checkpoint`, rank {helper.r}",
                "result": (
                    f"accepted with `--max-lora-rank {fits}`{refusal}; {len(read.loras)} modules read, "
                    f"largest error of B A {_figure(worst)} of the largest"
                ),
            }
        )
    return facts


def _convert(llama_cpp: Path, script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CONVERT, str(llama_cpp), script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _converted(llama_cpp: Path, model: Path, out: Path) -> Path:
    done = _convert(llama_cpp, "convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "f32")
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return out


def _llama(subject: _Subject, model: Path, adapter: Path | None) -> tuple[list[Any], list[list[int]]]:
    """The logits and greedy answers of llama.cpp, with a float32 cache."""
    import llama_cpp
    import numpy as np

    options: Facts = {} if adapter is None else {"lora_path": str(adapter)}
    llama = llama_cpp.Llama(
        str(model),
        n_ctx=256,
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        **options,
    )
    logits, answers = [], []
    for row in subject.rows:
        llama.reset()
        llama.eval(row)
        logits.append(np.array(llama.scores[: len(row)]))
        llama.reset()
        prompt = row[: TOKENS // 2]
        llama.eval(prompt)
        answer: list[int] = []
        for _ in range(GREEDY):
            answer.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(answer[-1:])
        answers.append(answer)
    llama.close()
    return logits, answers


def _agreement(subject: _Subject, served: Any, expected: Any, answers: Any) -> str:
    logits, greedy = served
    size = max(float(abs(row).max()) for row in expected)
    error = _figure(_largest(logits, expected) / size)
    same = sum(a == b for a, b in zip(greedy, answers, strict=True))
    return (
        f"largest error of a logit {error} of the largest; {same} of {len(answers)} greedy answers the same"
    )


def _same_tensors(one: Path, other: Path) -> str:
    import numpy as np
    from gguf import GGUFReader

    ours = {tensor.name: tensor.data for tensor in GGUFReader(one).tensors}
    theirs = {tensor.name: tensor.data for tensor in GGUFReader(other).tensors}
    same = [name for name in theirs if name in ours and np.array_equal(ours[name], theirs[name])]
    if len(same) == len(theirs) == len(ours):
        return f"all {len(ours)} tensors are bit for bit those of `convert_lora_to_gguf.py`"
    return f"{len(same)} of {len(theirs)} tensors are those of `convert_lora_to_gguf.py`"


def check_llama_cpp(folder: Path, llama_cpp: Path) -> list[Facts]:
    """Adapters and merged models in llama.cpp."""
    import torch
    from transformers import AutoModelForCausalLM

    from loku.demo import EMBEDDED
    from loku.serving.gguf_adapter import write_gguf_adapter

    version = f"llama-cpp-python {metadata.version('llama-cpp-python')}"
    facts = []
    base = _converted(llama_cpp, EMBEDDED, folder / "base.gguf")
    for rank in (8, 16):
        place = folder / f"rank{rank}"
        rows = json.loads((place / "rows.json").read_text())
        subject = _Subject("embedded Llama", EMBEDDED, place / "adapter", place / "merged", rows)
        ours, theirs = place / "adapter.gguf", place / "theirs.gguf"
        written = write_gguf_adapter(subject.adapter, EMBEDDED, ours)
        _convert(
            llama_cpp, "convert_lora_to_gguf.py", subject.adapter, "--base", EMBEDDED, "--outfile", theirs
        )
        peft_model = subject.peft_model()
        expected, answers = subject.logits(peft_model), subject.greedy(peft_model)
        text = _agreement(subject, _llama(subject, base, ours), expected, answers)
        check = f"embedded Llama, base + adapter of rank {written['rank']}"
        row = {"server": "llama.cpp", "version": version}
        facts.append({**row, "check": check, "result": f"{_same_tensors(ours, theirs)}; {text}"})
    merged = AutoModelForCausalLM.from_pretrained(
        subject.merged, dtype=torch.float32, trust_remote_code=False
    ).eval()
    expected, answers = subject.logits(merged), subject.greedy(merged)
    model = _converted(llama_cpp, place / "merged", folder / "merged.gguf")
    text = _agreement(subject, _llama(subject, model, None), expected, answers)
    facts.append({**row, "check": "embedded Llama, the merged save", "result": text})
    for kind in ("mistral", "qwen2", "qwen3", "gpt2"):
        facts.append({**row, **_other_class(folder / kind, kind, llama_cpp)})
    return facts


def _tiny(kind: str) -> Any:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    common: Facts = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            **common, n_embd=64, n_layer=2, n_head=4, n_positions=256, n_ctx=256
        )
    else:
        common |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
        names = {"mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
        config = getattr(transformers, names[kind])(
            **common,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    return model


def _other_class(folder: Path, kind: str, llama_cpp: Path) -> Facts:
    """A random adapter on a tiny random model of another class."""
    import shutil

    import torch
    from peft import LoraConfig, get_peft_model

    from loku.demo import EMBEDDED
    from loku.serving.gguf_adapter import write_gguf_adapter

    model = _tiny(kind)
    model.save_pretrained(folder / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / file, folder / "base" / file)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else targets
    config = LoraConfig(
        r=8,
        lora_alpha=12,
        target_modules=targets,
        fan_in_fan_out=kind == "gpt2",
        rank_pattern={"v_proj": 4, "c_fc": 4},
        alpha_pattern={"o_proj": 20},
        use_rslora=True,
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    peft_model.save_pretrained(folder / "adapter")
    rows = [list(range(3 + i, 3 + i + 11 * TOKENS, 11)) for i in range(4)]
    subject = _Subject(kind, folder / "base", folder / "adapter", None, rows)
    write_gguf_adapter(subject.adapter, subject.base, folder / "adapter.gguf")
    base = _converted(llama_cpp, subject.base, folder / "base.gguf")
    loaded = subject.peft_model()
    expected, answers = subject.logits(loaded), subject.greedy(loaded)
    text = _agreement(subject, _llama(subject, base, folder / "adapter.gguf"), expected, answers)
    with loaded.disable_adapter():
        without = _largest(subject.logits(loaded), expected) / max(float(abs(row).max()) for row in expected)
    name = type(model).__name__
    return {
        "check": f"`{name}`, tiny and random, adapter with rsLoRA, `rank_pattern` and `alpha_pattern`",
        "result": f"{text}; the adapter changes a logit by up to {_figure(without)} of it",
    }


def _run(llama_cpp: Path | None, results: list[Facts]) -> list[Facts]:
    """The results of the servers that are installed, and the given ones of the others."""
    checks: dict[str, Callable[[Path], list[Facts]]] = {"peft": check_peft}
    if find_spec("vllm") is not None:
        checks["vLLM"] = check_vllm
    if llama_cpp is not None and find_spec("llama_cpp") is not None:
        place = llama_cpp
        checks["llama.cpp"] = lambda folder: check_llama_cpp(folder, place)
    found: dict[str, list[Facts]] = {}
    for fact in results:
        found.setdefault(fact["server"], []).append(fact)
    with tempfile.TemporaryDirectory() as directory:
        for server, check in checks.items():
            found[server] = check(Path(directory))
            for fact in found[server]:
                print(json.dumps(fact), flush=True)
    return [fact for facts in found.values() for fact in facts]


def main() -> None:
    """Write the table, and with --run the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help=f"check what is installed, write {RESULTS.name}")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="the source folder of llama.cpp")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    if options.run:
        results = _run(options.llama_cpp, results)
        lines = ",\n".join(json.dumps(fact) for fact in results)
        RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
