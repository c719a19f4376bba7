"""Examples that objectives make from text, against their definitions; the contrastive loss against its formula."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data import packing
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.models.transformer import Transformer
from llmjax.objectives.causal_lm import CausalLM
from llmjax.objectives.contrastive import Contrastive, info_nce, pool
from llmjax.objectives.masked_lm import MaskedLM
from llmjax.objectives.prefix_lm import PrefixLM
from llmjax.objectives.span_corruption import SpanCorruption
from llmjax.objectives.weighted_sum import weighted_sum
from llmjax.training.components import check_model_fits_objective
from llmjax.training.step import ModelForward
from llmjax.types import Batch, Forward, Outputs, Tokens
from tests.support.cases import BERT, CASES, GPT, MODERNBERT, T5, TOKENIZER, make_batch, parameters, texts

BOS, EOS, MASK, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.mask_id, TOKENIZER.pad_id


def letters(count, seed=0):
  return np.random.default_rng(seed).integers(97, 123, count).astype(np.int32)


def features_of(objective, ids, seed, corpus=None, **record):
  return objective.features({"text": "", "ids": ids, **record}, np.random.default_rng(seed), corpus)


def test_masked_lm_masks_the_configured_shares_of_ordinary_tokens():
  """15 % of 10^5 tokens; of them 80 % mask, 10 % random, 10 % unchanged. Bounds are five standard deviations."""
  objective, length, count = MaskedLM(TOKENIZER), 100, 1000
  chosen_total = masked = kept = 0
  random = []
  for seed in range(count):
    ids = letters(length, seed)
    features = features_of(objective, ids, seed)
    inputs, chosen = features["inputs"]["ids"], np.asarray(features["weights"]["mlm"], bool)
    framed = np.concatenate([[BOS], ids, [EOS]])
    assert chosen.sum() == 15 and not chosen[[0, -1]].any()
    np.testing.assert_array_equal(inputs[~chosen], framed[~chosen])
    np.testing.assert_array_equal(features["labels"]["mlm"][chosen], framed[chosen])
    chosen_total += chosen.sum()
    masked += (inputs[chosen] == MASK).sum()
    kept += (inputs[chosen] == framed[chosen]).sum()
    random += inputs[chosen & (inputs != MASK) & (inputs != framed)].tolist()
  for got, share in ((masked, 0.8), (kept, 0.1 + 0.1 / 256), (len(random), 0.1 * 255 / 256)):
    assert abs(got - share * chosen_total) < 5 * np.sqrt(share * (1 - share) * chosen_total)
  counts = np.bincount(random, minlength=TOKENIZER.vocab_size)
  assert not counts[256:].any()  # replacements are ordinary tokens
  assert (counts[:256] > 0).mean() > 0.98 and counts.max() < 5 * counts[:256].mean()


def test_masked_lm_masks_are_uniform_and_depend_on_the_seed():
  objective, ids = MaskedLM(TOKENIZER), letters(20)
  chosen = np.array([features_of(objective, ids, seed)["weights"]["mlm"] for seed in range(3000)])
  share = chosen.mean(0)[1:-1]
  assert np.abs(share - 3 / 20).max() < 5 * np.sqrt(0.15 * 0.85 / 3000)
  assert len({tuple(row) for row in chosen.tolist()}) > 900  # of 1140 triples
  first, again = (features_of(objective, ids, 7)["inputs"]["ids"] for _ in range(2))
  np.testing.assert_array_equal(again, first)


def test_masked_lm_masks_at_least_one_token_and_no_special_token():
  assert np.sum(features_of(MaskedLM(TOKENIZER), letters(1), 0)["weights"]["mlm"]) == 1
  ids = np.array([97, EOS, 98, BOS, 99, MASK, 100])
  for seed in range(100):
    assert not np.asarray(features_of(MaskedLM(TOKENIZER, rate=0.9), ids, seed)["weights"]["mlm"])[
      [0, 2, 4, 6, 8]
    ].any()


def test_masked_lm_whole_words_are_masked_up_to_the_rate():
  objective = MaskedLM(TOKENIZER, rate=0.3, whole_words=True)
  ids = TOKENIZER.encode("an étude: fo_o bars, (b4z) qux.\n" * 3)
  begins = TOKENIZER.word_begins(ids)
  words = np.cumsum(begins)
  shown = [TOKENIZER.decode(ids[words == w]) for w in range(1, words[-1] // 3 + 1)]
  assert shown == ["an", " ", "étude", ":", " ", "fo_o", " ", "bars", ",", " ", "(", "b4z", ")", " ", "qux", ".", "\n"]
  masked_words = set()
  for seed in range(200):
    chosen = np.asarray(features_of(objective, ids, seed)["weights"]["mlm"], bool)[1:-1]
    assert 0 < chosen.sum() <= round(0.3 * len(ids))
    for word in range(1, words[-1] + 1):
      assert chosen[words == word].all() or not chosen[words == word].any()
    masked_words |= set(words[chosen].tolist())
  assert len(masked_words) == words[-1]
  long = features_of(MaskedLM(TOKENIZER, whole_words=True), TOKENIZER.encode("one_very_long_word"), 0)
  assert np.sum(long["weights"]["mlm"]) == 18


def prose(seed, sentences=12):
  """A document of sentences that contain its seed."""
  rng = np.random.default_rng(seed)
  return " ".join(f"The {'x' * int(rng.integers(1, 9))} of {seed:03d}." for _ in range(sentences))


@pytest.mark.parametrize("kind", ["next", "order"])
def test_sentence_pairs_of_both_classes_differ_only_in_content(kind):
  """The ends of sentences, the first characters and the lengths have the same distribution."""
  documents = [prose(seed) for seed in range(50)]
  corpus = Source(50, lambda i: {"text": documents[i]}, "x")
  # Almost no token is masked, and masked tokens stay unchanged.
  objective = MaskedLM(TOKENIZER, rate=1e-9, masked=0.0, replaced=0.0, sentence_pairs=kind)
  pairs = []
  for seed in range(1500):
    text = documents[seed % 50]
    windows = objective.window(TOKENIZER.document(text), 100)
    assert TOKENIZER.decode(np.concatenate(windows)) == text and max(map(len, windows)) <= 97
    piece = windows[seed % len(windows)]
    assert TOKENIZER.decode(piece).endswith(".")
    features = features_of(objective, piece, seed, corpus, text=text)
    if features is None:  # the last piece may be a single sentence
      continue
    ids, types = features["inputs"]["ids"], features["inputs"]["token_types"]
    assert ids[0] == BOS and ids[-1] == EOS and (ids == EOS).sum() == 2
    middle = int(np.flatnonzero(ids == EOS)[0])
    np.testing.assert_array_equal(types, np.arange(len(ids)) > middle)
    a, b = TOKENIZER.decode(ids[1:middle]), TOKENIZER.decode(ids[middle + 1 : -1])
    label, weight = features["labels"]["sentence"], np.asarray(features["weights"]["sentence"], int)
    assert weight.tolist() == [1] + [0] * (len(ids) - 1)
    whole = TOKENIZER.decode(piece)
    if label[0] == 0:
      assert whole.startswith(a + b) and a.endswith(".")
    elif kind == "order":
      assert b + a == whole
    else:
      assert whole.startswith(a) and text[-4:-1] not in b and any(b in other for other in documents)
    pairs.append((int(label[0]), b[0], len(b), b.endswith("."), len(ids)))
  label = np.array([pair[0] for pair in pairs])
  assert abs(label.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(label))
  if kind == "next":
    assert {pair[1] for pair in pairs} == {" "}  # as the text after a sentence begins
    for which in (2, 3, 4):
      values = np.array([float(pair[which]) for pair in pairs])
      zero, one = values[label == 0], values[label == 1]
      error = np.sqrt(zero.var() / len(zero) + one.var() / len(one))
      assert abs(zero.mean() - one.mean()) < 5 * error, f"{which}: {zero.mean()} and {one.mean()}"


def test_sentence_pairs_skip_a_text_of_one_sentence():
  objective = MaskedLM(TOKENIZER, sentence_pairs="next")
  assert features_of(objective, TOKENIZER.encode("no end in here"), 0, texts()) is None


def test_sentence_pairs_next_rejects_a_corpus_of_one_document():
  corpus = Source(1, lambda i: {"text": "a. b."}, "x")
  objective = MaskedLM(TOKENIZER, sentence_pairs="next")
  with pytest.raises(ConfigError, match=r"sentence_pairs='next'.*one alone.*sentence_pairs='order'"):
    for seed in range(20):
      features_of(objective, TOKENIZER.encode("a. b."), seed, corpus, text="a. b.")


def test_windows_contain_every_token_once_and_fit():
  ids = TOKENIZER.frame(letters(1000))
  pairs = MaskedLM(TOKENIZER, sentence_pairs="next")  # letters without sentence ends are cut anywhere
  for objective, room in ((MaskedLM(TOKENIZER), 62), (pairs, 61)):
    windows = objective.window(ids, 64)
    np.testing.assert_array_equal(np.concatenate(windows), ids[1:-1])
    assert max(map(len, windows)) == room
  windows = SpanCorruption(TOKENIZER).window(ids, 64)
  np.testing.assert_array_equal(np.concatenate(windows), ids[1:-1])


# Span corruption

T5_TOKENIZER = make_tokenizer({"name": "bytes", "sentinels": 100})


def test_span_corruption_row_lengths_equal_t5():
  """568 tokens of text become 512 of input and 114 of targets (Raffel et al. 2020, t5.data.preprocessors)."""
  objective = SpanCorruption(T5_TOKENIZER)
  assert objective.text_length(512) == 568
  assert objective.row_lengths(512) == {"inputs": 512, "targets": 114}
  for seed in range(20):
    features = features_of(objective, letters(568, seed), seed)
    assert len(features["inputs"]) == 512 and len(features["targets"]) == len(features["labels"]["nll"]) == 114


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.3, 1.0), (0.9, 2.0)])
def test_span_corruption_fits_and_is_invertible_for_any_length(density, mean):
  objective = SpanCorruption(T5_TOKENIZER, noise_density=density, mean_span=mean)
  sizes = objective.row_lengths(64)
  sentinels = T5_TOKENIZER.sentinels
  for length in range(2, objective.text_length(64) + 1):
    text = letters(length, length)
    features = features_of(objective, text, length)
    inputs, labels = features["inputs"], features["labels"]["nll"]
    assert len(inputs) <= sizes["inputs"] and len(labels) <= sizes["targets"]
    assert inputs[-1] == labels[-1] == T5_TOKENIZER.eos_id
    assert features["targets"][0] == T5_TOKENIZER.pad_id
    np.testing.assert_array_equal(features["targets"][1:], labels[:-1])
    spans, current = {}, None
    for token in labels[:-1].tolist():
      if token in sentinels:
        current = spans.setdefault(token, [])
      else:
        current.append(token)
    assert list(spans) == list(sentinels[: len(spans)]) and all(spans.values())
    restored = [x for token in inputs[:-1].tolist() for x in spans.get(token, [token])]
    assert restored == text.tolist()


def test_span_lengths_follow_the_distribution_of_random_splits():
  objective, length, count = SpanCorruption(T5_TOKENIZER), 100, 1000  # 15 tokens in 5 spans
  hidden, lengths = np.zeros(length), []
  for seed in range(count):
    cuts = objective.cuts(85, 15, 5, np.random.default_rng(seed))
    spans = np.split(np.arange(length), cuts)[1::2]
    lengths += map(len, spans)
    hidden[np.concatenate(spans)] += 1
  assert hidden.sum() == 15 * count and np.mean(lengths) == 3.0
  # P(span of k tokens) = C(13 - k + 1, 3) / C(14, 4): all splits of 15 into 5 are equally likely
  for k in range(1, 8):
    share = np.prod([(15 - k - 1 - i) / (3 - i) for i in range(3)]) / 1001
    assert abs(np.mean(np.array(lengths) == k) - share) < 5 * np.sqrt(share * (1 - share) / len(lengths))
  assert hidden[0] == 0 and hidden[-1] == count  # T5's convention: the first span is kept, the last one is noise


def test_prefix_lm_prefixes_are_uniform_and_the_rest_has_weights():
  objective, ids = PrefixLM(TOKENIZER), letters(11)
  lengths = []
  for seed in range(2000):
    features = features_of(objective, ids, seed)
    prefix, weight = features["inputs"]["prefix"], features["weights"]["nll"]
    length = int(np.sum(prefix))
    np.testing.assert_array_equal(prefix, np.arange(10) < length)
    np.testing.assert_array_equal(
      weight, np.arange(10) >= length - 1
    )  # the last token of the prefix predicts the first one after it
    np.testing.assert_array_equal(features["labels"]["nll"], ids[1:])
    lengths.append(length)
  assert set(lengths) == set(range(1, 11)) and abs(np.mean(lengths) - 5.5) < 5 * 2.87 / np.sqrt(2000)


# Contrastive


class Lookup(Forward):
  """A model whose hidden states are rows of a table."""

  def __init__(self, table):
    self.table = table

  def __call__(self, batch, rngs, **kwargs):
    return Outputs(hidden=self.table[batch.inputs.ids])

  def unembed(self, hidden):
    raise AssertionError("no logits are needed")

  sentence_logits = unembed

  def map_microbatches(self, function, batch):
    return jax.tree.map(lambda x: x[None], function(batch))


@pytest.mark.parametrize("negative", [None, "other"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_contrastive_loss_equals_its_formula(symmetric, negative):
  """-log exp(z_i . z_j / t) / sum_k exp(z_i . z_k / t) in float64; padding rows are neither anchors nor candidates."""
  rng = np.random.default_rng(0)
  table, ids = rng.normal(size=(18, 5)), np.arange(18).reshape(3, 6, 1)
  real = np.array([1, 1, 1, 0, 1, 1])

  def batch(view):
    inputs = jax.tree.map(np.int32, Tokens(ids[view], np.zeros((6, 1)), real[:, None]))
    return Batch(inputs=inputs, rows=np.arange(6))

  extras = {"positive": batch(1)} | ({} if negative is None else {"negative": batch(2)})
  objective = Contrastive(TOKENIZER, 8, "text", "title", negative, symmetric=symmetric, temperature=0.3)
  whole = dataclasses.replace(batch(0), extras=extras)
  loss = jax.jit(lambda table, batch: objective.loss(Lookup(table), batch, {}))
  sums, metrics = loss(table.astype(np.float32), whole)

  z = table / np.linalg.norm(table, axis=1, keepdims=True)
  rows = [i for i in range(6) if real[i]]
  total = right = 0.0
  for i in rows:
    candidates = [6 + k for k in rows] + ([] if negative is None else [12 + k for k in rows])
    positive = np.exp(z[i] @ z[6 + i] / 0.3)
    forward = -np.log(positive / sum(np.exp(z[i] @ z[k] / 0.3) for k in candidates))
    backward = -np.log(positive / sum(np.exp(z[6 + i] @ z[k] / 0.3) for k in rows))
    total += (forward + backward) / 2 if symmetric else forward
    right += all(z[i] @ z[6 + i] >= z[i] @ z[k] for k in candidates)
  np.testing.assert_allclose(sums["contrastive"], total, rtol=1e-5)
  assert float(objective.weights(whole)["contrastive"]) == len(rows) == float(metrics["loss"][1])
  assert float(metrics["accuracy"][0]) == right
  alignment = sum(np.sum((z[i] - z[6 + i]) ** 2) for i in rows)
  np.testing.assert_allclose(metrics["alignment"][0], alignment, rtol=1e-5)


def test_contrastive_views_of_one_text_differ_only_by_dropout():
  objective = CASES["bert weighted_sum"].objective.parts["views"]
  params, _ = parameters(BERT)
  batch = Batch.from_tokens(np.random.default_rng(0).integers(97, 123, (3, 8)))

  def distances(rate):
    model = Transformer(dataclasses.replace(BERT, dropout=rate))
    embed = jax.jit(lambda params, key: objective.embed(ModelForward(model, params), [batch, batch], {"dropout": key}))
    a, b = np.asarray(embed(params, jax.random.key(0)))
    return np.sum(np.square(a - b), axis=1)

  assert (distances(0.0) < 1e-10).all()
  with_dropout = distances(0.2)
  assert ((with_dropout > 1e-3) & (with_dropout < 4)).all()


def test_pool_selects_the_tokens_of_each_mode():
  hidden = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  tokens = Tokens.from_ids(np.zeros((3, 4)), np.array([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]))
  out = Outputs(hidden=hidden, pooled=hidden[:, 0])
  want = {
    "cls": [hidden[0, 1], hidden[1, 0]],
    "last": [hidden[0, 3], hidden[1, 1]],
    "mean": [hidden[0, 1:].mean(0), hidden[1, :2].mean(0)],
    "pooler": [hidden[0, 0], hidden[1, 0]],
  }
  for pooling, rows in want.items():
    got = np.asarray(jax.jit(lambda out, pooling=pooling: pool(out, tokens, pooling))(out))
    np.testing.assert_allclose(got[:2], np.stack([r / np.linalg.norm(r) for r in rows]), atol=1e-6)
    assert not got[2].any()


def test_info_nce_counts_ties_as_right_and_ignores_padding_rows():
  z = np.eye(3, dtype=np.float32)
  nll, right = jax.device_get(jax.jit(lambda z, real: info_nce(z, z, real, 1.0))(z, np.array([True, True, False])))
  np.testing.assert_allclose(nll[:2], np.log(1 + np.exp(-1)), rtol=1e-6)
  assert right[:2].all()


def test_contrastive_pairs_are_framed_and_cut_and_empty_ones_skipped():
  objective = Contrastive(TOKENIZER, 6, "title", "text")
  record = {"title": "a title too long", "ids": TOKENIZER.document("body")}
  features = features_of(objective, record["ids"], 0, title=record["title"])
  piece = packing.flatten_features(features)
  assert TOKENIZER.show(piece["inputs/ids"]) == "<s>a ti</s>"
  assert TOKENIZER.show(piece["extras/positive/inputs/ids"]) == "<s>body</s>"
  assert features_of(objective, record["ids"], 0, title="") is None
  with pytest.raises(ConfigError, match=r"objective\.anchor='title' is no field.*text"):
    features_of(objective, record["ids"], 0)


# Invalid values

PLAIN = make_tokenizer({"name": "bytes"})
BARE = make_tokenizer({"name": "bytes", "special": False, "mask": True, "sentinels": 9})


@pytest.mark.parametrize(
  "make, words",
  [
    (lambda: MaskedLM(PLAIN), ["mask token", "data.tokenizer.mask=True"]),
    (lambda: MaskedLM(TOKENIZER, rate=0.0), ["objective.rate=0.0"]),
    (lambda: MaskedLM(TOKENIZER, masked=0.9, replaced=0.2), ["objective.masked=0.9"]),
    (lambda: MaskedLM(TOKENIZER, sentence_pairs="nxt"), ["sentence_pairs='nxt'", "`next`"]),
    (lambda: MaskedLM(BARE, sentence_pairs="next"), ["bos, eos", "sentence_pairs='none'"]),
    (lambda: MaskedLM(TOKENIZER).window(letters(9), 3), ["seq_len=3"]),
    (lambda: SpanCorruption(PLAIN), ["sentinel", "data.tokenizer.sentinels=100"]),
    (lambda: SpanCorruption(TOKENIZER, noise_density=1.0), ["noise_density=1.0"]),
    (lambda: SpanCorruption(TOKENIZER, mean_span=0.5), ["mean_span=0.5"]),
    (lambda: SpanCorruption(TOKENIZER).row_lengths(512), ["28 spans", "9 sentinels", "data.tokenizer.sentinels"]),
    (lambda: SpanCorruption(TOKENIZER).row_lengths(2), ["seq_len=2", "too short"]),
    (lambda: Contrastive(TOKENIZER, 8, temperature=0.0), ["temperature=0.0"]),
    (lambda: Contrastive(TOKENIZER, 8, pooling="avg"), ["pooling='avg'", "mean"]),
    (lambda: weighted_sum({}, "a", TOKENIZER, 8), ["objective.parts is empty"]),
    (lambda: weighted_sum({"a": {"name": "causal_lm"}}, "a", TOKENIZER, 8), ["objective.parts.a.weight=None"]),
    (
      lambda: weighted_sum({"a": {"name": "causal", "weight": 1.0}}, "a", TOKENIZER, 8),
      ["objective.parts.a", "causal_lm"],
    ),
    (
      lambda: check_model_fits_objective(CausalLM(), BERT, "causal_lm", 32),
      ["decoder_layers alone", "encoder_layers alone"],
    ),
    (
      lambda: check_model_fits_objective(MaskedLM(TOKENIZER), GPT, "masked_lm", 32),
      ["encoder_layers alone", "decoder_layers alone"],
    ),
    (
      lambda: check_model_fits_objective(SpanCorruption(TOKENIZER), GPT, "span_corruption", 32),
      ["both kinds of layers"],
    ),
    (
      lambda: check_model_fits_objective(Contrastive(TOKENIZER, 8), T5, "contrastive", 8),
      ["objective.name='contrastive'"],
    ),
    (
      lambda: check_model_fits_objective(Contrastive(TOKENIZER, 8, pooling="cls"), GPT, "contrastive", 8),
      ["encoder_layers alone"],
    ),
    (
      lambda: check_model_fits_objective(Contrastive(TOKENIZER, 8, pooling="pooler"), MODERNBERT, "c", 8),
      ["model.pooler=True", "False"],
    ),
    (
      lambda: check_model_fits_objective(Contrastive(TOKENIZER, 8), BERT, "contrastive", 8),
      ["positive=None", "model.dropout=0.1"],
    ),
    (
      lambda: check_model_fits_objective(PrefixLM(TOKENIZER), GPT, "prefix_lm", 8),
      ["model.bidirectional_prompt=True", "not False"],
    ),
    (
      lambda: check_model_fits_objective(MaskedLM(TOKENIZER), BERT, "masked_lm", 65),
      ["seq_len=65", "model.max_len=64"],
    ),
    (
      lambda: check_model_fits_objective(SpanCorruption(T5_TOKENIZER, noise_density=0.6), T5, "span_corruption", 64),
      ["targets", "model.max_len=64"],
    ),
    (lambda: Contrastive(TOKENIZER, 2), ["seq_len=2", "no room"]),
    (lambda: MaskedLM(TOKENIZER, sentence_weight=-1.0), ["sentence_weight=-1.0"]),
    (
      lambda: weighted_sum(
        {"a": {"name": "masked_lm", "weight": 1.0}, "b": {"name": "span_corruption", "weight": 1.0}},
        *("a", TOKENIZER, 32),
      ),
      ["no model can learn them together", "a: encoder", "b: both"],
    ),
    (lambda: weighted_sum({"a": [["name", "os:mkdir"]]}, "a", TOKENIZER, 8), ["objective.parts.a must be"]),
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
    windows = objective.window(TOKENIZER.document("abcdefghijklmnopqrstuvwxyz"), 16)
    piece = packing.flatten_features(features_of(objective, windows[0], 0))
    assert next(iter(objective.parts)) == principal
    assert TOKENIZER.show(piece["extras/views/inputs/ids"]) == "<s>abcdefghijklmn</s>"
    labels, chosen = piece["extras/mlm/labels/mlm"], piece["extras/mlm/weights/mlm"] > 0
    restored = np.where(chosen, labels, piece["extras/mlm/inputs/ids"])
    assert TOKENIZER.show(restored) == "<s>abcdefghijklmn</s>"


def test_contrastive_rejects_fields_that_are_not_text():
  objective = Contrastive(TOKENIZER, 8, "title", "text")
  assert features_of(objective, TOKENIZER.document("body"), 0, title=None) is None
  with pytest.raises(ConfigError, match=r"objective\.anchor='title'.*7.*no text"):
    features_of(objective, TOKENIZER.document("body"), 0, title=7)


def test_masked_lm_words_end_at_special_tokens():
  ids = np.concatenate([TOKENIZER.encode("hello"), [EOS], TOKENIZER.encode("world")])
  objective = MaskedLM(TOKENIZER, rate=0.5, whole_words=True)
  for seed in range(20):
    chosen = np.asarray(features_of(objective, ids, seed)["weights"]["mlm"], bool)[1:-1]
    assert chosen.sum() == 5 and (chosen[:5].all() or chosen[6:].all())


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


def test_features_of_every_objective_fit_their_rows():
  for case in CASES.values():
    sizes = case.objective.row_lengths(32)
    for i, record in enumerate(itertools.islice(texts(), 10)):
      for ids in case.objective.window(TOKENIZER.document(record["text"]), 32):
        features = case.objective.features({**record, "ids": ids}, np.random.default_rng(i), texts())
        if features is not None:
          lengths = packing.lengths(packing.flatten_features(features))
          assert all(length <= sizes[stream] for stream, length in lengths.items())
