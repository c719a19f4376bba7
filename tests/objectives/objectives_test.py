"""All objectives: invalid settings, windows, accuracies; prefix language modelling; weighted sums."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data import packing
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.examples import Window
from llmjax.objectives.causal_lm import CausalLM
from llmjax.objectives.contrastive import Contrastive
from llmjax.objectives.masked_lm import MaskedLM
from llmjax.objectives.prefix_lm import PrefixLM
from llmjax.objectives.span_corruption import SpanCorruption
from llmjax.objectives.weighted_sum import weighted_sum
from llmjax.training.components import check_model_fits_objective
from llmjax.types import Outputs
from tests.support.cases import BERT, CASES, GPT, MODERNBERT, T5, TOKENIZER, make_batch, texts
from tests.support.examples import Lookup, example_of, letters

T5_TOKENIZER = make_tokenizer({"name": "bytes", "sentinels": 100})
PLAIN = make_tokenizer({"name": "bytes"})
BARE = make_tokenizer({"name": "bytes", "special": False, "mask": True, "sentinels": 9})


def test_windows_contain_every_token_once_and_fit():
  ids = TOKENIZER.frame(letters(1000))
  pairs = MaskedLM(TOKENIZER, sentence_pairs="next")  # letters without sentence ends are cut anywhere
  for objective, room in ((MaskedLM(TOKENIZER), 62), (pairs, 61)):
    windows = objective.split_ids(ids, 64)
    np.testing.assert_array_equal(np.concatenate(windows), ids[1:-1])
    assert max(map(len, windows)) == room
  windows = SpanCorruption(TOKENIZER).split_ids(ids, 64)
  np.testing.assert_array_equal(np.concatenate(windows), ids[1:-1])


def test_prefix_lm_prefixes_are_uniform_and_the_rest_has_weights():
  objective, ids = PrefixLM(TOKENIZER), letters(11)
  lengths = []
  for seed in range(2000):
    example = example_of(objective, ids, seed)
    prefix, weight = example.inputs.prefix, example.weights["nll"]
    length = int(np.sum(prefix))
    np.testing.assert_array_equal(prefix, np.arange(10) < length)
    np.testing.assert_array_equal(
      weight, np.arange(10) >= length - 1
    )  # the last token of the prefix predicts the first one after it
    np.testing.assert_array_equal(example.labels["nll"], ids[1:])
    lengths.append(length)
  assert set(lengths) == set(range(1, 11)) and abs(np.mean(lengths) - 5.5) < 5 * 2.87 / np.sqrt(2000)


def check_fit(objective, cfg, name, seq_len):
  check_model_fits_objective(objective, cfg, {"objective": {"name": name}, "seq_len": seq_len})


@pytest.mark.parametrize(
  "make, words",
  [
    (lambda: MaskedLM(PLAIN), ["mask token", "data.tokenizer.mask=True"]),
    (lambda: MaskedLM(TOKENIZER, rate=0.0), ["objective.rate: ", "got 0.0"]),
    (lambda: MaskedLM(TOKENIZER, masked=0.9, replaced=0.2), ["objective.masked, objective.replaced", "0.9 and 0.2"]),
    (lambda: MaskedLM(TOKENIZER, sentence_pairs="nxt"), ["objective.sentence_pairs: ", "'nxt'", "`next`"]),
    (lambda: MaskedLM(BARE, sentence_pairs="next"), ["bos, eos", "sentence_pairs='none'"]),
    (lambda: MaskedLM(TOKENIZER).split_ids(letters(9), 3), ["seq_len: ", "got 3"]),
    (lambda: SpanCorruption(PLAIN), ["sentinel", "data.tokenizer.sentinels=100"]),
    (lambda: SpanCorruption(TOKENIZER, noise_density=1.0), ["objective.noise_density: ", "got 1.0"]),
    (lambda: SpanCorruption(TOKENIZER, mean_span=0.5), ["objective.mean_span: ", "got 0.5"]),
    (lambda: SpanCorruption(TOKENIZER).row_lengths(512), ["28 spans", "9 sentinels", "data.tokenizer.sentinels"]),
    (lambda: SpanCorruption(TOKENIZER).row_lengths(2), ["seq_len: ", "too short", "got 2"]),
    (lambda: Contrastive(TOKENIZER, 8, temperature=0.0), ["objective.temperature: ", "got 0.0"]),
    (lambda: Contrastive(TOKENIZER, 8, pooling="avg"), ["objective.pooling: ", "'avg'", "mean"]),
    (lambda: weighted_sum({}, "a", TOKENIZER, 8), ["objective.parts: must not be empty"]),
    (lambda: weighted_sum({"a": {"name": "causal_lm"}}, "a", TOKENIZER, 8), ["objective.parts.a.weight: ", "got None"]),
    (
      lambda: weighted_sum({"a": {"name": "causal", "weight": 1.0}}, "a", TOKENIZER, 8),
      ["objective.parts.a", "causal_lm"],
    ),
    (
      lambda: check_fit(CausalLM(), BERT, "causal_lm", 32),
      ["decoder_layers only", "encoder_layers only"],
    ),
    (
      lambda: check_fit(MaskedLM(TOKENIZER), GPT, "masked_lm", 32),
      ["encoder_layers only", "decoder_layers only"],
    ),
    (
      lambda: check_fit(SpanCorruption(TOKENIZER), GPT, "span_corruption", 32),
      ["both kinds of layers"],
    ),
    (
      lambda: check_fit(Contrastive(TOKENIZER, 8), T5, "contrastive", 8),
      ["objective.name='contrastive'"],
    ),
    (
      lambda: check_fit(Contrastive(TOKENIZER, 8, pooling="cls"), GPT, "contrastive", 8),
      ["encoder_layers only"],
    ),
    (
      lambda: check_fit(Contrastive(TOKENIZER, 8, pooling="pooler"), MODERNBERT, "c", 8),
      ["model.pooler=True", "False"],
    ),
    (
      lambda: check_fit(Contrastive(TOKENIZER, 8), BERT, "contrastive", 8),
      ["objective.positive: ", "model.dropout=0.1"],
    ),
    (
      lambda: check_fit(PrefixLM(TOKENIZER), GPT, "prefix_lm", 8),
      ["model.bidirectional_prompt=True", "got False"],
    ),
    (
      lambda: check_fit(MaskedLM(TOKENIZER), BERT, "masked_lm", 65),
      ["seq_len=65", "model.max_len=64"],
    ),
    (
      lambda: check_fit(SpanCorruption(T5_TOKENIZER, noise_density=0.6), T5, "span_corruption", 64),
      ["targets", "model.max_len=64"],
    ),
    (lambda: Contrastive(TOKENIZER, 2), ["seq_len: ", "no room", "got 2"]),
    (lambda: MaskedLM(TOKENIZER, sentence_weight=-1.0), ["objective.sentence_weight: ", "got -1.0"]),
    (
      lambda: weighted_sum(
        {"a": {"name": "masked_lm", "weight": 1.0}, "b": {"name": "span_corruption", "weight": 1.0}},
        *("a", TOKENIZER, 32),
      ),
      ["no model can be trained on all of them", "a: encoder", "b: both"],
    ),
    (lambda: weighted_sum({"a": [["name", "os:mkdir"]]}, "a", TOKENIZER, 8), ["objective.parts.a: must be"]),
  ],
)
def test_objective_rejects_invalid_values_in_one_line(make, words):
  with pytest.raises(ConfigError) as error:
    make()
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value), str(error.value)


def test_weighted_sum_components_get_as_much_text_as_fits():
  """No component gets more than it can hold, or special tokens twice, whichever component cuts the text."""
  specs = {"mlm": {"name": "masked_lm", "weight": 1.0}, "views": {"name": "contrastive", "weight": 1.0}}
  for principal in specs:
    objective = weighted_sum(specs, principal, TOKENIZER, 16)
    windows = objective.split_ids(TOKENIZER.document("abcdefghijklmnopqrstuvwxyz"), 16)
    views = example_of(objective, windows[0], 0).extras
    assert next(iter(objective.parts)) == principal
    assert TOKENIZER.show(views["views"].inputs.ids) == "<s>abcdefghijklmn</s>"
    masked = views["mlm"]
    restored = np.where(masked.weights["mlm"] > 0, masked.labels["mlm"], masked.inputs.ids)
    assert TOKENIZER.show(restored) == "<s>abcdefghijklmn</s>"


def test_accuracies_count_only_weighted_tokens():
  """Span corruption: without sentinels; sentence pairs: one each; masked LM: masked tokens."""

  class Answers(Lookup):
    """Predicts the right token if its id is even."""

    def __call__(self, batch, rngs, **kwargs):
      labels = next(iter(batch.labels.values()))
      right = jnp.where(labels % 2 == 0, labels, labels + 1)
      return Outputs(logits=jax.nn.one_hot(right, TOKENIZER.vocab_size + 1), hidden=right[..., None])

    def sentence_logits(self, hidden):
      return jnp.tile(jnp.array([1.0, 0.0]), (*hidden.shape[:2], 1))  # always class 0

  for name, metric in (("t5 span_corruption", "span_accuracy"), ("bert masked_lm", "masked_accuracy")):
    case = CASES[name]
    batch = make_batch(case)
    metrics = jax.jit(lambda batch, case=case: case.objective.loss(Answers(None), batch, {})[1])(batch)
    term = "nll" if metric == "span_accuracy" else "mlm"
    labels, weight = np.asarray(batch.labels[term]), np.asarray(batch.weights[term])
    counted = weight * (labels < 256) if metric == "span_accuracy" else weight
    want = (counted * (labels % 2 == 0)).sum() / counted.sum()
    np.testing.assert_allclose(metrics[metric][0] / metrics[metric][1], want, rtol=1e-5)
  labels, weight = np.asarray(batch.labels["sentence"]), np.asarray(batch.weights["sentence"])
  got, count = metrics["sentence_accuracy"]
  np.testing.assert_allclose(got / count, (weight * (labels == 0)).sum() / weight.sum(), rtol=1e-5)


def test_examples_of_every_objective_fit_their_rows():
  for case in CASES.values():
    sizes = case.objective.row_lengths(32)
    for i, record in enumerate(itertools.islice(texts(), 10)):
      for ids in case.objective.split_ids(TOKENIZER.document(record["text"]), 32):
        example = case.objective.make_example(Window(record, ids), np.random.default_rng(i), texts())
        if example is not None:
          lengths = packing.stream_lengths(example, sizes)
          assert all(length <= most for length, (_, most) in zip(lengths, sizes.streams(), strict=True))
