"""All families, by their model_type, and the family of a config.json."""

from __future__ import annotations

from collections.abc import Mapping

from llmjax.config import ConfigError, suggest_name
from llmjax.interop.families.base import Family, HfConfig
from llmjax.interop.families.bert import BERT, DISTILBERT, ROBERTA
from llmjax.interop.families.gemma import GEMMA, GEMMA2, GEMMA3
from llmjax.interop.families.gpt2 import GPT2
from llmjax.interop.families.gpt_neox import GPT_NEOX
from llmjax.interop.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from llmjax.interop.families.mixtral import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from llmjax.interop.families.modernbert import MODERNBERT
from llmjax.interop.families.opt import OPT
from llmjax.interop.families.phi3 import PHI3
from llmjax.interop.families.t5 import T5

# In the order in which an export tries them, if the family of a model is not known.
FAMILIES: Mapping[str, Family] = {
  family.model_type: family
  for family in (
    *(GPT2, OPT, GPT_NEOX),
    *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE),
    *(GEMMA, GEMMA2, GEMMA3, PHI3),
    *(BERT, ROBERTA, DISTILBERT, MODERNBERT),
    T5,
  )
}


def find_family(config: HfConfig, path: str) -> tuple[Family, str]:
  """Return the family and the architecture of a config.json.

  Args:
    path: the file, for messages.

  Raises:
    ConfigError: an unknown family or architecture, with the nearest known one.
  """
  model_type = str(config.get("model_type"))
  if model_type not in FAMILIES:
    raise ConfigError(f"{path}: model_type={model_type!r} is not supported; {suggest_name(model_type, FAMILIES)}")
  family = FAMILIES[model_type]
  declared = config.get("architectures") or [next(iter(family.heads))]
  architecture = declared[0] if isinstance(declared, list) else declared
  if architecture not in family.heads:
    raise ConfigError(
      f"{path}: architecture {architecture!r} is not supported; {suggest_name(str(architecture), family.heads)}"
    )
  return family, architecture
