"""The data pipeline: the global batch depends on (seed, step) alone, and has every token once an epoch."""

import collections
import functools
import itertools
import json
import time

import jax
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data.pipeline import TrainStream, eval_batches, merge_cursors
from llmjax.data.randomness import permute_index
from llmjax.data.row_streams import make_row_filler
from llmjax.data.sources.base import Source, join_sources
from llmjax.data.tokenizers.characters import bytes_tokenizer
from llmjax.examples import Example, RowLengths, TokenSequence
from llmjax.objectives.causal_lm import CausalLM

TOKENIZER = bytes_tokenizer()
B, L = 4, 16


class NextToken(CausalLM):
  """Causal language modelling with random weights, which show the generator that it is given."""

  def make_example(self, window, rng, corpus):
    ids = window.ids
    weights = rng.uniform(0.5, 1, len(ids) - 1)
    return Example(TokenSequence(ids[:-1]), labels={"nll": ids[1:]}, weights={"nll": weights})


class EveryOther(NextToken):
  """Whole examples of two streams: every other token of the input is a target."""

  packing = "whole"
  stacks = ("both",)

  def row_lengths(self, seq_len):
    return RowLengths(seq_len, seq_len // 2)

  def split_ids(self, ids, seq_len):
    return [ids[i : i + seq_len - 3] for i in range(0, len(ids), seq_len - 3)]

  def make_example(self, window, rng, corpus):
    targets = window.ids[::2]
    weights = rng.uniform(0.5, 1, len(targets))
    sequences = TokenSequence(window.ids), TokenSequence(targets)
    return Example(*sequences, labels={"nll": targets}, weights={"nll": weights})


PACKS = [True, False, "whole"]


def documents(count, seed=0, longest=40, first="a"):
  """Return a source of texts of different length, each with a unique prefix."""
  rng = np.random.default_rng(seed)
  texts = [f"{first}{i}:" + "x" * int(rng.integers(0, longest)) for i in range(count)]
  return Source(count, lambda i: {"text": texts[i]}, f"{first}{count}-{seed}-{longest}")


def stream(source, pack=True, **changes):
  settings = {"batch_size": B, "seq_len": L, "seed": 0, "workers": 1, "prefetch": 0} | changes
  objective = EveryOther() if pack == "whole" else NextToken()
  return TrainStream(source, TOKENIZER, objective, pack=bool(pack), **settings)


def take(source, steps, **changes):
  made = stream(source, **changes)
  batches = list(itertools.islice(made, steps))
  made.close()
  return batches, made.cursor


def same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rows_of(batches, rows):
  return [jax.tree.map(lambda x: x[list(rows)], b) for b in batches]


SOURCES = {
  "documents": documents(23),
  "fewer documents than rows": documents(3),
  "mixture": join_sources([documents(23), documents(5, first="b"), documents(40, first="c")], [0.5, 0.3, 0.2]),
}


@pytest.fixture(params=SOURCES, ids=str)
def source(request):
  return SOURCES[request.param]


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("interleave", [1, 3])
def test_batches_do_not_depend_on_hosts_workers_and_prefetch(source, pack, interleave):
  take = functools.partial(globals()["take"], interleave=interleave)
  reference, _ = take(source, 12, pack=pack)
  for workers, prefetch in ((1, 4), (4, 0), (4, 4)):
    same(take(source, 12, pack=pack, workers=workers, prefetch=prefetch)[0], reference)
  for hosts in (2, 4):
    for host in range(hosts):
      rows = range(host * B // hosts, (host + 1) * B // hosts)
      same(take(source, 12, pack=pack, rows=rows)[0], rows_of(reference, rows))


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("interleave", [1, 3])
def test_resumed_stream_equals_an_uninterrupted_one(source, pack, before, after, interleave):
  take, stream = (functools.partial(globals()[name], interleave=interleave) for name in ("take", "stream"))
  reference, _ = take(source, 13, pack=pack)
  cursors = [
    take(source, 5, pack=pack, prefetch=2, rows=range(h * B // before, (h + 1) * B // before))[1] for h in range(before)
  ]
  cursor = json.loads(json.dumps(merge_cursors(cursors)))
  for host in range(after):
    rows = range(host * B // after, (host + 1) * B // after)
    resumed = stream(source, pack=pack, rows=rows, workers=2, prefetch=3)
    next(resumed)  # prefetched batches must be dropped
    resumed.restore(cursor)
    streams = [str(r + lane * B) for lane in range(interleave) for r in rows]
    assert merge_cursors([resumed.cursor])["rows"] == {number: cursor["rows"][number] for number in streams}
    same(list(itertools.islice(resumed, 8)), rows_of(reference[5:], rows))
    resumed.close()


def segments(batches):
  """Yield (row, inputs, labels, positions) of each segment in order."""
  for batch in batches:
    for r, row in enumerate(batch.rows.tolist()):
      numbers = batch.inputs.segments[r]
      for number in range(1, numbers.max(initial=0) + 1):
        where = numbers == number
        yield row, batch.inputs.ids[r][where], batch.labels["nll"][r][where], batch.inputs.positions[r][where]


def test_packed_stream_has_every_token_once_an_epoch():
  source, epochs = documents(20), 3  # 20 documents in 4 rows: an epoch is 5 documents of every row
  tokens = sum(len(TOKENIZER.document(r["text"])) - 1 for r in source)
  batches, _ = take(source, 3 * tokens * epochs // L)
  of_row = collections.defaultdict(list)
  for row, inputs, labels, positions in segments(batches):
    assert positions.tolist() == list(range(len(inputs)))
    of_row[row].append((inputs, labels))
  orders = []
  for epoch in range(epochs):
    seen = []
    for row in range(B):
      inputs, labels = (np.concatenate(x) for x in zip(*of_row[row]))
      starts = np.flatnonzero(inputs == TOKENIZER.bos_id)[5 * epoch : 5 * epoch + 6]
      for start, stop in itertools.pairwise(starts):
        assert labels[start : stop - 1].tolist() == inputs[start + 1 : stop].tolist()
        assert labels[stop - 1] == TOKENIZER.eos_id
        seen.append(TOKENIZER.decode(inputs[start:stop]))
    assert sorted(seen) == sorted(r["text"] for r in source)
    orders.append(seen)
  assert orders[0] != orders[1] != orders[2]


def test_whole_examples_are_uncut_with_targets_once_an_epoch():
  source = documents(40, longest=60)
  texts = (TOKENIZER.document(record["text"]) for record in source)
  expected = collections.Counter(tuple(w.tolist()) for ids in texts for w in EveryOther().split_ids(ids, L))
  seen, used = collections.Counter(), []
  for batch in take(source, 80, pack="whole")[0]:
    for r in range(B):
      for number in range(1, batch.inputs.segments[r].max() + 1):
        ids = batch.inputs.ids[r][batch.inputs.segments[r] == number]
        targets = batch.targets.segments[r] == number
        np.testing.assert_array_equal(batch.targets.ids[r][targets], ids[::2])
        np.testing.assert_array_equal(batch.labels["nll"][r][targets], ids[::2])
        assert batch.targets.positions[r][targets].tolist() == list(range(len(ids[::2])))
        seen[tuple(ids.tolist())] += 1
    used.append((batch.inputs.segments > 0).mean())
  assert set(seen) == set(expected)
  epochs = [seen[window] / times for window, times in expected.items()]
  assert max(epochs) - min(epochs) <= 2  # rows are in the middle of an epoch
  assert np.mean(used) > 0.75  # most examples have 13 tokens, and rows 16


def test_rows_are_repacked_at_different_steps():
  """Otherwise one step would do all the packing of every block."""
  made = stream(documents(60), pack="whole")
  ends = []
  for _ in range(40):
    before = [row.block for row in made.rows]
    next(made)
    ends.append(sum(old is None for old in before))
  made.close()
  assert ends[0] == B and max(ends[1:]) < B


def test_packed_rows_are_full():
  for batch in take(documents(23), 20)[0]:
    assert (batch.inputs.segments > 0).all()


@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_has_every_token_once(count, hosts):
  source = documents(count)
  evaluate = lambda rows, n=None: eval_batches(  # noqa: E731
    source, TOKENIZER, NextToken(), batch_size=B, seq_len=L, seed=0, rows=rows, num_batches=n
  )
  shares = [range(h * B // hosts, (h + 1) * B // hosts) for h in range(hosts)]
  longest = max(len(evaluate(rows)) for rows in shares)
  parts = [evaluate(rows, longest) for rows in shares]
  assert {len(p) for p in parts} == {longest}
  same([b for p in parts for b in p], [b for rows in shares for b in rows_of(evaluate(range(B)), rows)])
  pairs = collections.Counter()
  for batch in itertools.chain(*parts):
    real = batch.inputs.segments > 0
    assert ((batch.weights["nll"] > 0) == real).all()
    pairs.update(zip(batch.inputs.ids[real].tolist(), batch.labels["nll"][real].tolist()))
  ids = [TOKENIZER.document(r["text"]).tolist() for r in source]
  assert pairs == collections.Counter(pair for d in ids for pair in itertools.pairwise(d))


def test_unpacked_rows_have_one_window_each():
  for batch in take(documents(23), 10, pack=False)[0]:
    assert batch.inputs.segments.max() == 1
    for ids, used in zip(batch.inputs.ids, batch.inputs.segments):
      assert (np.diff(used) <= 0).all() and ids[used == 0].sum() == 0


def test_mixture_draws_by_weight_and_covers_each_source():
  source = join_sources([documents(50, longest=1), documents(7, longest=1, first="b")], [3, 1])
  batches, cursor = take(source, 300)
  counts = np.array([row[1:] for row in cursor["rows"].values()]).sum(axis=0)
  assert abs(counts[0] / counts.sum() - 0.75) < 0.03
  seen = collections.Counter(TOKENIZER.decode(i[:1]) for _, i, _, p in segments(batches) if p[0] == 0 for i in [i[1:]])
  assert seen["a"] > 2.4 * seen["b"] > 0


def test_seeds_and_epochs_have_different_orders_and_draws():
  one, other = (take(documents(23), 3, seed=s)[0][0] for s in (0, 1))
  assert (one.inputs.ids != other.inputs.ids).any()
  single = [b for b in take(documents(1), 40)[0]]
  weights = [tuple(b.weights["nll"][0][:4]) for b in single if b.inputs.ids[0, 0] == TOKENIZER.bos_id]
  assert len(set(weights)) == len(weights) > 1


EMPTY = Source(2, lambda i: {"text": ""}, "none")


def test_documents_without_examples_are_skipped():
  texts = ["", "a", "", "bc", ""]
  source = Source(5, lambda i: {"text": texts[i]}, "some")
  made = TrainStream(source, bytes_tokenizer(special=False), NextToken(), batch_size=2, seq_len=3, seed=0)
  assert set(itertools.chain(*(next(made).inputs.ids.reshape(-1).tolist() for _ in range(9)))) == {ord("b")}
  made.close()


def test_train_stream_of_empty_documents_raises_at_every_next():
  made = TrainStream(EMPTY, bytes_tokenizer(special=False), NextToken(), batch_size=2, seq_len=3, seed=0)
  for _ in range(2):
    with pytest.raises(ConfigError, match="gave no examples"):
      next(made)
  made.close()


def test_eval_batches_of_empty_documents_raise():
  with pytest.raises(ConfigError, match=r"data\.eval: no record of the split gives examples"):
    eval_batches(EMPTY, bytes_tokenizer(special=False), NextToken(), batch_size=2, seq_len=3, seed=0)


def test_count_skipped_counts_records_without_examples():
  def count_skipped(texts, sample_size):
    source = Source(len(texts), lambda i: {"text": texts[i]}, "some")
    settings = {"num_streams": 1, "seq_len": 3, "seed": 0}
    return make_row_filler(source, bytes_tokenizer(special=False), NextToken(), pack=True, **settings).count_skipped(
      sample_size
    )

  assert count_skipped(["", "ab", "", "bc", ""], 64) == (3, 5)
  assert count_skipped([""] * 9 + ["bc"], 2) == (1, 2)
  assert count_skipped([""] * 9, 4) == (4, 4)  # later records may have some
  with pytest.raises(ConfigError, match="none of 9 records gives examples; the texts are empty or too short"):
    count_skipped([""] * 9, 64)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_error_in_a_thread_is_raised_by_every_next(prefetch):
  def read(index):
    if index == 3:
      raise OSError("disk gone")
    return {"text": "abc"}

  made = stream(Source(9, read, "bad"), workers=2, prefetch=prefetch)
  for _ in range(2):
    with pytest.raises(OSError, match="disk gone"):
      list(itertools.islice(made, 20))
  began = time.monotonic()
  made.close()
  assert time.monotonic() - began < 1


def test_cursor_of_another_run_is_refused():
  cursor = stream(documents(9)).cursor
  with pytest.raises(ConfigError, match="batch_size"):
    stream(documents(9), batch_size=2 * B).restore(cursor)
  with pytest.raises(ConfigError, match="seed"):
    stream(documents(9), seed=1).restore(cursor)
  with pytest.raises(ConfigError, match="sources"):
    stream(documents(10)).restore(cursor)
  with pytest.raises(ConfigError, match=r"lacks rows \[0, 1\]"):
    stream(documents(9)).restore(stream(documents(9), rows=[2, 3]).cursor)
  with pytest.raises(ConfigError, match="hosts differ"):
    merge_cursors([cursor, stream(documents(10)).cursor])


@pytest.mark.parametrize("size", [1, 2, 7, 70_000])  # the last one is too large for a table
def test_permute_index_is_a_permutation(size):
  order = [permute_index(i, size, 0, 1) for i in range(size)]
  assert sorted(order) == list(range(size))
  assert size < 7 or order != [permute_index(i, size, 0, 2) for i in range(size)] != sorted(order)


def test_interleaved_neighbouring_batches_share_no_document():
  texts = [chr(33 + i) * 180 for i in range(64)]  # each fills eleven rows
  source = Source(len(texts), lambda i: {"text": texts[i]}, "long")
  open_documents = lambda batch: set(batch.inputs.ids[:, 8].tolist())  # noqa: E731
  alike = lambda batches: [len(open_documents(a) & open_documents(b)) for a, b in itertools.pairwise(batches)]  # noqa: E731
  assert min(alike(take(source, 6)[0])) > 0
  batches, cursor = take(source, 6, interleave=3)
  assert max(alike(batches)) == 0 and cursor["turn"] == 0
  assert all(b.rows.tolist() == list(range(B)) for b in batches)
