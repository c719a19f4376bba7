"""Configs as plain data: conversion, flat keys, differences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict, FieldReference

Json: TypeAlias = Any  # what JSON can hold
ConfigLike: TypeAlias = Any  # a ConfigDict, a part of one, or the same as plain data
ConfigTree: TypeAlias = dict[str, Any]  # a config, or a part of one, as plain data


def to_dict(spec: ConfigLike) -> Json:
  """Return a config as plain containers with references resolved; lists become tuples."""
  if isinstance(spec, FieldReference):
    spec = spec.get()
  if isinstance(spec, (ConfigDict, Mapping)):
    return {str(k): to_dict(v) for k, v in spec.items()}
  if isinstance(spec, (list, tuple)):
    return tuple(to_dict(v) for v in spec)
  return spec


def flatten_config(spec: ConfigLike, prefix: str = "") -> ConfigTree:
  """Return {"a": {"b": 1}} as {"a.b": 1}; empty dicts stay as leaves."""
  flat: ConfigTree = {}
  for key, value in to_dict(spec).items():
    if isinstance(value, dict) and value:
      flat.update(flatten_config(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def config_differences(old: ConfigLike, new: ConfigLike) -> dict[str, tuple[Json, Json]]:
  """Return {key: (old, new)} of two configs, compared as JSON does (tuples equal lists)."""

  def as_json(value: Json) -> Json:
    return json.loads(json.dumps(value, default=str))

  old, new = flatten_config(old), flatten_config(new)
  keys = [key for key in {**old, **new} if as_json(old.get(key)) != as_json(new.get(key))]
  return {key: (old.get(key), new.get(key)) for key in keys}
