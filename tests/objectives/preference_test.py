"""Preference optimisation: losses against NumPy, records of all forms, and a reference that is not trained."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data.tokenizers.huggingface import tokenizer_from_folder
from llmjax.examples import Example, RowLengths, TokenSequence
from llmjax.models.transformer import Transformer
from llmjax.objectives import preference
from llmjax.objectives.preference import Preference, preference_loss
from llmjax.training import step
from tests.support.cases import GPT, TOKENIZER, pack_batch, parameters, record_examples

FOLDERS = Path(__file__).parents[1] / "testdata" / "tokenizers"
BOS, EOS, LENGTH, ROWS = TOKENIZER.bos_id, TOKENIZER.eos_id, 16, 8
PAIRS = [
  {"prompt": "ask"[: 1 + i % 3], "chosen": "yes!"[: 1 + i % 4], "rejected": "no, no"[: 2 + i % 5]} for i in range(6)
]
DROPOUT = dataclasses.replace(GPT, dropout=0.2, attention_dropout=0.1, mlp_dropout=0.1)


def encoded(text):
  return TOKENIZER.encode(text).tolist()


def batch_of(objective, records=PAIRS, rows=ROWS):
  """Return a batch with a pair in each row, and rows of padding."""
  return pack_batch(record_examples(objective, records), objective.row_lengths(objective.seq_len), rows)


@functools.cache
def function(objective, accum, cfg):
  def run(params, batch, key, reference):
    settings = {"model": Transformer(cfg), "objective": objective, "accum": accum}
    return step.compute_gradients(
      params, batch, key, **settings, auxiliary={"reference": (Transformer(cfg), reference)}
    )

  return jax.jit(run)


def gradients(objective, batch, params=None, reference=None, accum=1, cfg=GPT, key=0):
  """Return (gradients, metrics); by default the policy and its reference have different parameters."""
  params = parameters(GPT, 0)[0] if params is None else params
  reference = parameters(GPT, 2)[0] if reference is None else reference
  return function(objective, accum, cfg)(params, batch, jax.random.key(key), reference)


def assert_close(got, want):
  scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got, want)


@functools.cache
def log_probs(seed):
  """Return log p(answer, eos | bos, prompt) of both answers of PAIRS, each text in its own row, in float64."""
  found = []
  forward = jax.jit(lambda batch: Transformer(GPT).apply({"params": parameters(GPT, seed)[0]}, batch).logits[0])
  for pair, view in itertools.product(PAIRS, preference.VIEWS):
    ids = np.array([BOS, *encoded(pair["prompt"]), *encoded(pair[view]), EOS])
    batch = pack_batch([Example(TokenSequence(ids[:-1]))], RowLengths(LENGTH), 1)
    logits = np.asarray(forward(batch), np.float64)[: len(ids) - 1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found.append(sum(log_p[i, ids[i + 1]] for i in range(len(pair["prompt"]), len(ids) - 1)))
  return np.reshape(found, (-1, 2))


VARIANTS = {
  "sigmoid": ({"label_smoothing": 0.2}, lambda h, b: 0.8 * np.log1p(np.exp(-b * h)) + 0.2 * np.log1p(np.exp(b * h))),
  "ipo": ({}, lambda h, b: (h - 1 / (2 * b)) ** 2),
  "hinge": ({}, lambda h, b: np.maximum(0, 1 - b * h)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_preference_losses_equal_their_formulas(variant):
  """The formulas use log-probabilities of each text in its own row."""
  settings, formula = VARIANTS[variant]
  beta = 0.3
  objective = Preference(TOKENIZER, LENGTH, beta=beta, variant=variant, sft_weight=0.5, **settings)
  _, metrics = gradients(objective, batch_of(objective))
  policy, reference = log_probs(0), log_probs(2)
  rewards = beta * (policy - reference)
  margin = rewards[:, 0] - rewards[:, 1]
  loss = formula(margin / beta, beta)
  tokens = sum(len(pair["chosen"]) + 1 for pair in PAIRS)
  sft_loss = -policy[:, 0].sum() / tokens
  want = {
    "loss": loss.mean(),
    "accuracy": (margin > 0).mean(),
    "margin": margin.mean(),
    "chosen_reward": rewards[:, 0].mean(),
    "rejected_reward": rewards[:, 1].mean(),
    "sft_loss": sft_loss,
    "objective": loss.mean() + 0.5 * sft_loss,
  }
  assert 0 < want["accuracy"] < 1
  got = {name: float(total / weight) for name, (total, weight) in metrics.items()}
  assert got == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_dpo_loss_of_the_reference_policy_is_log_2():
  objective = Preference(TOKENIZER, LENGTH)
  same = parameters(GPT)[0]
  grads, metrics = gradients(objective, batch_of(objective), same, same)
  np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], np.log(2), rtol=1e-6)
  assert metrics["loss"][1] == len(PAIRS)  # padding has no weight
  for name in ("margin", "chosen_reward", "rejected_reward", "accuracy"):
    assert abs(float(metrics[name][0])) < 1e-5
  assert max(float(np.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-4  # a trivial zero would pass too


def check_reference(objective):
  batch = jax.tree.map(jnp.asarray, batch_of(objective))

  def loss(reference):
    model = Transformer(GPT)
    sums = step.objective_sums(
      parameters(GPT)[0],
      batch,
      {"reference": reference},
      model=model,
      objective=objective,
      auxiliary={"reference": model},
    )
    return sums["preference"]

  for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(parameters(GPT, 1)[0])):
    assert not np.asarray(gradient).any()


def test_reference_model_gets_no_gradient():
  check_reference(Preference(TOKENIZER, LENGTH))


def test_gradients_accumulated_equal_the_whole_batch():
  objective = Preference(TOKENIZER, LENGTH, sft_weight=0.3)
  batch = batch_of(objective)
  want, metrics = gradients(objective, batch, cfg=DROPOUT)
  got, same = gradients(objective, batch, accum=4, cfg=DROPOUT)
  assert_close(got, want)
  assert_close(same, metrics)
  with pytest.raises(AssertionError):  # dropout is on
    assert_close(gradients(objective, batch, cfg=DROPOUT, key=1)[0], want)


def test_dropout_differs_per_answer_and_is_off_in_the_reference():
  objective = Preference(TOKENIZER, LENGTH)
  batch = batch_of(objective, [{"prompt": "a", "chosen": "b", "rejected": "b"}])
  params = parameters(GPT)[0]
  forward = step.ModelForward(Transformer(DROPOUT), params, auxiliary={"reference": (Transformer(DROPOUT), params)})
  run = jax.jit(lambda batch: objective.loss(forward, batch, {"dropout": jax.random.key(0)})[1])
  chosen, rejected = (float(run(batch)[f"{view}_reward"][0]) for view in ("chosen", "rejected"))
  assert abs(chosen - rejected) > 1e-4 and chosen != 0
  still = jax.jit(lambda batch: preference.answer_log_probs(forward.auxiliary["reference"], batch, {}))(batch)
  np.testing.assert_allclose(still[0], still[1], rtol=1e-6)
  drawn = jax.jit(lambda batch: preference.answer_log_probs(forward, batch, {"dropout": jax.random.key(0)}))(batch)
  np.testing.assert_allclose([chosen, rejected], objective.beta * (drawn - still)[:, 0], rtol=1e-5)


def ids_of(example, view):
  """Return the ids of the prompt and of the answer of a view."""
  inner = example.extras[view]
  ids = np.append(inner.inputs.ids, inner.labels["nll"][-1:])
  start = len(ids) - int(inner.weights["nll"].sum())
  assert inner.weights["nll"][start - 1 :].all()
  return ids[:start].tolist(), ids[start:].tolist()


def test_long_shared_prompt_drops_its_beginning():
  example = Preference(TOKENIZER, 12).encode_record({"prompt": "0123456789", "chosen": "abc", "rejected": "abcde"})
  assert ids_of(example, "chosen") == ([BOS, *encoded("456789")], [*encoded("abc"), EOS])
  assert ids_of(example, "rejected") == ([BOS, *encoded("456789")], [*encoded("abcde"), EOS])
  example = Preference(TOKENIZER, 12).encode_record({"prompt": "0123456789", "chosen": "abc", "rejected": "a" * 50})
  assert ids_of(example, "rejected") == ([BOS, *encoded("56789")], encoded("a" * 7))
  assert ids_of(example, "chosen") == ([BOS, *encoded("56789")], [*encoded("abc"), EOS])
  example = Preference(TOKENIZER, 12).encode_record({"prompt": "0", "chosen": "abc", "rejected": "a" * 50})
  assert ids_of(example, "rejected") == ([BOS, *encoded("0")], encoded("a" * 11))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_preferences_are_read_in_the_formats_of_datasets(name):
  made = tokenizer_from_folder(FOLDERS / name)
  objective = Preference(made, 200, template=made.chat_templates and "default")
  ask, good, bad = (
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "no"},
  )
  forms = [
    {"chosen": [ask, good], "rejected": [ask, bad]},
    {"prompt": "Hi!", "chosen": [ask, good], "rejected": [ask, bad]},
    {"prompt": [ask], "chosen": [good], "rejected": [bad]},
    {"prompt": "Hi!", "chosen": [good], "rejected": [bad]},
    {"prompt": "Hi!", "chosen": "a", "rejected": "no"},
  ]
  for record in forms:
    objective.check_record(record)
    example = objective.encode_record(record)
    for view, answer in (("chosen", good), ("rejected", bad)):
      prompt, said = ids_of(example, view)
      assert prompt + said == made.chat([ask, answer]).tolist()
      assert prompt == made.chat([ask], add_generation_prompt=True).tolist()


def test_bad_preference_settings_and_records_are_one_line():
  say = {"role": "assistant", "content": "a"}
  ask = {"role": "user", "content": "b"}
  for record, message in (
    ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
    ({"chosen": "a", "rejected": "b"}, "no field 'prompt', which the answers continue"),
    ({"prompt": "a", "chosen": " ", "rejected": "b"}, "'chosen': must not be empty"),
    ({"prompt": "a", "chosen": [say], "rejected": "b"}, "'rejected': must be a list of messages, .*got 'b'"),
    ({"chosen": [say], "rejected": [say]}, "'chosen': must have a message before the assistant's, got that one alone"),
    ({"chosen": [ask, say], "rejected": [ask, ask]}, "the last message must be the assistant's, got the user's"),
    (
      {"chosen": [ask, say], "rejected": [{**ask, "content": "c"}, say]},
      "must answer the same messages",
    ),
  ):
    with pytest.raises(ConfigError, match=message) as caught:
      Preference(TOKENIZER, LENGTH).check_record(record)
    assert "\n" not in str(caught.value)
  for settings, message in (
    ({"variant": "sigmoidal"}, "did you mean `sigmoid`"),
    ({"beta": 0.0}, "must be positive"),
    ({"variant": "ipo", "label_smoothing": 0.1}, "0 unless objective.variant='sigmoid'"),
    ({"label_smoothing": 0.5}, r"in \[0, 0.5\)"),
    ({"sft_weight": -1.0}, "must not be negative"),
    ({"template": "chatml"}, "must be Jinja or one of"),
  ):
    with pytest.raises(ConfigError, match=message):
      Preference(TOKENIZER, LENGTH, **settings)


def test_losses_with_large_margins_are_finite():
  far = np.array([-1e4, 1e4], np.float32)
  for variant in VARIANTS:
    assert np.isfinite(preference_loss(jnp.asarray(far), variant, 0.1)).all()
