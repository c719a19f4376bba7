"""Parameter trees: flatten and join nested dicts, split off what is frozen, and match rules over parameter paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax

from llmjax.config import ConfigError

PyTree: TypeAlias = Any  # any tree that JAX knows: of arrays, shapes, shardings, or values
Params: TypeAlias = Any  # nested dicts with parameters, or their shapes, at the leaves
KeyPath: TypeAlias = tuple[Any, ...]  # as jax.tree_util.tree_map_with_path gives it
FlatTree = dict[str, PyTree]  # {"a/b/c": leaf}


def flatten_tree(tree: Mapping[str, PyTree], prefix: str = "") -> FlatTree:
  """Return {"a/b/c": leaf} of nested dicts. Whatever is not a dict is a leaf."""
  flat: FlatTree = {}
  for name, value in tree.items():
    flat |= flatten_tree(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
  return flat


def unflatten_tree(flat: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Return the nested dicts that `flatten_tree` was given."""
  tree: dict[str, PyTree] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def split_trainable(
  tree: Mapping[str, PyTree], trainable: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, PyTree] | None]:
  """Split a tree into (trainable, frozen), which together have every leaf once.

  Args:
    trainable: the same tree of bools.

  Returns:
    The two trees; the second is None if nothing is frozen.
  """
  is_trainable = flatten_tree(trainable)
  trained = {path: leaf for path, leaf in flatten_tree(tree).items() if is_trainable[path]}
  frozen = {path: leaf for path, leaf in flatten_tree(tree).items() if not is_trainable[path]}
  return unflatten_tree(trained), unflatten_tree(frozen) or None


def merge_trainable(trained: Mapping[str, PyTree], frozen: Mapping[str, PyTree] | None) -> Params:
  """Return the tree that `split_trainable` was given."""
  return trained if frozen is None else unflatten_tree({**flatten_tree(trained), **flatten_tree(frozen)})


def select_leaves(tree: Mapping[str, PyTree], like: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Return the leaves of a tree whose paths are in `like`."""
  wanted = flatten_tree(like)
  return unflatten_tree({path: leaf for path, leaf in flatten_tree(tree).items() if path in wanted})


def path_string(path: KeyPath) -> str:
  """Return a path of JAX as "decoder/layers/attention/query/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_paths(tree: PyTree) -> PyTree:
  """Return the same tree with every leaf replaced by its path, such as "decoder/layers/attention/query/kernel"."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path_string(path), tree)


def match_rules(rules: Sequence[tuple[str, object]], tree: PyTree, key: str) -> PyTree:
  """Return the value of every leaf by the first rule that matches its path.

  Args:
    rules: ((regex, value), ...); a regex must match a whole path.
    tree: any tree; only its paths matter.
    key: config key of `rules`, for messages.

  Raises:
    ConfigError: a leaf without a rule, a regex that matches no path, or something that is not a rule.
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
        "fix or remove it"
      )
  unmatched = [name for name in flat if not any(regex.fullmatch(name) for regex, _ in compiled)]
  if unmatched:
    shown = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
    raise ConfigError(f"{key}: no rule matches {shown}; end with a rule for all others, ('.*', VALUE)")
  return jax.tree.map(lambda name: next(value for regex, value in compiled if regex.fullmatch(name)), names)
