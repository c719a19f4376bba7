"""Model FLOPs and the peaks of devices."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from llmjax.config.model import TransformerConfig
from llmjax.models.transformer import Transformer
from llmjax.telemetry.flops import forward_flops, peak_flops
from llmjax.types import Batch, dummy_batch


def test_forward_flops_follow_the_palm_convention():
  """Per token: 6 x (parameters of matrix products) + 12 x layers x width x length, scanned or not."""
  for scan in (True, False):
    cfg = TransformerConfig(96, 32, 3, 4, 16, d_ff=80, tie_embeddings=False, scan=scan)
    model = Transformer(cfg)
    params = jax.eval_shape(lambda k, m=model: nn.unbox(m.init(k, dummy_batch()))["params"], jax.random.key(0))
    batch = Batch.from_tokens(np.zeros((2, 16), np.int32))
    flops = 3 * forward_flops(lambda p, b, m=model: m.apply({"params": p}, b).logits, params, batch)
    matmul = 3 * (4 * 32 * 32 + 2 * 32 * 80) + 32 * 96
    assert flops == 2 * 16 * (6 * matmul + 12 * 3 * 32 * 16)


@pytest.mark.parametrize(
  "kind, dtype, tflops",
  [
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5", "bfloat16", 459),
    ("TPU v5p", "bfloat16", 459),
    ("TPU v6 lite", "bfloat16", 918),
    ("TPU7x", "bfloat16", 1153.5),
    ("TPU v4", "float16", None),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA H200", "float16", 989.4),
    ("NVIDIA GH200 480GB", "bfloat16", 989.4),
    ("NVIDIA H20", "bfloat16", 148),
    ("NVIDIA GB200", "bfloat16", 2500),
    ("NVIDIA B200", "bfloat16", 2250),
    ("NVIDIA A10G", "bfloat16", 70),
    ("NVIDIA L4", "bfloat16", 121),
    ("NVIDIA L40S", "bfloat16", 362),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
    ("Tesla V100-SXM2-16GB", "bfloat16", None),
    ("NVIDIA H100 80GB HBM3", "float32", None),
    ("cpu", "bfloat16", None),
  ],
)
def test_peak_flops_of_device(kind, dtype, tflops):
  assert peak_flops(kind, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))
