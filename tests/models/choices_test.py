"""Names that the config declares without JAX against the functions that the model has for them."""

import pytest

from llmjax.config.model import ACTIVATIONS, ATTENTION_KERNELS, REMAT_POLICIES
from llmjax.models import layers
from llmjax.models.attention import select
from llmjax.models.remat import CHECKPOINT_POLICIES


@pytest.mark.parametrize(
  "names, registry",
  [(ACTIVATIONS, layers.ACTIVATIONS), (ATTENTION_KERNELS, select.KERNELS), (REMAT_POLICIES, CHECKPOINT_POLICIES)],
  ids=["activations", "kernels", "remat"],
)
def test_registry_has_exactly_the_names_of_the_config(names, registry):
  assert sorted(names) == sorted(registry)
