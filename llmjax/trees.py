"""Parameter trees: flatten and join them, and match rules over parameter paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

from llmjax.config import ConfigError

PyTree: TypeAlias = Any  # any tree that JAX knows: arrays, shapes, shardings, or values at its leaves
Params: TypeAlias = Any  # a tree of parameters: nested dicts of arrays or of their shapes
FlatTree = dict[str, Any]  # {"a/b/c": leaf}


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> FlatTree:
  """{"a/b/c": leaf} of nested dicts, whatever the leaves are."""
  flat: FlatTree = {}
  for name, value in tree.items():
    flat |= flatten_tree(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
  return flat


def unflatten_tree(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def split_trainable(tree: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """(what learns, what is frozen) of a tree; `chosen` is the same tree of bools. None where nothing is frozen."""
  learns = flatten_tree(chosen)
  parts = [{path: leaf for path, leaf in flatten_tree(tree).items() if learns[path] is keep} for keep in (True, False)]
  return unflatten_tree(parts[0]), unflatten_tree(parts[1]) or None


def merge_trainable(learned: Mapping[str, Any], frozen: Mapping[str, Any] | None) -> Any:
  """The inverse of `split`."""
  return learned if frozen is None else unflatten_tree({**flatten_tree(learned), **flatten_tree(frozen)})


def select_leaves(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of a tree that are in another one."""
  wanted = flatten_tree(like)
  return unflatten_tree({path: leaf for path, leaf in flatten_tree(tree).items() if path in wanted})


def leaf_paths(tree: Any) -> Any:
  """The same tree with every leaf replaced by its path, such as "decoder/layers/attention/query/kernel"."""
  return jax.tree_util.tree_map_with_path(lambda p, _: jax.tree_util.keystr(p, simple=True, separator="/"), tree)


def match_rules(rules: Any, tree: Any, key: str) -> Any:
  """The value of every leaf by its path: the first rule wins, and every leaf must have one.

  Args:
    rules: ((regex, value), ...); a regex must match the whole path.
    tree: any tree; only its paths count.
    key: the config key of `rules`, for error messages.
  Raises:
    ConfigError: leaves without a rule, a regex that matches no path, something that is no regex or no rule.
  """
  names = leaf_paths(tree)
  flat = jax.tree.leaves(names)
  compiled = []
  for rule in rules:
    if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[0], str):
      raise ConfigError(f"{key}: {rule!r} is not a rule; a rule is (regex, value)")
    try:
      compiled.append((re.compile(rule[0]), rule[1]))
    except re.error as error:
      raise ConfigError(f"{key}: {rule[0]!r} is not a regular expression: {error}") from None
    if not any(compiled[-1][0].fullmatch(name) for name in flat):
      raise ConfigError(
        f"{key}: {rule[0]!r} matches no parameter (a regex must match a whole path, such as {flat[0]!r}); "
        "mend or remove it"
      )
  lost = [name for name in flat if not any(regex.fullmatch(name) for regex, _ in compiled)]
  if lost:
    shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    raise ConfigError(f"{key}: no rule matches {shown}; end with a rule for all the rest, ('.*', VALUE)")
  return jax.tree.map(lambda name: next(value for regex, value in compiled if regex.fullmatch(name)), names)
