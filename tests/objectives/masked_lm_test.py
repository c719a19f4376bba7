"""Masked language modelling: which tokens are masked, and sentence pairs."""

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source
from llmjax.objectives.masked_lm import MaskedLM
from tests.support.cases import TOKENIZER, texts
from tests.support.examples import example_of, letters

BOS, EOS, MASK = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.mask_id


def test_masked_lm_masks_the_configured_shares_of_ordinary_tokens():
  """15 % of 10^5 tokens; of them 80 % mask, 10 % random, 10 % unchanged. Bounds are five standard deviations."""
  objective, length, count = MaskedLM(TOKENIZER), 100, 1000
  chosen_total = masked = kept = 0
  random = []
  for seed in range(count):
    ids = letters(length, seed)
    example = example_of(objective, ids, seed)
    inputs, chosen = example.inputs.ids, np.asarray(example.weights["mlm"], bool)
    framed = np.concatenate([[BOS], ids, [EOS]])
    assert chosen.sum() == 15 and not chosen[[0, -1]].any()
    np.testing.assert_array_equal(inputs[~chosen], framed[~chosen])
    np.testing.assert_array_equal(example.labels["mlm"][chosen], framed[chosen])
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
  chosen = np.array([example_of(objective, ids, seed).weights["mlm"] for seed in range(3000)])
  share = chosen.mean(0)[1:-1]
  assert np.abs(share - 3 / 20).max() < 5 * np.sqrt(0.15 * 0.85 / 3000)
  assert len({tuple(row) for row in chosen.tolist()}) > 900  # of 1140 triples
  first, again = (example_of(objective, ids, 7).inputs.ids for _ in range(2))
  np.testing.assert_array_equal(again, first)


def test_masked_lm_masks_at_least_one_token_and_no_special_token():
  assert np.sum(example_of(MaskedLM(TOKENIZER), letters(1), 0).weights["mlm"]) == 1
  ids = np.array([97, EOS, 98, BOS, 99, MASK, 100])
  for seed in range(100):
    assert not np.asarray(example_of(MaskedLM(TOKENIZER, rate=0.9), ids, seed).weights["mlm"])[[0, 2, 4, 6, 8]].any()


def test_masked_lm_whole_words_are_masked_up_to_the_rate():
  objective = MaskedLM(TOKENIZER, rate=0.3, whole_words=True)
  ids = TOKENIZER.encode("an étude: fo_o bars, (b4z) qux.\n" * 3)
  begins = TOKENIZER.word_begins(ids)
  words = np.cumsum(begins)
  shown = [TOKENIZER.decode(ids[words == w]) for w in range(1, words[-1] // 3 + 1)]
  assert shown == ["an", " ", "étude", ":", " ", "fo_o", " ", "bars", ",", " ", "(", "b4z", ")", " ", "qux", ".", "\n"]
  masked_words = set()
  for seed in range(200):
    chosen = np.asarray(example_of(objective, ids, seed).weights["mlm"], bool)[1:-1]
    assert 0 < chosen.sum() <= round(0.3 * len(ids))
    for word in range(1, words[-1] + 1):
      assert chosen[words == word].all() or not chosen[words == word].any()
    masked_words |= set(words[chosen].tolist())
  assert len(masked_words) == words[-1]
  long = example_of(MaskedLM(TOKENIZER, whole_words=True), TOKENIZER.encode("one_very_long_word"), 0)
  assert np.sum(long.weights["mlm"]) == 18


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
    windows = objective.split_ids(TOKENIZER.document(text), 100)
    assert TOKENIZER.decode(np.concatenate(windows)) == text and max(map(len, windows)) <= 97
    piece = windows[seed % len(windows)]
    assert TOKENIZER.decode(piece).endswith(".")
    example = example_of(objective, piece, seed, corpus, text=text)
    if example is None:  # the last piece may be a single sentence
      continue
    ids, types = example.inputs.ids, example.inputs.token_types
    assert ids[0] == BOS and ids[-1] == EOS and (ids == EOS).sum() == 2
    middle = int(np.flatnonzero(ids == EOS)[0])
    np.testing.assert_array_equal(types, np.arange(len(ids)) > middle)
    a, b = TOKENIZER.decode(ids[1:middle]), TOKENIZER.decode(ids[middle + 1 : -1])
    label, weight = example.labels["sentence"], np.asarray(example.weights["sentence"], int)
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
  assert example_of(objective, TOKENIZER.encode("no end in here"), 0, texts()) is None


def test_sentence_pairs_next_rejects_a_corpus_of_one_document():
  corpus = Source(1, lambda i: {"text": "a. b."}, "x")
  objective = MaskedLM(TOKENIZER, sentence_pairs="next")
  with pytest.raises(ConfigError, match=r"sentence_pairs: 'next'.* has one document.*sentence_pairs='order'"):
    for seed in range(20):
      example_of(objective, TOKENIZER.encode("a. b."), seed, corpus, text="a. b.")


def test_masked_lm_words_end_at_special_tokens():
  ids = np.concatenate([TOKENIZER.encode("hello"), [EOS], TOKENIZER.encode("world")])
  objective = MaskedLM(TOKENIZER, rate=0.5, whole_words=True)
  for seed in range(20):
    chosen = np.asarray(example_of(objective, ids, seed).weights["mlm"], bool)[1:-1]
    assert chosen.sum() == 5 and (chosen[:5].all() or chosen[6:].all())
