"""``loku export``: the exported adapter loads in plain peft, and nothing of others is overwritten."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import loku
from loku import cli, demo
from loku.trust import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 19).view(2, 8)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bfloat16 base with a tokenizer, an adapter that peft saved, and two data sets."""
    folder = tmp_path_factory.mktemp("export")
    _, tokenizer = demo.load_model()
    tokenizer.chat_template = "{{ 'chat' }}"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config("llama", vocab=len(tokenizer)), dtype=torch.float32)
    base.generation_config.update(max_new_tokens=7)
    base.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(
        r=6, lora_alpha=9, use_rslora=True, target_modules=TARGETS, rank_pattern={"v_proj": 2}
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")
    rows, _ = demo.load_rows()
    for name, part in (("forget", rows[:3]), ("retain", rows[6:8])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return folder


def on_base(folder, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapter)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def data(folder):
    return ["--data", f"forget={folder / 'forget.jsonl'}", f"retain={folder / 'retain.jsonl'}", "--quiet"]


def test_an_adapter_of_peft_at_a_smaller_rank(folder, tmp_path, capsys):
    adapter, output, report = folder / "adapter", tmp_path / "small", tmp_path / "report.json"
    before = contents(folder)
    line = ["export", str(adapter), "--rank=4", f"--output={output}", f"--report={report}", *data(folder)]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out
    assert "exact rank 6" in printed and "forget: largest logit change" in printed
    assert contents(folder) == before

    exact, small = on_base(folder, adapter), on_base(folder, output)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert json.loads((output / "loku_save.json").read_text())["kind"] == "portable"
    (figures,) = json.loads(report.read_text())["ranks"]
    squares = [0.0, 0.0]
    for name, module in small.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            theirs = exact.get_base_model().get_submodule(name)
            delta, kept = (each.get_delta_weight("default").double() for each in (theirs, module))
            S = torch.linalg.svdvals(delta)
            rank = 2 if name.endswith("v_proj") else 4
            assert module.r["default"] == rank and module.scaling["default"] == 1
            assert (delta - kept).norm() <= S[rank:].norm() + 1e-5 * S.norm()
            error = figures["modules"][name]["relative_error"]
            assert error == pytest.approx((S[rank:].norm() / S.norm()).item(), abs=1e-5)
            squares[0] += S[rank:].square().sum().item()
            squares[1] += S.square().sum().item()
    assert figures["relative_error"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)

    tokenizer = load_tokenizer(folder / "base")
    for name, rows in (("forget", 3), ("retain", 2)):
        found = figures["sets"][name]
        tokens = loku.data.tokenize_dataset(
            loku.data.read_rows(folder / f"{name}.jsonl"), tokenizer, name=name
        )
        changes = []
        for row in tokens:
            at = [i - 1 for i, label in enumerate(row["labels"]) if label != -100 and i]
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                changes.append((exact(ids).logits - small(ids).logits)[0, at].float().abs().max().item())
        assert found["rows"] == rows
        # In bfloat16 a logit is rounded, and by other sums in a batch with padding.
        assert found["largest_logit_change"] == pytest.approx(max(changes), rel=0.2)
        assert found["largest_probability_change"] >= abs(found["exact_probability"] - found["probability"])


def test_what_loku_saves_is_exported_the_same(tmp_path):
    """Saved exactly and exported is saved at the rank."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    rows = [{"input_ids": [3 + i, 5, 7 + 2 * i, 11, 13 + i]} for i in range(4)]
    config = loku.UnlearnConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        lora_rank=4,
        use_cpu=True,
        disable_tqdm=True,
    )
    result = loku.unlearn(tmp_path / "base", rows[:2], rows[2:], config=config)
    result.save(tmp_path / "exact")
    result.save(tmp_path / "saved", rank=3)
    assert cli.main(["export", str(tmp_path / "exact"), "--rank=3", "--output", str(tmp_path / "new")]) == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    residual = tmp_path / "residual"
    result.save(residual, "residual")
    assert cli.main(["export", str(residual), "--rank=3", "--output", str(tmp_path / "other")]) == 2
    assert cli.main(["export", str(residual), "--merged", "--output", str(tmp_path / "other")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    expected = logits(result.model)
    assert (logits(merged) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_loss_by_rank(folder, tmp_path, capsys):
    report, picture = tmp_path / "report.json", tmp_path / "ranks.png"
    line = ["export", str(folder / "adapter"), "--ranks", f"--report={report}", f"--picture={picture}"]
    assert cli.main([*line, *data(folder)]) == 0
    found = json.loads(report.read_text())
    assert found["exact_rank"] == 6 and [each["rank"] for each in found["ranks"]] == [2, 4, 6]
    errors = [each["relative_error"] for each in found["ranks"]]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] == 0
    assert found["ranks"][-1]["sets"]["forget"]["largest_logit_change"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.png", "report.json"]
    # An earlier report and its picture may be written again, and other files may not.
    assert cli.main([*line, "--quiet"]) == 0
    before = contents(tmp_path)
    picture.write_bytes(picture.read_bytes() + b"changed")
    capsys.readouterr()
    assert cli.main([*line, "--quiet"]) == 2
    assert "--picture" in capsys.readouterr().err
    assert contents(tmp_path) == {**before, "ranks.png": before["ranks.png"] + b"changed"}
    assert cli.main(["export", str(folder / "adapter"), "--ranks", "3", "1"]) == 0
    assert "rank 3" in (printed := capsys.readouterr().out) and "nothing was written" in printed


def test_merged(folder, tmp_path):
    output = tmp_path / "merged"
    assert cli.main(["export", str(folder / "adapter"), "--merged", f"--output={output}", "--quiet"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == torch.bfloat16 and merged.generation_config.max_new_tokens == 7
    assert (output / "chat_template.jinja").read_text() == "{{ 'chat' }}"
    assert len(load_tokenizer(output)) == len(load_tokenizer(folder / "base"))
    model = on_base(folder, folder / "adapter")
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
            assert torch.equal(merged.get_submodule(name).weight, weight.to(torch.bfloat16))


def test_gguf(folder, tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    output = tmp_path / "gguf"
    command = ["export", str(folder / "adapter"), "--gguf", f"--output={output}"]
    assert cli.main(command) == 0
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", "adapter.gguf", "lines.txt"]
    names = {tensor.name for tensor in gguf.GGUFReader(output / "adapter.gguf").tensors}
    assert "blk.0.attn_q.weight.lora_a" in names
    before = contents(output)
    assert cli.main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert contents(output) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank=2"], "there is no --output"),
        (["--gguf", "--output={new}", "--report={new}.json"], "takes no --data and no --report"),
        (["--merged"], "there is no --output"),
        (["--rank=0", "--output={new}"], "rank must be an integer >= 1, got 0"),
        (["--ranks", "2", "0"], "rank must be an integer >= 1, got 0"),
        (["--ranks", "2", "--output={new}"], "--ranks saves no adapter"),
        (["--rank=2", "--output={new}", "--picture={new}.png"], "--picture draws the error of several ranks"),
        (["--ranks", "--picture={new}.jpg"], "must be a .png file"),
        (["--merged", "--output={new}", "--report={new}.json"], "takes no --data and no --report"),
        (["--rank=2", "--output={folder}/adapter"], "adapter is"),
        (["--rank=2", "--output={folder}/base/new", "--model={folder}/base"], "new lies in"),
        (["--ranks", "--report={folder}/forget.jsonl"], "would overwrite a file"),
        (["--ranks", "--data", "a={folder}/forget.jsonl", "--report={folder}/forget.jsonl"], "is read"),
        (["--ranks", "--data", "a={folder}/forget.jsonl", "a={folder}/retain.jsonl"], "have one name"),
        (["--ranks", "--batch-size=0"], "--batch-size must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(options, message, folder, tmp_path, capsys):
    before = contents(folder)
    new = tmp_path / "new"
    options = [option.format(new=new, folder=folder) for option in options]
    assert cli.main(["export", str(folder / "adapter"), *options]) == 2
    assert message in capsys.readouterr().err
    assert contents(folder) == before and list(tmp_path.iterdir()) == []


def test_a_model_and_other_adapters_are_refused(folder, tmp_path, capsys):
    output = f"--output={tmp_path / 'new'}"
    assert cli.main(["export", str(folder / "base"), "--rank=2", output]) == 2
    assert "is a model, not an adapter" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), "--rank=2", output]) == 2
    assert "neither the folder of an adapter nor the name of one" in capsys.readouterr().err
    for options, message in (({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "'pissa'")):
        base = AutoModelForCausalLM.from_pretrained(folder / "base").float()
        adapter = tmp_path / message.strip("'")
        get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, **options)).save_pretrained(adapter)
        assert cli.main(["export", str(adapter), "--rank=2", output]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_foreign_directory_is_refused_and_an_earlier_export_makes_way(folder, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("a user's")
    line = ["export", str(folder / "adapter"), f"--output={tmp_path}", "--rank"]
    assert cli.main([*line, "2"]) == 2
    assert "adapter_config.json, which is not a save of loku" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "notes.txt").write_text("a user's")
    for rank in ("2", "3"):
        assert cli.main([*line, rank]) == 0
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == int(rank)
    assert (tmp_path / "notes.txt").read_text() == "a user's"
    assert cli.main([*line, "50"]) == 0  # the exact one
    assert "it stays exact" in capsys.readouterr().err
    exact, saved = (on_base(folder, path) for path in (folder / "adapter", tmp_path))
    assert (logits(exact) - logits(saved)).abs().max() <= 0.02 * logits(exact).abs().max()  # bfloat16
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6 and config["rank_pattern"] == config["alpha_pattern"]
