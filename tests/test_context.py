"""How long a prompt may be: what the language model's configuration calls it, and what is done where it says nothing."""

import pytest
from conftest import GOLDENS, tiny_config
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig, OPTConfig
from typer.testing import CliRunner

from m3_serving.batch_engines import EngineSettings, GenerateEngine, answer_rows
from m3_serving.batch_input import Row
from m3_serving.demo.local_model import LocalModel
from modeling_m3 import M3LlavaConfig, default_checkpoint
from modeling_m3.__main__ import app


PICTURE = str(GOLDENS / "images" / "photo_400x266.png")


@pytest.mark.parametrize(
    ("text_config", "length"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (OPTConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=77), 77),
        (MptConfig(max_seq_len=77), 77),
        (BloomConfig(), None),  # whose positions are distances
    ],
)
def test_the_context_by_every_name_it_has(text_config, length):
    assert M3LlavaConfig(text_config=text_config).context_length == length


@pytest.mark.parametrize("value", [None, 0, -1, True, "many", 77.5])
def test_what_is_no_number_is_no_limit(value):
    config = tiny_config()
    object.__setattr__(config.text_config, "max_position_embeddings", value)
    assert config.context_length is None


def test_without_a_limit_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(M3LlavaConfig, "context_length", None)
    asked = CliRunner().invoke(app, [PICTURE, "What?", "--compare", "--quiet", "--max-new-tokens", "1"])
    assert asked.exit_code == 0, asked.output
    settings = EngineSettings(model=str(default_checkpoint()), engine="generate", max_new_tokens=1)
    engine = GenerateEngine(settings)
    [answered] = answer_rows(engine, settings, [Row("a", "What?", [PICTURE])], lambda done: None)
    assert answered.error is None and engine.context is None
    shown = LocalModel(device="cpu")
    shown.load(lambda words, share: None)
    assert "context of any length" in shown.facts
