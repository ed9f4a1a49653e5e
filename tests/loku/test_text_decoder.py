"""Multimodal models on rows of text: the decoder is unlearned, and the towers stay as they were."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    Qwen2VLConfig,
)

import loku
from loku import UnlearnConfig
from loku.decoder_layers import decoder_layers
from loku.models import load_model
from loku.text_decoder import directly_read, text_modules

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

TEXT = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
TOWER = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def multimodal(kind):
    """A tiny random model, and the name of the part that reads text."""
    if kind == "gemma3":
        config = Gemma3Config(
            text_config=TEXT,
            vision_config=TOWER,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        )
        return AutoModelForCausalLM.from_config(config)
    if kind == "llava":
        vision = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
        config = LlavaConfig(
            text_config={**TEXT, "model_type": "llama"}, vision_config=vision, image_token_index=60
        )
    else:
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
        tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config = Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config=vision,
            **dict(zip(tokens, range(60, 64), strict=True)),
        )
    return AutoModelForImageTextToText.from_config(config)


def token_rows(count):
    return [{"input_ids": torch.randint(3, 50, (6 + n,)).tolist()} for n in range(count)]


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_vl"])
@pytest.mark.filterwarnings("ignore")
def test_multimodal_models_are_unlearned_in_their_text_decoder(kind, tmp_path):
    base = multimodal(kind)
    path = tmp_path / "base"
    base.save_pretrained(path)
    forget, retain = token_rows(4), token_rows(4)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "lora_rank": 2, "disable_tqdm": True}
    config = UnlearnConfig(str(tmp_path / "run"), learning_rate=1e-1, **options)
    result = loku.unlearn(str(path), forget, retain, config=config)
    assert type(result.model.get_base_model()) is type(base)
    trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 5 and all("model.language_model.layers." in name for name in trained)

    result.save(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    ids = torch.tensor([forget[0]["input_ids"]])
    with torch.no_grad():
        before, after = base.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits
        expected = result.model.eval()(input_ids=ids).logits
    assert (after - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (after - before).abs().max() > 1e-2 * before.abs().max()


def test_modules_of_text():
    model = multimodal("gemma3")
    names = text_modules(model).keys()
    assert all(name.startswith("model.language_model.") for name in names)
    assert "model.language_model.layers.0.self_attn.q_proj" in names and "lm_head" not in names


def test_an_encoder_decoder_by_its_path_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a t5 model, which is an encoder-decoder"):
        load_model(tmp_path)


def test_weights_that_a_forward_reads_without_a_call():
    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read, self.typed = (torch.nn.Linear(2, 2) for _ in range(3))
            self.called.weight.data.zero_()

        def forward(self, x):
            return self.called(x.to(self.typed.weight.dtype)) @ self.read.weight

    assert directly_read(torch.nn.ModuleDict({"mixer": Mixer()})) == {"mixer.read"}


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_vl"])
def test_layers_of_a_multimodal_model_are_those_that_read_text(kind):
    model = multimodal(kind)
    layers = decoder_layers(model)
    assert len(layers) == 2 and all(".language_model.layers." in f".{name}" for name in layers)
