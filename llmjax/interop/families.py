"""The families that there are."""

from __future__ import annotations

from collections.abc import Mapping

from llmjax.config import ConfigError, suggest_name
from llmjax.interop import bert, gemma, gpt2, gpt_neox, llama, mixtral, modernbert, opt, phi3, t5
from llmjax.interop.family import Config, Family

FAMILIES: Mapping[str, Family] = {
  family.model_type: family
  for family in (
    *(
      gpt2.GPT2,
      opt.OPT,
      gpt_neox.GPT_NEOX,
      llama.LLAMA,
      llama.MISTRAL,
      mixtral.MIXTRAL,
      llama.QWEN2,
      mixtral.QWEN2_MOE,
    ),
    *(llama.QWEN3, mixtral.QWEN3_MOE, gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, phi3.PHI3),
    *(bert.BERT, bert.ROBERTA, bert.DISTILBERT, modernbert.MODERNBERT, t5.T5),
  )
}


def find(config: Config, where: str) -> tuple[Family, str]:
  """The family of a config.json, and its architecture.

  Raises:
    ConfigError: one that is not known, with the nearest known.
  """
  name = str(config.get("model_type"))
  if name not in FAMILIES:
    raise ConfigError(f"{where}: model_type={name!r} is not supported; {suggest_name(name, FAMILIES)}")
  family, said = FAMILIES[name], config.get("architectures") or [next(iter(FAMILIES[name].heads))]
  architecture = said[0] if isinstance(said, list) else said
  if architecture not in family.heads:
    raise ConfigError(
      f"{where}: architecture {architecture!r} is not supported; {suggest_name(str(architecture), family.heads)}"
    )
  return family, architecture
