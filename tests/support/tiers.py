"""Tiers of the values of a parametrized test."""

import pytest


def by_tier(values, fast=(), slow=..., part="families"):
  """Return `values` for `pytest.mark.parametrize`: `fast` unmarked, `slow` slow, the others full.

  Args:
    values: All values, in the order of the tests.
    fast: Values of the tier fast.
    slow: Further values of the tier default; by default all that are not in `fast`.
    part: Part of the tier full that the others belong to.
  """
  values = list(values)
  unknown = [v for v in (*fast, *(() if slow is ... else slow)) if v not in values]
  if unknown:
    raise ValueError(f"{unknown} are not among the values {values}")

  def mark(value):
    if value in fast:
      return value
    return pytest.param(value, marks=pytest.mark.slow if slow is ... or value in slow else pytest.mark.full(part))

  return [mark(value) for value in values]
