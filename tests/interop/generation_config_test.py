"""Generation settings of Transformers, read and written."""

import pytest

from llmjax.config import ConfigError
from llmjax.interop.generation_config import read_generation_settings, write_generation_settings

T5 = {"is_encoder_decoder": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize(
  "generation_config, config, settings",
  [
    ({}, {}, {"temperature": 0.0}),
    ({}, {"eos_token_id": 5, "temperature": 0.7}, {"temperature": 0.0, "eos_id": 5, "pad_id": 5}),
    ({}, T5, {"temperature": 0.0, "eos_id": 1, "pad_id": 0, "start_id": 0}),
    (
      {"max_length": 21, "num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
      T5,
      {
        **{"temperature": 0.0, "eos_id": 1, "pad_id": 0, "start_id": 0, "max_new_tokens": 20},
        **{"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
      },
    ),
    (
      {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": [7, 9]},
      {"eos_token_id": 7, "pad_token_id": None},
      {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "eos_id": (7, 9), "pad_id": 7},
    ),
    ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {}, {"temperature": 1.0, "top_k": None, "min_p": 0.1}),
    ({"do_sample": False, "top_p": 0.9, "typical_p": 0.5, "length_penalty": 2.0}, {}, {"temperature": 0.0}),
    ({"bos_token_id": 1}, {"num_beams": 4}, {"temperature": 0.0}),
    ({}, {"text_config": {"eos_token_id": 3, "pad_token_id": 4}}, {"temperature": 0.0, "eos_id": 3, "pad_id": 4}),
  ],
)
def test_generation_config_is_read_and_written_as_transformers(generation_config, config, settings):
  assert read_generation_settings(generation_config, config) == settings
  separate = {"is_encoder_decoder": "start_id" in settings}
  assert read_generation_settings(write_generation_settings({**settings, "seed": 3}), separate) == settings


def test_max_length_of_a_decoder_includes_its_prompt():
  assert read_generation_settings({"max_length": 50}, {}, prompt_length=30)["max_new_tokens"] == 20
  both = {"max_length": 50, "max_new_tokens": 7}
  assert read_generation_settings(both, {}, prompt_length=30)["max_new_tokens"] == 7


def test_unsupported_generation_settings_are_named():
  neutral = {"no_repeat_ngram_size": 0, "suppress_tokens": [], "typical_p": 1.0, "forced_bos_token_id": None}
  assert read_generation_settings(neutral, {}) == {"temperature": 0.0}
  with pytest.raises(ConfigError, match="forced_bos_token_id=0, no_repeat_ngram_size=3"):
    read_generation_settings({"no_repeat_ngram_size": 3, "forced_bos_token_id": 0}, {})
  with pytest.raises(ConfigError, match=r"typical_p=0\.5"):
    read_generation_settings({"do_sample": True, "typical_p": 0.5}, {})
  with pytest.raises(ConfigError, match="num_beam_groups=2"):
    read_generation_settings({"num_beams": 4, "num_beam_groups": 2}, {})
