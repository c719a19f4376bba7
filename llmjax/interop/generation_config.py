"""generation_config.json as arguments of `llmjax.generate`, and back."""

from __future__ import annotations

from llmjax.config import ConfigError, Json
from llmjax.interop.families.base import HfConfig

# {argument of llmjax.generate: field, if the names differ}
HF_NAMES = {"eos_id": "eos_token_id", "pad_id": "pad_token_id", "start_id": "decoder_start_token_id"}
ALWAYS = ("max_new_tokens", "repetition_penalty", "num_beams")
BEAM_FIELDS = ("length_penalty", "early_stopping")
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p")
# Fields of Transformers that llmjax does not have, with the value that changes nothing.
UNSUPPORTED = {
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
UNSUPPORTED_BEAM_FIELDS = {"diversity_penalty": 0.0, "num_beam_groups": 1, "renormalize_logits": False}
UNSUPPORTED_SAMPLING_FIELDS = {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "typical_p": 1.0}

TOKEN_FIELDS = {"bos_token_id", *HF_NAMES.values()}
GENERATION_FIELDS = {  # all fields of a config.json that say how a model generates
  *(*TOKEN_FIELDS, *ALWAYS, *BEAM_FIELDS, *SAMPLING_FIELDS, "do_sample", "max_length"),
  *(*UNSUPPORTED, *UNSUPPORTED_BEAM_FIELDS, *UNSUPPORTED_SAMPLING_FIELDS),
}


def read_generation_settings(
  generation_config: HfConfig, config: HfConfig, *, prompt_length: int | None = None
) -> dict[str, Json]:
  """Return the arguments of `llmjax.generate` that a Hugging Face folder asks for, with defaults of Transformers 5.

  Args:
    generation_config: content of generation_config.json; {}: the fields are those of config.json, as before that file
      existed.
    config: content of config.json, which also has special tokens that the other file lacks.
    prompt_length: tokens of the prompt of a decoder, which its `max_length` includes; None: ignore `max_length`. The
      `max_length` of an encoder-decoder includes the token that its decoder starts with.

  Raises:
    ConfigError: a field that changes the result and that `llmjax.generate` does not have.
  """
  nested: HfConfig = next((config[k] for k in ("decoder", "generator", "text_config") if config.get(k)), {})
  fallback = _without_none({**nested, **_without_none(config)})
  fields = _without_none(generation_config) or fallback
  fields = {**{name: fallback[name] for name in sorted(TOKEN_FIELDS) if name in fallback}, **fields}
  samples, has_beams = fields.get("do_sample") is True, fields.get("num_beams", 1) > 1
  _check_supported(fields, samples, has_beams)
  names = (*ALWAYS, *(BEAM_FIELDS if has_beams else ()), *(SAMPLING_FIELDS if samples else ()))
  settings = {name: fields[name] for name in names if name in fields}
  settings["temperature"] = settings.get("temperature", 1.0) if samples else 0.0
  if samples:
    settings["top_k"] = fields.get("top_k", 50) or None  # Transformers' default is 50, and 0 turns it off
  is_encoder_decoder = bool(config.get("is_encoder_decoder"))
  start_length = 1 if is_encoder_decoder else prompt_length
  if "max_length" in fields and start_length is not None:
    settings.setdefault("max_new_tokens", fields["max_length"] - start_length)
  eos = fields.get("eos_token_id")
  eos = tuple(eos) if isinstance(eos, list) else eos
  start = fields.get("decoder_start_token_id", fields.get("bos_token_id")) if is_encoder_decoder else None
  pad = fields.get("pad_token_id", eos[0] if isinstance(eos, tuple) else eos)
  return settings | _without_none({"eos_id": eos, "pad_id": pad, "start_id": start})


def _check_supported(fields: HfConfig, samples: bool, has_beams: bool) -> None:
  unsupported = {
    **UNSUPPORTED,
    **(UNSUPPORTED_BEAM_FIELDS if has_beams else {}),
    **(UNSUPPORTED_SAMPLING_FIELDS if samples else {}),
  }
  requested = [
    f"{name}={fields[name]!r}"
    for name, neutral in unsupported.items()
    if name in fields and fields[name] not in (neutral, [], {})
  ]
  if requested:
    raise ConfigError(
      f"generation_config.json: {', '.join(requested)} is not supported, and the text would differ from that of "
      "Transformers; remove it from the file to accept that"
    )


def write_generation_settings(settings: HfConfig) -> dict[str, Json]:
  """Return the generation_config.json for arguments of `llmjax.generate`, the inverse of `read_generation_settings`.

  A seed is dropped.
  """
  samples, has_beams = settings.get("temperature", 0.0) > 0, settings.get("num_beams", 1) > 1
  without_effect = ("seed", *(() if samples else SAMPLING_FIELDS), *(() if has_beams else BEAM_FIELDS))
  used = {name: value for name, value in _without_none(settings).items() if name not in without_effect}
  fields = {HF_NAMES.get(name, name): list(v) if isinstance(v, tuple) else v for name, v in used.items()}
  return {"do_sample": samples, **({"top_k": 0} if samples else {}), **fields}


def _without_none(fields: HfConfig) -> dict[str, Json]:
  return {name: value for name, value in fields.items() if value is not None}
