"""The lines that serve a result, and the files beside it."""

import shlex

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model

from loku.serving import serving_lines, write_serving_files


def test_vllm_is_started_with_the_rank():
    first, request = serving_lines("vllm", "out/adapter", base="org/base", rank=24)
    assert shlex.split(first) == [
        *("vllm", "serve", "org/base", "--enable-lora"),
        *("--lora-modules", "unlearned=out/adapter", "--max-lora-rank", "32"),
    ]
    assert '"model": "unlearned"' in request
    with pytest.raises(ValueError, match="pass rank"):
        serving_lines("vllm", "out/adapter", base="org/base")


def test_a_path_with_blanks_is_one_word():
    (line, _) = serving_lines("tgi", "my adapter", base="my base")
    assert shlex.split(line) == [
        *("text-generation-launcher", "--model-id", "my base"),
        *("--lora-adapters", "unlearned=my adapter"),
    ]


def test_peft_lines_load_the_adapter(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    variables = {}
    exec("\n".join(serving_lines("peft", tmp_path / "adapter", base=tmp_path / "base")), variables)
    assert variables["model"].peft_config["default"].r == 2


def test_llama_cpp_and_ollama_have_the_gguf_files(tmp_path):
    lines = serving_lines("gguf", "adapter", base="org/base")
    convert, serve, _, create, run = map(shlex.split, lines)
    assert convert == [
        *("python", "convert_hf_to_gguf.py", "org/base", "--remote", "--outfile", "serving/base.gguf")
    ]
    assert serve == [*("llama-server", "--model", "serving/base.gguf", "--lora", "serving/adapter.gguf")]
    assert create == ["ollama", "create", "unlearned", "-f", "serving/Modelfile"]
    assert run == ["ollama", "run", "unlearned"]
    assert "--remote" not in serving_lines("ollama", "adapter", base=tmp_path)[0]


def test_a_merged_model_is_served_without_its_base():
    lines = serving_lines("merged", "model", name="m")
    assert "vllm serve model --served-model-name m" in lines
    assert "python convert_hf_to_gguf.py model --outfile serving/model.gguf" in lines


@pytest.mark.parametrize("target", ["peft", "vllm", "gguf", "tgi", "ollama"])
def test_an_adapter_needs_its_base(target):
    with pytest.raises(ValueError, match="pass the folder or hub name of the base"):
        serving_lines(target, "adapter", rank=8)


def test_a_server_that_is_not_known():
    with pytest.raises(ValueError, match="target must be one of"):
        serving_lines("triton", "adapter", base="base")


@pytest.fixture
def saved(tmp_path):
    model = tiny_model("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "out" / "adapter"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    return tmp_path


def test_the_files_of_gguf(saved):
    pytest.importorskip("gguf")
    serving = saved / "out" / "serving"
    files = write_serving_files(serving, "gguf", saved / "out" / "adapter", base=saved / "base")
    assert sorted(file.name for file in files) == ["Modelfile", "adapter.gguf", "lines.txt"]
    assert sorted(serving.iterdir()) == sorted(files)
    assert (serving / "Modelfile").read_text() == "FROM ./base.gguf\nADAPTER ./adapter.gguf\n"
    text = (serving / "lines.txt").read_text()
    assert text.startswith("# in a shell, in the folder that holds adapter and serving\npython convert_hf")
    assert str(saved / "out") not in text  # the folder may be moved
    before = {file: file.read_bytes() for file in files}
    write_serving_files(serving, "gguf", saved / "out" / "adapter", base=saved / "base")
    assert {file: file.read_bytes() for file in files} == before


def test_the_files_of_vllm_and_of_a_merged_model(saved):
    serving = saved / "out" / "serving"
    files = write_serving_files(serving, "vllm", saved / "out" / "adapter", base="org/base", rank=2)
    assert [file.name for file in files] == ["lines.txt"]
    assert "--lora-modules unlearned=adapter --max-lora-rank 8" in files[0].read_text()
    files = write_serving_files(serving, "merged", saved / "out" / "model")
    assert (serving / "Modelfile").read_text() == "FROM ./model.gguf\n"
    assert "vllm serve model" in (serving / "lines.txt").read_text()


def test_nothing_is_written_for_what_is_refused(saved):
    with pytest.raises(ValueError, match="pass rank"):
        write_serving_files(saved / "out" / "serving", "vllm", saved / "out" / "adapter", base="base")
    assert not (saved / "out" / "serving").exists()
