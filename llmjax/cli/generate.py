"""`llmjax generate`: a prompt from the command line, continued on standard output."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from llmjax.cli.commands import terminal_text
from llmjax.cli.startup import start_jax
from llmjax.config import ConfigError
from llmjax.distributed import processes

DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BEAM_SEARCH = ("num_beams", "length_penalty", "early_stopping")


def generate_command(arguments: argparse.Namespace, rest: list[str]) -> None:
  """Print the continuation of a prompt while it is generated."""
  if "" in arguments.stop:
    raise ConfigError("--stop is empty; give the text to end before, or leave it out")
  if arguments.system is not None and not arguments.chat:
    raise ConfigError("--system is for --chat; add that, or leave it out")
  start_jax(arguments)
  if arguments.prompt is None and processes.is_multi_process():
    raise ConfigError("several processes cannot share standard input; give --prompt")
  from llmjax.distributed import sharding
  from llmjax.inference.text import open_continuation

  sizes = arguments.mesh or ("data=-1" if processes.is_multi_process() else None)
  mesh = None if sizes is None else sharding.make_mesh(sharding.parse_mesh(sizes))
  continuation = open_continuation(arguments.model, settings_from_flags(arguments), mesh, trust=arguments.trust)
  prompt = read_prompt(arguments.prompt)
  if arguments.chat:
    ids = continuation.encode_chat(prompt, arguments.system)
  else:
    ids = continuation.encode(prompt)
  ids, count = continuation.fit_prompt(ids, arguments.max_new_tokens)
  sys.stdout.write("" if continuation.is_separate or arguments.chat else terminal_text(prompt))
  with contextlib.nullcontext() if mesh is None else sharding.use_mesh(mesh, continuation.rules):
    for text in continuation.stream(ids, count, tuple(arguments.stop)):
      sys.stdout.write(terminal_text(text))
      sys.stdout.flush()
  sys.stdout.write("\n")


def settings_from_flags(arguments: argparse.Namespace) -> dict[str, Any]:
  """Return the keywords of `generate` that the command line gives."""
  names = (*DRAWING, *BEAM_SEARCH, "seed")
  given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
  if "early_stopping" in given:
    given["early_stopping"] = {"true": True, "false": False}.get(given["early_stopping"], given["early_stopping"])
  return given


def read_prompt(given: str | None) -> str:
  """Return the prompt of the command line, or else standard input."""
  try:
    prompt = sys.stdin.read() if given is None else given
    prompt.encode()  # bytes of another encoding come in as lone surrogates
  except UnicodeError as error:
    raise ConfigError(f"the prompt is not UTF-8: {error}") from error
  return prompt
