"""The CRF against sums over all taggings, in float64; independence of padding, packing and the mesh."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.distributed import sharding
from llmjax.objectives import crf, tag_scheme

B, L, C = 7, 6, 3
KEYS = ("scores", "tags", "start", "matrix", "end", "mask", "segments")


def case(seed=0, rows=B, length=L, classes=C, scale=1.0):
  """Random rows of up to three sentences with gaps and late starts; row 0 is empty."""
  rng = np.random.default_rng(seed)
  mask = rng.random((rows, length)) < 0.6
  mask[0] = False
  mask[1] = True
  return {
    "scores": rng.normal(size=(rows, length, classes)) * scale,
    "tags": np.where(mask, rng.integers(classes, size=(rows, length)), -100),
    "start": rng.normal(size=classes),
    "matrix": rng.normal(size=(classes, classes)) * 2,
    "end": rng.normal(size=classes),
    "mask": mask,
    "segments": np.sort(rng.integers(1, 4, size=(rows, length)), axis=1),
  }


def call(function, case, dtype=jnp.float32):
  """Call a function of the module, compiled, with the arrays of a case."""
  transitions = crf.Transitions(*(jnp.asarray(case[key], jnp.float32) for key in ("start", "matrix", "end")))
  mask, segments = jnp.asarray(case["mask"]), jnp.asarray(case["segments"], jnp.int32)
  tags = (jnp.asarray(case["tags"], jnp.int32),) if "tags" in inspect.signature(function).parameters else ()
  return jax.jit(function)(jnp.asarray(case["scores"], dtype), *tags, transitions, mask, segments)


def chains(case, row):
  """The positions of each chain of a row."""
  places = np.flatnonzero(case["mask"][row])
  return [list(group) for _, group in itertools.groupby(places.tolist(), lambda place: case["segments"][row, place])]


def score(case, row, places, tags):
  """The score of one tagging, by definition."""
  total = case["start"][tags[0]] + case["end"][tags[-1]]
  total += sum(case["scores"][row, place, tag] for place, tag in zip(places, tags))
  return total + sum(case["matrix"][a, b] for a, b in itertools.pairwise(tags))


def brute_force(case):
  """(log Z, score of the tags, best score, best tags, marginals) over all taggings of each chain, in float64."""
  rows, length, classes = case["scores"].shape
  log_z, tag_scores, best, tags = np.zeros(rows), np.zeros(rows), np.zeros(rows), np.zeros((rows, length), int)
  marginals = np.zeros((rows, length, classes))
  for row in range(rows):
    for places in chains(case, row):
      paths = list(itertools.product(range(classes), repeat=len(places)))
      scores = np.array([score(case, row, places, path) for path in paths])
      chain_log_z = scores.max() + np.log(np.exp(scores - scores.max()).sum())
      log_z[row] += chain_log_z
      tag_scores[row] += score(case, row, places, case["tags"][row, places])
      best[row] += scores.max()
      tags[row, places] = paths[int(scores.argmax())]
      for path, share in zip(paths, np.exp(scores - chain_log_z)):
        marginals[row, places, path] += share
  return log_z, tag_scores, best, tags, marginals


@pytest.mark.parametrize("seed", range(5))
def test_crf_equals_sums_over_all_taggings(seed):
  example = case(seed)
  log_z, tag_scores, best, tags, marginals = brute_force(example)
  np.testing.assert_allclose(call(crf.log_partition, example), log_z, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(call(crf.path_score, example), tag_scores, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(call(crf.negative_log_likelihood, example), log_z - tag_scores, rtol=1e-5, atol=1e-5)
  got_tags, got_best = call(crf.viterbi, example)
  np.testing.assert_allclose(got_best, best, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(got_tags, tags)
  np.testing.assert_allclose(call(crf.marginals, example), marginals, atol=1e-5)


def test_crf_gradients_equal_finite_differences():
  """Finite differences of the definition in float64, by the scores and all transitions."""
  example = case(1, rows=4, length=5)
  weights = np.array([1.0, -2.0, 0.5, 3.0])

  def loss(scores, start, matrix, end):
    arguments = (jnp.asarray(example[key]) for key in ("mask", "segments"))
    nll = crf.negative_log_likelihood(
      scores, jnp.asarray(example["tags"]), crf.Transitions(start, matrix, end), *arguments
    )
    return jnp.sum(nll * jnp.asarray(weights, jnp.float32))

  names = ("scores", "start", "matrix", "end")
  got = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*(jnp.asarray(example[name], jnp.float32) for name in names))
  for name, gradient in zip(names, got):
    for index in np.ndindex(example[name].shape):
      sides = []
      for step in (1e-5, -1e-5):
        moved = {**example, name: example[name].copy()}
        moved[name][index] += step
        log_z, tag_scores, *_ = brute_force(moved)
        sides.append(np.sum((log_z - tag_scores) * weights))
      assert float(gradient[index]) == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=2e-5), f"{name}{index}"


def test_crf_probabilities_of_all_taggings_sum_to_one():
  example = case(2)
  paths = np.array(list(itertools.product(range(C), repeat=5)))
  every = {
    **example,
    "scores": np.repeat(example["scores"][:1, :5], len(paths), axis=0),
    "tags": paths,
    "mask": np.ones(paths.shape, bool),
    "segments": np.repeat([[1, 1, 1, 2, 2]], len(paths), axis=0),
  }
  np.testing.assert_allclose(np.exp(-np.asarray(call(crf.negative_log_likelihood, every))).sum(), 1, rtol=1e-5)


def test_crf_ignores_padding_and_other_sentences_in_the_row():
  """Compare separate rows with one row of all sentences that has noise at masked positions between tokens."""
  example = case(3, rows=5)
  example["mask"][:] = True
  example["segments"][:] = 1
  rng = np.random.default_rng(0)
  places = np.sort(rng.permutation(3 * 5 * L)[: 5 * L])
  spread = {key: example[key] for key in ("start", "matrix", "end")}
  fillers = {"scores": rng.normal(size=(1, 3 * 5 * L, C)) * 100, "mask": 0, "tags": 1, "segments": 9}
  for key, filler in fillers.items():
    spread[key] = np.broadcast_to(filler, (1, 3 * 5 * L, C)[: example[key].ndim]).copy()
    spread[key][0, places] = example[key].reshape(5 * L, *example[key].shape[2:])
  spread["segments"][0, places] = np.repeat(np.arange(5), L)
  for function in (crf.log_partition, crf.path_score, crf.negative_log_likelihood):
    np.testing.assert_allclose(call(function, spread)[0], np.sum(call(function, example)), rtol=1e-5)
  (tags, best), (together, total) = call(crf.viterbi, example), call(crf.viterbi, spread)
  np.testing.assert_allclose(total[0], np.sum(best), rtol=1e-5)
  np.testing.assert_array_equal(together[0, places], tags.reshape(-1))
  assert not np.delete(together[0], places).any()
  np.testing.assert_allclose(
    call(crf.marginals, spread)[0, places], call(crf.marginals, example).reshape(-1, C), atol=1e-5
  )


def test_crf_on_data_mesh_equals_one_device_without_collectives():
  example = case(4, rows=16)
  mesh = sharding.make_mesh({"data": -1})
  cut, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
  arrays = {
    key: jnp.asarray(example[key], None if key in ("tags", "mask", "segments") else jnp.float32) for key in KEYS
  }

  def both(scores, tags, start, matrix, end, mask, segments):
    transitions = crf.Transitions(start, matrix, end)
    nll = crf.negative_log_likelihood(scores, tags, transitions, mask, segments)
    return nll, crf.viterbi(scores, transitions, mask, segments), crf.marginals(scores, transitions, mask, segments)

  want = jax.jit(both)(*arrays.values())
  placed = [jax.device_put(x, whole if key in ("start", "matrix", "end") else cut) for key, x in arrays.items()]
  compiled = jax.jit(both).lower(*placed).compile()
  assert not any(
    word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
  )
  got = compiled(*placed)
  assert all(x.sharding.is_equivalent_to(cut, x.ndim) for x in jax.tree.leaves(got))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


def test_crf_under_vmap_equals_single_models():
  examples = [case(seed, rows=3) for seed in (5, 6)]
  stacked = [jnp.asarray(np.stack([example[key] for example in examples])) for key in KEYS]

  def nll(scores, tags, start, matrix, end, mask, segments):
    return crf.negative_log_likelihood(scores, tags, crf.Transitions(start, matrix, end), mask, segments)

  want = np.stack([call(crf.negative_log_likelihood, example) for example in examples])
  np.testing.assert_allclose(jax.jit(jax.vmap(nll))(*stacked), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_crf_with_constraints_and_huge_scores_is_finite(scale, dtype):
  """Values and gradients, also for chains of one position, empty rows and tags that violate the constraints."""
  labels = ["O", "B-X", "I-X", "E-X", "S-X"]
  example = case(7, rows=8, length=12, classes=len(labels), scale=scale)
  example["mask"][2] = np.arange(12) == 11
  mask, segments, tags = (jnp.asarray(example[key]) for key in ("mask", "segments", "tags"))
  transitions = crf.add_transitions(
    crf.Transitions(*(jnp.asarray(example[key], dtype) for key in ("start", "matrix", "end"))),
    tag_scheme.transition_constraints(labels, "bioes"),
  )

  def total(scores, transitions):
    return jnp.sum(crf.negative_log_likelihood(scores, tags, transitions, mask, segments))

  scores = jnp.asarray(example["scores"], dtype)
  outputs = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(scores, transitions)
  outputs += jax.jit(crf.viterbi)(scores, transitions, mask, segments)
  marginals = jax.jit(crf.marginals)(scores, transitions, mask, segments)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((outputs, marginals)))
  np.testing.assert_allclose(np.sum(marginals, axis=-1), example["mask"], atol=1e-4)


def test_crf_loss_is_precise_in_long_rows_with_large_scores():
  """Scores of 10^4 sum to 10^7, where float32 has no fractions; the loss is far below one."""
  tags = np.arange(1024)[None] % C
  example = {**case(8), "tags": tags, "scores": 1e4 + 10 * np.eye(C)[tags], "mask": tags > -1, "segments": tags * 0}
  example["start"] = example["end"] = np.zeros(C)
  example["matrix"] = np.zeros((C, C))
  want = 1024 * np.log1p((C - 1) * np.exp(-10))
  np.testing.assert_allclose(call(crf.negative_log_likelihood, example)[0], want, rtol=1e-2)
