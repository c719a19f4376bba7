"""Configuration: keys and defaults, config files, and building objects from configs. Imports no JAX."""

from llmjax.config.arguments import parse_arg, split_arg
from llmjax.config.defaults import default_config, optional
from llmjax.config.durations import duration_to_steps
from llmjax.config.errors import ALIASES, ConfigError, suggest_name
from llmjax.config.files import (
  add_config_roots,
  call_in_file,
  config_roots,
  find_config_file,
  load_config,
  shipped_configs,
  split_config_flag,
)
from llmjax.config.registry import build, resolve_callable
from llmjax.config.values import ConfigLike, ConfigTree, Json, config_differences, flatten_config, to_dict

__all__ = [
  "ALIASES",
  "ConfigError",
  "ConfigLike",
  "ConfigTree",
  "Json",
  "add_config_roots",
  "build",
  "call_in_file",
  "config_differences",
  "config_roots",
  "default_config",
  "duration_to_steps",
  "find_config_file",
  "flatten_config",
  "load_config",
  "optional",
  "parse_arg",
  "resolve_callable",
  "shipped_configs",
  "split_arg",
  "split_config_flag",
  "suggest_name",
  "to_dict",
]
