"""Text to text: inputs and labels of a pair, for encoder-decoders and for decoders."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data.tokenizers.huggingface import tokenizer_from_folder
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.examples import Example, RowLengths, TokenSequence
from llmjax.models.transformer import Transformer
from llmjax.objectives.seq2seq import Seq2Seq
from llmjax.training.components import check_model_fits_objective
from tests.support.cases import (
  GPT,
  T5,
  TOKENIZER,
  Case,
  gradients,
  pack_batch,
  parameters,
  record_examples,
  widen_rows,
  with_dropout,
)

BOS, EOS, PAD, LENGTH = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id, 32
FOLDERS = Path(__file__).parents[1] / "testdata" / "tokenizers"
RECORDS = [{"source": "abcd" * (1 + i % 3), "target": "xyz"[: 1 + i % 3]} for i in range(8)]
CASES = {
  "both": Case(T5, Seq2Seq(TOKENIZER, LENGTH, "both", z_loss=1e-3, label_smoothing=0.1)),
  "decoder": Case(GPT, Seq2Seq(TOKENIZER, LENGTH, "decoder")),
}

CONFIG = {"objective": {"name": "seq2seq"}, "seq_len": LENGTH}


def encoded(text):
  return TOKENIZER.encode(text).tolist()


def batch_of(objective, rows=8, wide=0, shared=True):
  """Return a batch of the pairs of RECORDS, which share rows or have a row each; rows are longer by `wide` tokens."""
  row_lengths = widen_rows(objective.row_lengths(LENGTH), wide)
  return pack_batch(record_examples(objective, RECORDS), row_lengths, rows, shared)


def assert_close(got, want):
  scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got, want)


def test_example_of_encoder_decoder_split_source_and_target():
  objective = Seq2Seq(TOKENIZER, 12, "both", prefix="do: ", target_len=4)
  [example] = objective.encode_record({"source": "abc", "target": "xy"}, labelled=True)
  assert example.inputs.ids.tolist() == [*encoded("do: abc"), EOS]
  assert example.targets.ids.tolist() == [PAD, *encoded("xy")]
  assert example.labels["nll"].tolist() == [*encoded("xy"), EOS] and example.weights["nll"].all()
  [cut] = objective.encode_record({"source": "a" * 20, "target": "x" * 20}, labelled=True)
  assert cut.inputs.ids.tolist() == [*encoded("do: aaaaaaa"), EOS]
  assert cut.labels["nll"].tolist() == encoded("xxxx")  # no eos, because the target is truncated
  assert objective.row_lengths(12) == RowLengths(12, 4) and objective.stacks == ("both",)


@pytest.mark.parametrize("folder", [None, "gpt2", "llama", "gemma"])
def test_example_of_decoder_starts_with_the_inference_prompt(folder):
  """The room for the prompt does not depend on the target."""
  made = TOKENIZER if folder is None else tokenizer_from_folder(FOLDERS / folder)
  objective = Seq2Seq(made, 40, "decoder", prefix="sum: ", separator="\n= ", target_len=12)
  for source, target in (("a text", "short"), ("long " * 50, "t"), ("long " * 50, "goes on " * 20)):
    record = {"source": source, "target": target}
    [example] = objective.encode_record(record, labelled=True)
    [prompt] = objective.encode_record({"source": source}, labelled=False)
    ids, start = example.inputs.ids, len(prompt.inputs.ids)
    assert ids[:start].tolist() == prompt.inputs.ids.tolist() and start <= 40 - 12 and len(ids) < 40
    assert ids[:start].tolist()[: len(made.single[0])] == made.single[0].tolist()
    assert ids[start - len(made.encode("\n= ")) : start].tolist() == made.encode("\n= ").tolist()
    labels = example.labels["nll"]
    assert labels[:-1].tolist() == ids[1:].tolist()
    learned = labels[example.weights["nll"] > 0].tolist()
    assert learned == [*made.encode(target).tolist(), made.eos_id][:12]
    assert example.weights["nll"][: start - 1].sum() == 0


def test_prefix_of_a_bidirectional_prompt_ends_at_the_target():
  objective = Seq2Seq(TOKENIZER, LENGTH, "decoder", bidirectional=True)
  [example] = objective.encode_record({"source": "ab", "target": "xy"}, labelled=True)
  assert example.inputs.prefix.tolist() == [1, 1, 1, 1, 0, 0]  # bos, a, b, newline; x, y
  assert example.weights["nll"].tolist() == [0, 0, 0, 1, 1, 1]
  assert objective.encode_record({"source": "ab"}, labelled=False)[0].inputs.prefix.all()
  check_model_fits_objective(objective, dataclasses.replace(GPT, bidirectional_prompt=True), CONFIG)
  with pytest.raises(ConfigError, match=r"needs model\.bidirectional_prompt=True"):
    check_model_fits_objective(objective, GPT, CONFIG)
  with pytest.raises(ConfigError, match=r"needs model\.bidirectional_prompt=False"):
    plain = Seq2Seq(TOKENIZER, LENGTH, "decoder")
    check_model_fits_objective(plain, dataclasses.replace(GPT, bidirectional_prompt=True), CONFIG)


@pytest.mark.parametrize("name", CASES)
def test_gradients_packed_or_accumulated_equal_the_whole_batch(name):
  case = CASES[name]
  params, _ = parameters(case.cfg)
  want, metrics = gradients(case, params, batch_of(case.objective))
  got, same = gradients(case, params, batch_of(case.objective, wide=8, shared=False))
  assert_close(got, want)
  assert_close(same, metrics)
  dropped = with_dropout(case)
  batch = batch_of(case.objective)
  assert_close(gradients(dropped, params, batch, accum=4)[0], gradients(dropped, params, batch)[0])


def test_loss_of_a_decoder_covers_targets_only():
  """Compare with NumPy in float64; labels of the prompt have no influence."""
  objective = Seq2Seq(TOKENIZER, LENGTH, "decoder")
  case = Case(GPT, objective)
  forward = jax.jit(lambda params, batch: Transformer(GPT).apply({"params": params}, batch).logits[0])
  params, _ = parameters(GPT)
  batch = batch_of(objective)
  _, metrics = gradients(case, params, batch)
  labels = np.where(batch.weights["nll"] > 0, batch.labels["nll"], 7)
  _, same = gradients(case, params, dataclasses.replace(batch, labels={"nll": labels}))
  np.testing.assert_array_equal(same["loss"], metrics["loss"])
  total = count = 0
  for record in RECORDS:
    prompt = [BOS, *encoded(record["source"]), *encoded("\n")]
    ids = np.array([*prompt, *encoded(record["target"]), EOS])
    alone = pack_batch([Example(TokenSequence(ids[:-1]))], RowLengths(LENGTH), 1)
    logits = np.asarray(forward(params, alone), np.float64)[: len(ids) - 1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = range(len(prompt) - 1, len(ids) - 1)
    total -= sum(log_p[i, ids[i + 1]] for i in places)
    count += len(places)
  np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-5)
  assert metrics["loss"][1] == count


def test_predictions_stop_at_eos_and_are_scored():
  pytest.importorskip("rouge_score")
  objective = Seq2Seq(TOKENIZER, LENGTH, "decoder")
  tokens = np.array([*encoded("xy"), EOS, *encoded("zz")])
  result = objective.make_result({}, [], [{"tokens": tokens}])
  assert result == {"target": "xy"}
  assert objective.make_result({}, [], [{"tokens": tokens[:2]}]) == {"target": "xy"}
  assert objective.compute_metrics([{"target": "a b"}], [{"target": "a b"}])["rouge2"] == 1
  assert Seq2Seq(TOKENIZER, LENGTH, metric="none").compute_metrics([], []) == {}


def test_bleu_is_computed_over_the_corpus():
  pytest.importorskip("sacrebleu")
  texts = [{"target": "the cat sat on the mat"}]
  assert Seq2Seq(TOKENIZER, LENGTH, metric="bleu").compute_metrics(texts, texts) == pytest.approx(
    {"bleu": 100, "chrf": 100}
  )


def test_pairs_without_target_are_skipped_and_bad_ones_named():
  objective = Seq2Seq(TOKENIZER, LENGTH, "decoder")
  assert list(objective.split_record({"source": "a", "target": None}, TOKENIZER, LENGTH, False)) == []
  for record, message in (
    ({"source": "a", "targets": "b"}, "no field 'target'.*did you mean `targets`"),
    ({"source": 3, "target": "b"}, "'source': must be text, got 3"),
    ({"source": "a", "target": " "}, "'target': must not be empty"),
  ):
    with pytest.raises(ConfigError, match=message):
      objective.check_record(record, labelled=True)
  objective.check_record({"source": "a"}, labelled=False)
  for settings, message in (
    ({"metric": "rogue"}, "did you mean `rouge`"),
    ({"target_len": 0}, "objective.target_len: must be at least 1, got 0"),
    ({"target_len": LENGTH}, "leaves no room for a source"),
    ({"stacks": "both", "bidirectional": True}, "is for a decoder alone"),
    ({"label_smoothing": 2.0}, "label_smoothing"),
  ):
    with pytest.raises(ConfigError, match=message):
      Seq2Seq(TOKENIZER, LENGTH, **{"stacks": "decoder", **settings})
  with pytest.raises(ConfigError, match="needs a token that ends a text"):
    Seq2Seq(make_tokenizer({"name": "bytes", "special": False}), LENGTH)
  encoder = dataclasses.replace(GPT, decoder_layers=0, encoder_layers=2)
  with pytest.raises(ConfigError, match="needs a model with"):
    check_model_fits_objective(Seq2Seq(TOKENIZER, LENGTH, "encoder"), encoder, CONFIG)
