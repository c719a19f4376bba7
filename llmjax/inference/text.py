"""Continuation of a prompt as text: settings, chat template, context length, and text that arrives in pieces."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmjax.checkpoints.paths import open_path
from llmjax.checkpoints.sources.base import Pretrained
from llmjax.config import ConfigError, ConfigTree, Json
from llmjax.config.mesh import RULES, Rules
from llmjax.data.tokenizers import chat
from llmjax.distributed import processes
from llmjax.inference.beam_search import make_beam_settings
from llmjax.inference.generation import encode_prompt, end_token_ids, generate, stop_before, stream_tokens
from llmjax.inference.sampling import make_sampling
from llmjax.interop.generation_config import read_generation_settings
from llmjax.objectives.sft import answer_end_ids

DEFAULT_NEW_TOKENS = 200  # if neither the command line nor the checkpoint sets a number
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BEAM_SETTINGS = ("num_beams", "length_penalty", "early_stopping")


def open_continuation(
  path: str | Path, overrides: Mapping[str, Any], mesh: Mesh | None = None, *, trust: bool = False
) -> Continuation:
  """Load a model to continue prompts with.

  Args:
    path: see `open_path`.
    overrides: keywords of `generate` that replace those of the model's generation config.
    mesh: devices that share the parameters, None: the first device.
    trust: allow the checkpoint to run code outside llmjax.

  Raises:
    ConfigError: no such model, no tokenizer, or settings that contradict each other.
  """
  with open_path(path) as source:
    processes.preflight(lambda: {"model": processes.short_digest(source.manifest)})
    settings = generation_settings(source.manifest, overrides, str(path))
    source.tokenizer(trust)  # raises if there is none, before the parameters are read
    rules = {**RULES, **source.config["rules"]}
    pretrained = source.load(trust, mesh, rules)
    objective = source.config["objective"] or {}
  return Continuation(pretrained, settings, objective, rules)


def generation_settings(manifest: Mapping[str, Json], overrides: Mapping[str, Any], path: str) -> dict[str, Any]:
  """Return keywords of `generate`: `overrides`, else the model's generation config, else temperature 0.8."""
  own = manifest.get("generation") or {}
  model = manifest["model"]
  is_encoder_decoder = bool(model.get("encoder_layers") and model.get("decoder_layers"))
  try:
    settings = read_generation_settings(own, {"is_encoder_decoder": is_encoder_decoder}) if own else {}
  except (TypeError, LookupError) as error:
    raise ConfigError(f"{path}: a field of its generation_config.json has the wrong type: {error}") from error
  if "do_sample" not in own and settings.get("num_beams", 1) == 1:
    settings["temperature"] = 0.8
  given = dict(overrides)
  if given.get("num_beams", 1) > 1:
    given = {"temperature": 0.0} | given
  elif "temperature" in given:
    given = {"num_beams": 1} | given
  settings |= given
  # These two calls only check the settings.
  make_sampling(**{key: settings[key] for key in SAMPLING_SETTINGS if key in settings})
  make_beam_settings(**{"num_beams": 1} | {key: settings[key] for key in BEAM_SETTINGS if key in settings})
  return settings


