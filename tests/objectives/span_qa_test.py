"""Extractive question answering: windows and labels against sets of characters, answers against sums by hand."""

import dataclasses
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError, build
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.examples import RowLengths
from llmjax.models.transformer import Transformer
from llmjax.objectives import OBJECTIVES
from llmjax.objectives.span_qa import NUM_BEST_SPANS, SpanQA, accepted_answers, best_spans
from llmjax.training import step
from llmjax.types import Outputs
from tests.support.cases import BERT, TOKENIZER, pack_batch, parameters

FOLDERS = Path(__file__).parents[1] / "testdata" / "tokenizers"
SMALL = {"stride": 5, "max_question": 8, "max_answer": 30}
WORDS = ["of", "Zürich", "日本語", "e\u0301tude", "🙂", "in", "1984", "fox,", "naïve", "(quick)", "a.b", "Ünë"]


@pytest.fixture(scope="module", params=["bytes", "bert", "gpt2", "t5"])
def made(request):
  if request.param == "bytes":
    return TOKENIZER
  return make_tokenizer({"name": "hf", "path": str(FOLDERS / request.param)})


def records(seed, count=40, answerable=1.0):
  """Yield records of random words between spaces and line ends; an answer is some words, at times with a space."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    words = [str(rng.choice(WORDS)) for _ in range(int(rng.integers(1, 40)))]
    gaps = [str(gap) for gap in rng.choice([" ", " ", " ", "  ", "\n"], len(words) - 1)] + [""]
    begins = np.cumsum([0, *(len(word + gap) for word, gap in zip(words, gaps))])
    first = int(rng.integers(len(words)))
    last = int(rng.integers(first, min(first + 3, len(words))))
    context = "".join(word + gap for word, gap in zip(words, gaps))
    start, stop = int(begins[first]), int(begins[last]) + len(words[last])
    if rng.random() < 0.3 and first > 0:
      start -= 1
    answers = [{"text": context[start:stop], "start": start}, {"text": words[0], "start": 0}]
    question = "  Which fox is quick?" if rng.random() < 0.5 else "Ü?"
    yield {"question": question, "context": context, "answers": answers if rng.random() < answerable else []}


def make_batch(examples, length):
  """Return a batch with an example in each row."""
  return pack_batch(examples, RowLengths(length), len(examples))


def test_windows_cover_every_token_and_overlap_by_the_stride(made):
  several = 0
  for seed, (length, stride) in enumerate([(32, 5), (24, 0), (64, 20)]):
    objective = SpanQA(made, length, **(SMALL | {"stride": stride}))
    for record in records(seed):
      windows, offsets = objective.split_context(record)
      ids = made.encode(record["context"])
      question = made.encode(record["question"].strip())[:8]
      assert len(offsets) == len(ids) and windows[0].part.start == 0 and windows[-1].part.stop == len(ids)
      for window in windows:
        part = ids[window.part]
        assert window.ids[window.offset : window.offset + len(part)].tolist() == part.tolist()
        expected, types, _ = made.assemble(question, part, 1000)  # nothing is truncated
        assert window.ids.tolist() == expected.tolist() and window.token_types.tolist() == types.tolist()
      for one, next_ in itertools.pairwise(windows):
        assert len(one.ids) == length and one.part.stop - next_.part.start == stride
        assert next_.part.stop > one.part.stop
        several += 1
  assert several > 50


def test_labels_are_the_shortest_span_with_the_answer(made):
  objective = SpanQA(made, 32, **SMALL)
  held, missed = 0, 0
  for record in records(1, count=80):
    objective.check_record(record, labelled=True)
    windows, offsets = objective.split_context(record)
    text, start = record["answers"][0]["text"], record["answers"][0]["start"]
    inner = {i for i in range(start, start + len(text)) if not record["context"][i].isspace()}
    parts = [inner & set(range(*place)) for place in offsets.tolist()]
    answer = [i for i, part in enumerate(parts) if part]
    found = objective.encode_record(record, labelled=True)
    assert len(found) == (len(windows) if answer else 0)
    for example, window in zip(found, windows):
      assert all(weight == 1 for weight in example.row_weights.values())
      begin, end = (int(example.row_labels[name]) for name in ("begin", "end"))
      if not set(answer) <= set(range(window.part.start, window.part.stop)):
        assert begin == end == 0
        missed += 1
        continue
      held += 1
      assert [begin, end] == [window.offset + i - window.part.start for i in (answer[0], answer[-1])]
      there = record["context"][offsets[answer[0], 0] : offsets[answer[-1], 1]]
      assert text.strip() in there
      if made is TOKENIZER:
        assert there == text.strip()
  assert held > 50 and missed > 20


@pytest.mark.parametrize("no_answer", [False, True])
def test_decode_of_perfect_logits_returns_all_answers(made, no_answer):
  """Logits are noise, except that labels have high logits, and padding the highest."""
  objective = SpanQA(made, 40, **SMALL | {"stride": 25, "max_question": 3}, no_answer=no_answer)
  known = list(records(2, answerable=0.6 if no_answer else 1.0))
  encoded = [objective.encode_record(record, labelled=True) for record in known]
  # An answer with more tokens than two windows share may be complete in no window, and then has no label.
  learned = [not r["answers"] or any(f.row_labels["begin"] for f in e) for r, e in zip(known, encoded)]
  known, encoded = (list(itertools.compress(x, learned)) for x in (known, encoded))
  examples = [f for each in encoded for f in each]
  batch = make_batch(examples, 48)
  logits = np.random.default_rng(0).normal(size=(len(examples), 48, 2))
  logits[np.asarray(batch.inputs.segments) == 0] = 99
  for i, name in enumerate(("begin", "end")):
    logits[np.arange(len(examples)), batch.labels[name], i] = 20
  decoded = jax.tree.map(np.asarray, objective.decode_outputs(Outputs(logits=jnp.asarray(logits)), batch))
  rows = iter([{name: x[i] for name, x in decoded.items()} for i in range(len(examples))])
  results = []
  for record in known:
    bare = {"question": record["question"], "context": record["context"]}
    plain = objective.encode_record(bare, labelled=False)
    result = objective.make_result(bare, plain, list(itertools.islice(rows, len(plain))))
    assert result["answer"] == bare["context"][result["start"] : result["end"]]
    assert result["answer"] == (record["answers"][0]["text"].strip() if record["answers"] else "") or made.name == "hf"
    assert result["confidence"] > 0.99 and ("no_answer_probability" in result) == no_answer
    results.append(result)
  scores = objective.compute_metrics(known, results)
  assert len(known) > 30 and sum(len(e) > 1 for e in encoded) > 15
  assert scores["exact_match"] == scores["f1"] == 1.0
  assert scores.get("no_answer_accuracy") == (1.0 if no_answer else None)


def answer(logits, **settings):
  """Return the answer in "ab c", read as bytes in windows of 3 that share 2, after a question of one byte."""
  objective = SpanQA(TOKENIZER, 7, **{"stride": 2, "max_question": 1, "max_answer": 2, **settings})
  record = {"question": "q", "context": "ab c"}
  examples = objective.encode_record(record, labelled=False)
  assert [f.inputs.ids[3:6].tolist() for f in examples] == [[*b"ab "], [*b"b c"]]
  return objective.make_result(record, examples, [{"begin": np.array(b), "end": np.array(e)} for b, e in logits])


def test_answers_and_confidences_equal_hand_computation():
  """Spans of "ab ": a 1 + 0, ab 1 + 2, b 0 + 2; of "b c": b 1 + 1, c 3 - 2 ("b c" is longer than 2)."""
  x = 50.0  # of question, special tokens and spaces, which an answer never contains
  first = ([2.0, x, x, 1, 0, x, x], [1.0, x, x, 0, 2, x, x])
  second = ([3.0, x, x, 1, x, 3, x], [0.5, x, x, 1, x, -2, x])
  spans = {"a": 1, "ab": 3, "b": 2, "c": 1}  # b is in both windows, with the same score
  total = sum(map(math.exp, spans.values()))
  expected = {"answer": "ab", "start": 0, "end": 2, "score": 3.0, "confidence": round(math.exp(3) / total, 6)}
  expected["answers"] = [{"text": "ab", "start": 0}]
  assert answer([first, second]) == expected
  SpanQA(TOKENIZER, 7, stride=2, max_question=1).check_record(
    {"question": "q", "context": "ab c", **expected}, labelled=True
  )  # a prediction is a valid label
  assert answer([first, second], max_answer=1)["answer"] == "b"
  assert answer([first, ([0.0, x, x, 1, x, 5, x], second[1])])["answer"] == "ab"  # the earlier window wins a tie
  assert answer([first, ([0.0, x, x, 1, x, 6, x], second[1])])["answer"] == "c"

  # The first token's score is 3 in one window and 3.5 in the other. The smaller counts, and equals the best span's.
  given = answer([first, second], no_answer=True)
  total += math.exp(3)
  assert given == expected | {k: round(math.exp(3) / total, 6) for k in ("confidence", "no_answer_probability")}
  none = answer([first, second], no_answer=True, no_answer_threshold=-0.1)
  assert none == given | {"answers": [], "answer": "", "start": 0, "end": 0}
  higher = [([b[0] + 2, *b[1:]], e) for b, e in (first, second)]
  assert answer(higher, no_answer=True)["answer"] == ""
  assert answer(higher, no_answer=True, no_answer_threshold=2.0)["answer"] == "ab"
  assert answer(higher)["answer"] == "ab"


def test_best_spans_equal_brute_force():
  rng = np.random.default_rng(0)
  for length, longest in ((1, 3), (7, 1), (9, 4), (5, 5)):
    begin, end = rng.normal(size=(2, length))
    begin[rng.random(length) < 0.3] = -np.inf
    spans = [(begin[i] + end[j], i, j) for i in range(length) for j in range(i, min(i + longest, length))]
    expected = sorted((s for s in spans if s[0] > -np.inf), reverse=True)[:NUM_BEST_SPANS]
    assert best_spans(begin, end, longest, NUM_BEST_SPANS) == expected


def test_empty_context_has_no_answer(made):
  objective = SpanQA(made, 32, **SMALL)
  record = {"question": "q?", "context": "\u200b" if made.name == "hf" else " x"}
  examples = objective.encode_record(record, labelled=False)
  length = len(examples[0].inputs.ids)
  result = objective.make_result(record, examples, [{"begin": np.zeros(length), "end": np.zeros(length)}])
  assert result["answer"] == record["context"][result["start"] : result["end"]] and 0 <= result["confidence"] <= 1


def test_loss_with_padding_is_the_mean_of_two_cross_entropies():
  objective = build({"name": "span_qa", **SMALL}, OBJECTIVES, "objective", tokenizer=TOKENIZER, seq_len=32)
  cfg = dataclasses.replace(BERT, **objective.head, sentence_classes=0)
  params, _ = parameters(cfg)
  examples = [f for record in records(3, count=3) for f in objective.encode_record(record, labelled=True)]

  @jax.jit
  def run(batch):
    forward = step.ModelForward(Transformer(cfg), params)
    return forward(batch, {}).logits, objective.loss(forward, batch, {})

  sizes = [len(f.inputs.ids) for f in examples]
  labels = {name: np.array([f.row_labels[name] for f in examples]) for name in ("begin", "end")}
  assert len(set(sizes)) > 1 and len(sizes) > 3
  values = []
  for length in (32, 40):
    batch = make_batch(examples, length)
    logits = np.asarray(run(batch)[0], np.float64)
    best = [[logits[row, :size, i].argmax() for row, size in enumerate(sizes)] for i in (0, 1)]
    for i, name, rows in ((0, "begin", slice(0, 3)), (1, "end", slice(2, 4))):
      labels[name][rows] = best[i][rows]  # otherwise accuracies would be 0
    sums, metrics = run(dataclasses.replace(batch, labels=labels))[1]
    right = np.stack([labels["begin"] == best[0], labels["end"] == best[1]])
    expected = np.zeros(2)
    for i, name in enumerate(labels):
      for row, size in enumerate(sizes):
        scores = logits[row, :size, i]
        expected[i] += np.log(np.exp(scores).sum()) - scores[labels[name][row]]
    np.testing.assert_allclose([sums["begin"], sums["end"]], expected, rtol=1e-5)
    means = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    shares = {"begin_accuracy": right[0].mean(), "end_accuracy": right[1].mean(), "exact": right.all(0).mean()}
    assert means == pytest.approx({"loss": expected.mean() / len(sizes), **shares}, rel=1e-5)
    value = step.objective_value(sums, objective.weights(batch), objective)
    assert float(value) == pytest.approx(means["loss"], rel=1e-6)
    values.append(float(value))
  assert right[0].sum() != right[1].sum() and right.all(0).any()
  assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_answers_are_read_in_the_formats_of_datasets():
  want = [("b", 1), ("a", 0)]
  for value in (
    [{"text": "b", "start": 1}, {"text": "a", "answer_start": np.int32(0)}],
    {"text": ["b", "a"], "answer_start": [1, 0]},
    {"text": np.array(["b", "a"]), "start": np.array([1, 0])},
  ):
    assert accepted_answers(value, "answers") == want
  assert accepted_answers({"text": "b", "start": 1}, "answers") == want[:1]
  assert accepted_answers({"text": [], "answer_start": []}, "answers") == accepted_answers([], "answers") == []
  objective = SpanQA(TOKENIZER, 32, **SMALL)
  unknown = {"question": "q", "context": "c", "answers": None}
  objective.check_record(unknown, labelled=True)
  assert objective.encode_record(unknown, labelled=True) == []


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"stride": -1}, r"objective\.stride: must be at least 0, got -1"),
    ({"max_answer": 0}, r"objective\.max_answer: must be at least 1, got 0"),
    ({"stride": 21}, r"seq_len: leaves 29 tokens .*got 32\. Set objective\.stride to at most 20, or increase seq_len"),
    ({"max_question": 29}, r"seq_len: leaves 29 tokens .*got 32\. Decrease objective\.max_question"),
    ({"no_answer_threshold": 1.0}, r"no_answer_threshold: must be a finite number, and 0 unless .*got 1\.0"),
  ],
)
def test_bad_span_qa_settings_are_one_line(settings, message):
  SpanQA(TOKENIZER, 32, **SMALL | {"stride": 20})
  with pytest.raises(ConfigError, match=message):
    SpanQA(TOKENIZER, 32, **SMALL | settings)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"context": " "}, r"'context': must not be empty"),
    ({"question": 3}, r"'question': must be text, got 3"),
    ({"answers": []}, r"'answers': must not be empty with objective\.no_answer=False\. Set objective\.no_answer=True"),
    ({"answers": "is"}, r"'answers': must be a list of answers such as .*, got 'is'"),
    ({"answers": [{"text": "is"}]}, r"'answers': must be a list of answers such as"),
    ({"answers": {"text": ["is", "a"], "start": [5]}}, r"got 2 texts and 1 starts"),
    (
      {"answers": [{"text": " ", "start": 4}]},
      r"with a text that is not empty, got ' '\. If there .* write \[\]",
    ),
    ({"answers": [{"text": "is", "start": "5"}]}, r"with a whole number of characters as start, got '5'"),
    (
      {"answers": [{"text": "is", "start": 4}]},
      r"'is' must be at its start 4 in 'context', got ' i'\. .* The answer is at 5 and 1 more places: fix",
    ),
    (
      {"answers": [{"text": "a", "start": -1}]},
      r"'a' must be at its start -1 .* at 8 and 1 more places: fix",
    ),
    (
      {"answers": [{"text": "was", "start": 5}]},
      r"'was' must be at its start 5 .* context does not contain the answer: fix",
    ),
  ],
)
def test_bad_span_qa_record_is_one_line(fields, message):
  objective = SpanQA(TOKENIZER, 32, **SMALL)
  record = {"question": "What?", "context": "This is a cat", "answers": [{"text": "is", "start": 5}]}
  objective.check_record(record, labelled=True)
  with pytest.raises(ConfigError, match=message) as error:
    objective.check_record(record | fields, labelled=True)
  assert "\n" not in str(error.value)
  if "answers" in fields:
    objective.check_record(record | fields, labelled=False)
    objective.check_record({"question": "What?", "context": "This is a cat"}, labelled=False)
