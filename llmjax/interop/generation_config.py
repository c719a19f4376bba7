"""How a Hugging Face folder wants its model to generate: generation_config.json in the words of `llmjax.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmjax.config import ConfigError

# Our names of Transformers' fields, and what else it may ask for that changes the result; the value changes nothing.
NAMES = {"eos_id": "eos_token_id", "pad_id": "pad_token_id", "start_id": "decoder_start_token_id"}
ALWAYS = ("max_new_tokens", "repetition_penalty", "num_beams")
OF_BEAMS = ("length_penalty", "early_stopping")
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
MISSING = {
  "bad_words_ids": None,
  "begin_suppress_tokens": None,
  "constraints": None,
  "dola_layers": None,
  "encoder_no_repeat_ngram_size": 0,
  "encoder_repetition_penalty": 1.0,
  "exponential_decay_length_penalty": None,
  "force_words_ids": None,
  "forced_bos_token_id": None,
  "forced_eos_token_id": None,
  "guidance_scale": 1.0,
  "max_time": None,
  "min_length": 0,
  "min_new_tokens": 0,
  "no_repeat_ngram_size": 0,
  "penalty_alpha": 0.0,
  "sequence_bias": None,
  "stop_strings": None,
  "suppress_tokens": None,
  "token_healing": False,
  "watermarking_config": None,
}
MISSING_OF_BEAMS = {"diversity_penalty": 0.0, "num_beam_groups": 1, "renormalize_logits": False}
MISSING_OF_SAMPLING = {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "typical_p": 1.0}

# Of a config.json: the tokens that it names, and all that says how a model generates.
TOKENS = {"bos_token_id", *NAMES.values()}
FIELDS = {
  *(*TOKENS, *ALWAYS, *OF_BEAMS, *OF_SAMPLING, "do_sample", "max_length"),
  *(*MISSING, *MISSING_OF_BEAMS, *MISSING_OF_SAMPLING),
}


def read_settings(
  generation_config: Mapping[str, Any], config: Mapping[str, Any], *, prompt_length: int | None = None
) -> dict[str, Any]:
  """The keywords of `llmjax.generate` that a Hugging Face folder asks for, with the defaults of Transformers 5.

  Args:
    generation_config: generation_config.json; where there is none ({}), config.json speaks, as it did before that file.
    config: config.json, which also gives special tokens that the other file lacks.
    prompt_length: of a decoder, whose `max_length` counts the prompt; without it, `max_length` is left out. That of an
      encoder–decoder counts the token that its decoder begins with.
  Raises:
    ConfigError: it asks for something that changes the result and that `llmjax.generate` does not have.
  """
  inner: Mapping[str, Any] = next((config[k] for k in ("decoder", "generator", "text_config") if config.get(k)), {})
  fallback = _given({**inner, **_given(config)})
  given = _given(generation_config) or fallback
  given = {**{name: fallback[name] for name in (*NAMES.values(), "bos_token_id") if name in fallback}, **given}
  drawn, searched = given.get("do_sample") is True, given.get("num_beams", 1) > 1

  missing = MISSING | (MISSING_OF_BEAMS if searched else {}) | (MISSING_OF_SAMPLING if drawn else {})
  asked = [f"{k}={given[k]!r}" for k, neutral in missing.items() if k in given and given[k] not in (neutral, [], {})]
  if asked:
    raise ConfigError(
      f"generation_config.json asks for {', '.join(asked)}, which llmjax does not have; without it the text differs "
      "from Transformers': remove it from the file to accept that"
    )
  names = (*ALWAYS, *(OF_BEAMS if searched else ()), *(OF_SAMPLING if drawn else ()))
  settings = {name: given[name] for name in names if name in given}
  settings["temperature"] = settings.get("temperature", 1.0) if drawn else 0.0
  if drawn:
    settings["top_k"] = given.get("top_k", 50) or None  # 50 where nothing is said, and 0 turns it off
  separate = bool(config.get("is_encoder_decoder"))
  before = 1 if separate else prompt_length
  if "max_length" in given and before is not None:
    settings.setdefault("max_new_tokens", given["max_length"] - before)

  eos = given.get("eos_token_id")
  eos = tuple(eos) if isinstance(eos, list) else eos
  special = {
    "eos_id": eos,
    "pad_id": given.get("pad_token_id", eos[0] if isinstance(eos, tuple) else eos),
    "start_id": given.get("decoder_start_token_id", given.get("bos_token_id")) if separate else None,
  }
  return settings | _given(special)


def write_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The generation_config.json that asks for these keywords of `llmjax.generate`: the inverse of `read_settings`.

  A seed is left out.
  """
  drawn = settings.get("temperature", 0.0) > 0
  unused = ("seed", *(() if drawn else OF_SAMPLING), *(() if settings.get("num_beams", 1) > 1 else OF_BEAMS))
  used = {name: value for name, value in _given(settings).items() if name not in unused}
  fields = {NAMES.get(name, name): list(value) if isinstance(value, tuple) else value for name, value in used.items()}
  return {"do_sample": drawn, **({"top_k": 0} if drawn else {}), **fields}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in fields.items() if value is not None}
