"""Which tensor of a Hugging Face folder holds which parameters of a model, for each of its layers and experts."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import Family, TensorNames
from llmjax.interop.tensors import Shape, TensorPattern, parse_pattern
from llmjax.models.layer_stacks import layer_locations
from llmjax.trees import Params, flatten_tree

NUM_LAYERS = {"encoder": "encoder_layers", "decoder": "decoder_layers"}


class ParameterSlice(NamedTuple):
  """A parameter of the unrolled layout, as a part of the model's own layout.

  Attributes:
    leaf: path of the leaf that it is in, which is scanned over layers in the scanned layout.
    layer: index along the leaf's first axis, None if the leaf has no such axis.
    shape: its shape.
  """

  leaf: str
  layer: int | None
  shape: Shape


class TensorEntry(NamedTuple):
  """A tensor of a folder, and the parameters that it holds.

  Attributes:
    name: of the tensor.
    paths: unrolled paths of its parameters.
    patterns: one for each parameter.
    expert: index along the parameters' first axis; None if the tensor holds whole parameters.
  """

  name: str
  paths: tuple[str, ...]
  patterns: tuple[TensorPattern, ...]
  expert: int | None

  def part_shape(self, shape: Shape) -> Shape:
    """Return the shape of a parameter's part in this tensor: without the axis of experts, if it holds one expert."""
    return shape if self.expert is None else shape[1:]


def unrolled_parameters(cfg: TransformerConfig, params: Params) -> dict[str, ParameterSlice]:
  """Return {unrolled path: its location in `params`}.

  Args:
    params: parameters of the model in its own layout, or their shapes.
  """
  leaves = flatten_tree(params)
  if not cfg.scan:
    return {path: ParameterSlice(path, None, tuple(leaf.shape)) for path, leaf in leaves.items()}
  parameters, layered = {}, set()
  for stack, field in NUM_LAYERS.items():
    for i, (location, layer) in enumerate(layer_locations(cfg, getattr(cfg, field))):
      prefix = "/".join((stack, *location)) + "/"
      for path, leaf in leaves.items():
        if path.startswith(prefix):
          shape = tuple(leaf.shape) if layer is None else tuple(leaf.shape[1:])
          parameters[f"{stack}/layers_{i}/{path.removeprefix(prefix)}"] = ParameterSlice(path, layer, shape)
          layered.add(path)
  others = {path: leaf for path, leaf in leaves.items() if path not in layered}
  return parameters | {path: ParameterSlice(path, None, tuple(leaf.shape)) for path, leaf in others.items()}


def list_tensors(
  family: Family, architecture: str, cfg: TransformerConfig, paths: Container[str] | None
) -> list[TensorEntry]:
  """Return the tensors of a model.

  Args:
    paths: unrolled paths of its parameters; None: all that the family can have.
  """
  head = family.heads[architecture]
  is_base_model = architecture.endswith("Model") and not head.tensors
  prefix = "" if is_base_model else family.prefix if head.prefix is None else head.prefix
  in_head = {path for parts in head.tensors.values() for path, _ in parts}  # a head may name the pooler otherwise
  body = {name: parts for name, parts in family.body_tensors(cfg).items() if parts[0][0] not in in_head}
  names = {**{prefix + name: parts for name, parts in body.items()}, **head.tensors}
  return [entry for entry in _expand_names(names, cfg) if paths is None or all(path in paths for path in entry.paths)]


def _expand_names(names: TensorNames, cfg: TransformerConfig) -> Iterator[TensorEntry]:
  """Yield an entry for every layer {i} and every expert {e}."""
  for name, parts in names.items():
    patterns = tuple(parse_pattern(pattern) for _, pattern in parts)
    stack = parts[0][0].split("/")[0]
    for i in range(getattr(cfg, NUM_LAYERS[stack]) if "{i}" in name else 1):
      paths = tuple(path.replace("{i}", str(i)) for path, _ in parts)
      experts: Sequence[int | None] = range(cfg.num_experts) if "{e}" in name else [None]
      for expert in experts:
        yield TensorEntry(name.replace("{i}", str(i)).replace("{e}", str(expert)), paths, patterns, expert)