@dataclasses.dataclass
class Continuation:
  """A model, its tokenizer, and how it continues prompts.

  Attributes:
    pretrained: model, parameters and tokenizer.
    settings: keywords of `generate`.
    objective: config of the objective that the model was trained on; empty if unknown.
    rules: sharding rules of the model.
  """

  pretrained: Pretrained
  settings: dict[str, Any]
  objective: ConfigTree
  rules: Rules

  @property
  def is_separate(self) -> bool:
    """Whether the decoder writes a text of its own, which does not continue the prompt (encoder-decoders)."""
    return bool(self.pretrained.model.cfg.stacks == "both")

  def encode(self, prompt: str) -> np.ndarray:
    """Return the ids of a prompt, Int[L]."""
    return encode_prompt(self.pretrained.model, self.pretrained.tokenizer, prompt)

  def encode_chat(self, prompt: str, system: str | None) -> np.ndarray:
    """Return the ids of a user's message in the chat template, Int[L], and end generation where its answers end.

    Args:
      prompt: the user's message.
      system: the system message, None: that of training.
    """
    tokenizer, objective = self.pretrained.tokenizer, self.objective
    system = objective.get("system") if system is None else system
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    # Only a model that was trained here may know the default template.
    choose = chat.template_or_default if objective.get("name") == "sft" else chat.choose_template
    template = choose(tokenizer.chat_templates, objective.get("template"))
    ends = (*end_token_ids(self.settings.get("eos_id")), *answer_end_ids(tokenizer, template))
    self.settings["eos_id"] = tuple(dict.fromkeys(ends))
    ids: np.ndarray = tokenizer.chat(messages, add_generation_prompt=True, template=template)
    return ids

  def fit_prompt(self, ids: np.ndarray, max_new_tokens: int | None) -> tuple[np.ndarray, int]:
    """Return the prompt and the number of new tokens that fit into the context, see `fit_prompt`."""
    usual = self.settings.pop("max_new_tokens", DEFAULT_NEW_TOKENS)
    return fit_prompt(ids, self.pretrained.model.cfg.max_len, max_new_tokens, self.is_separate, usual)

  def stream(self, ids: np.ndarray, count: int, stops: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the text of up to `count` new tokens while they are generated, until one of `stops`."""
    return stop_before(self._pieces(ids, count), stops)

  def _pieces(self, ids: np.ndarray, count: int) -> Iterator[str]:
    """Yield the text of each new token; with beam search, of all of them at the end."""
    model, params, tokenizer = self.pretrained
    settings = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "start_id": tokenizer.pad_id} | self.settings
    ends = end_token_ids(settings.pop("eos_id"))
    text = tokenizer.stream(special=self.is_separate)  # T5's sentinel tokens name the span that follows
    if settings.get("num_beams", 1) > 1:
      generated = generate(model, params, ids[None], max_new_tokens=count, eos_id=ends, **settings)
      tokens = iter(generated[:, -count:].T)
    else:
      for key in (*BEAM_SETTINGS, "pad_id"):
        settings.pop(key, None)
      tokens = stream_tokens(model, params, ids[None], max_new_tokens=count, **settings)
    for token in tokens:
      if int(token[0]) in ends:
        break
      yield text.push(int(token[0]))
    yield text.finish()


def fit_prompt(
  ids: np.ndarray,
  context: int,
  max_new_tokens: int | None,
  is_separate: bool = False,
  usual: int = DEFAULT_NEW_TOKENS,
) -> tuple[np.ndarray, int]:
  """Return the prompt and the number of new tokens that fit into a context; warns if the prompt is truncated.

  Args:
    ids: Int[L]; a prompt that is too long loses its beginning.
    context: tokens that the model can process.
    max_new_tokens: None: at most `usual`, while the prompt may fill at least half of the context.
    is_separate: whether an encoder has a context of its own for the prompt.
    usual: new tokens if `max_new_tokens` is None.

  Raises:
    ConfigError: an empty prompt, or a number of new tokens that does not fit.
  """
  if len(ids) == 0:
    raise ConfigError("the prompt is empty, and the model has no token that begins a text; give a prompt")
  if max_new_tokens is not None and not 1 <= max_new_tokens < context:
    reason = "must be at least 1" if max_new_tokens < 1 else f"leaves no room in a context of {context}"
    raise ConfigError(f"--max_new_tokens={max_new_tokens} {reason}")
  room = max(context - usual, (context + 1) // 2) if max_new_tokens is None else context - max_new_tokens
  room = context if is_separate else room
  if len(ids) > room:
    print(f"llmjax: the prompt has {len(ids)} tokens; only its last {room} are read", file=sys.stderr)
    ids = ids[-room:]
  remaining = context - (1 if is_separate else len(ids))
  return ids, min(usual, remaining) if max_new_tokens is None else max_new_tokens
