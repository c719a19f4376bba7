"""Classification and tagging: labels, losses and answers, which do not depend on the batch or the mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.checkpoints.paths import open_path
from llmjax.cli.main import main
from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.data import packing
from llmjax.data.pipeline import eval_batches
from llmjax.data.sources.base import Source
from llmjax.data.sources.registry import files_source
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.distributed import sharding
from llmjax.examples import Example, RowLengths, TokenSequence
from llmjax.inference import predict
from llmjax.models.transformer import Transformer
from llmjax.objectives import crf, tag_scheme
from llmjax.objectives.classification import classification
from llmjax.objectives.tagging import tagging
from llmjax.objectives.task import FRESH_HEAD_HINT
from llmjax.training.resume import labels_to_reuse
from llmjax.training.step import ModelForward
from llmjax.types import dummy_batch

TOKENIZER = make_tokenizer({"name": "bytes"})
ENCODER = TransformerConfig(TOKENIZER.vocab_size, 16, 0, 2, 64, encoder_layers=2, head_bias=True, init_stddev=0.3)


def source(records):
  return Source(len(records), records.__getitem__, "records")


def make(task, **changes):
  """Return (model, parameters) with the head of a task."""
  model = Transformer(dataclasses.replace(ENCODER, **task.head, **changes))
  return model, jax.jit(model.init)(jax.random.key(0), dummy_batch())["params"]


def plain(params):
  return jax.tree.map(lambda box: box.value, params, is_leaf=lambda x: hasattr(x, "names"))


def batch_of(task, records, size=None):
  [batch] = eval_batches(
    source(records), TOKENIZER, task, batch_size=size or len(records), seq_len=task.seq_len, seed=0
  )
  return batch


def classifier(records, **settings):
  return classification(tokenizer=TOKENIZER, seq_len=32, records=lambda: source(records), **settings)


REVIEWS = [{"text": text, "label": stars} for text, stars in (("good film", 5), ("bad", 1), ("so so", 3), ("fine", 5))]


def test_labels_are_inferred_and_sorted():
  assert classifier([{"text": "x", "label": n} for n in (10, 9, "10", 2.0)]).labels == ("2", "9", "10")
  assert classifier([{"text": "x", "label": n} for n in ("b", "a", None)]).labels == ("a", "b")
  many = classifier([{"text": "x", "label": n} for n in ("b, a", ["c"])], kind="multi")
  assert many.labels == ("a", "b", "c")
  declared = Source(1, lambda i: {"text": "x", "label": "no"}, "f", labels={"label": ("yes", "no")})
  found = classification(tokenizer=TOKENIZER, seq_len=32, records=lambda: declared)
  assert found.labels == ("yes", "no") and found.resolved_config == {"labels": ("yes", "no")}


CLASS_HEAD = {"path": "runs/a", "labels": ["zz", "1", "3", "5"], "scheme": None}
TAG_HEAD = {"path": "runs/a", "labels": ["O", "B-PER", "I-PER", "B-LOC"], "scheme": "none"}


def test_continued_classifier_reuses_the_labels_of_its_head():
  task = classifier(REVIEWS[:2], pretrained_head=CLASS_HEAD)
  assert task.labels == ("zz", "1", "3", "5") and task.encode_label({"label": 5}) == 3


def test_continued_classifier_prefers_labels_of_the_config():
  given = ("5", "3", "1")
  assert classifier(REVIEWS, labels=given, pretrained_head=CLASS_HEAD).labels == given
  assert classifier(REVIEWS, kind="regression", pretrained_head=CLASS_HEAD).labels == ()


def test_continued_classifier_rejects_labels_that_its_head_lacks():
  other = [{"text": "x", "label": label} for label in ("aa", "1")]
  message = r"init_from=runs/a .* labels 'zz', '1', '3', '5', and .* has '1', 'aa'; "
  with pytest.raises(ConfigError, match=message) as error:
    classifier(other, pretrained_head=CLASS_HEAD)
  assert str(error.value).endswith(FRESH_HEAD_HINT) and "\n" not in str(error.value)


def test_continued_tagger_reuses_labels_and_scheme_of_its_head():
  task = tagger(SENTENCES[1:], pretrained_head=TAG_HEAD)
  assert task.labels == ("O", "B-PER", "I-PER", "B-LOC") and task.scheme == "none"


def test_continued_tagger_rejects_labels_that_its_head_lacks():
  with pytest.raises(ConfigError, match="has a head for the labels 'O', 'B-PER'"):
    tagger(SENTENCES, pretrained_head={**TAG_HEAD, "labels": ["O", "B-PER"]})


def test_resumed_run_keeps_its_labels():
  earlier = {"config": {"objective": {"name": "tagging", "labels": ["a", "b"], "scheme": "none"}}}
  ours = {"name": "tagging", "labels": None, "scheme": "iob2"}
  assert labels_to_reuse({"init_from": "runs/a", "objective": ours}, earlier) == {"labels": ["a", "b"]}
  for config, run in (
    ({"init_from": None, "objective": ours}, earlier),
    ({"init_from": "runs/a", "objective": ours}, None),
    ({"init_from": "runs/a", "objective": {**ours, "name": "classification"}}, earlier),
  ):
    assert labels_to_reuse(config, run) == {}


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_classification_loss_equals_its_formula(kind):
  records = [{**r, "label": float(r["label"])} for r in REVIEWS] if kind == "regression" else REVIEWS
  records = [{**r, "label": [str(r["label"])]} for r in records] if kind == "multi" else records
  task = classifier(records, kind=kind)
  model, params = make(task)
  batch = batch_of(task, records, size=6)  # two rows are empty
  logits = np.asarray(model.apply({"params": params}, batch).logits, np.float64)[:4]
  sums, metrics = task.loss(ModelForward(model, plain(params)), jax.tree.map(jnp.asarray, batch), {})
  if kind == "single":
    expected = -log_softmax(logits)[np.arange(4), [2, 0, 1, 2]].sum()
  elif kind == "multi":
    hot = np.eye(3)[[2, 0, 1, 2]]
    p = 1 / (1 + np.exp(-logits))
    expected = -(hot * np.log(p) + (1 - hot) * np.log(1 - p)).sum()
  else:
    expected = np.square(logits[:, 0] - [5, 1, 3, 5]).sum()
  np.testing.assert_allclose(sums["class"], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"][1], {"single": 4, "multi": 12, "regression": 4}[kind])


def test_predictions_do_not_depend_on_batch_or_mesh():
  task = classifier(REVIEWS, pair="other")
  records = [{**REVIEWS[i % 4], "other": "x" * (1 + i % 7), "id": i} for i in range(11)]
  model, params = make(task)
  params = plain(params)
  alone = [predict.predict(model, params, task, [record])[0] for record in records]
  mesh = sharding.make_mesh({"data": -1})
  for settings in (
    predict.PredictionSettings(),
    predict.PredictionSettings(batch_tokens=64),
    predict.PredictionSettings(mesh=mesh),
  ):
    together = predict.predict(model, params, task, records, settings)
    assert [r["label"] for r in together] == [r["label"] for r in alone]
    np.testing.assert_allclose([r["confidence"] for r in together], [r["confidence"] for r in alone], atol=1e-5)


SENTENCES = [
  {"tokens": ["Ada", "Lovelace", "lives", "in", "London"], "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]},
  {"tokens": ["no", "one"], "tags": ["O", "O"]},
  {"tokens": ["Rome"], "tags": ["B-LOC"]},
]


def tagger(records=SENTENCES, seq_len=48, **settings):
  return tagging(tokenizer=TOKENIZER, seq_len=seq_len, records=lambda: source(records), **settings)


def test_tag_labels_are_at_the_first_token_of_each_word():
  task = tagger()
  assert task.labels == ("B-LOC", "B-PER", "I-PER", "O") and task.scheme == "iob2"
  for record in SENTENCES:
    [example] = task.encode_record(record, labelled=True)
    text = TOKENIZER.decode(example.inputs.ids)
    places = np.flatnonzero(example.weights["tag"])
    assert text == " ".join(record["tokens"]) and len(places) == len(record["tokens"])
    assert [task.labels[t] for t in example.labels["tag"][places]] == record["tags"]
    for place, word in zip(places, record["tokens"], strict=True):
      assert TOKENIZER.decode(example.inputs.ids[place:]).strip().startswith(word)


@pytest.mark.parametrize("last", ["I-PER", "E-PER"])
def test_long_sentence_is_split_without_cutting_spans(last):
  tags = ["B-PER", last, "O", "O", "B-LOC" if last == "I-PER" else "S-LOC"] * 3
  record = {"tokens": SENTENCES[0]["tokens"] * 3, "tags": tags}
  task = tagger([record], seq_len=22)
  found = task.encode_record(record, labelled=True)
  assert len(found) > 3 and sum(f.weights["tag"].sum() for f in found) == len(tags)
  assert [task.labels[t] for f in found for t in f.labels["tag"][f.weights["tag"] > 0]] == tags
  for example in found:
    ids, real = example.inputs.ids, example.weights["tag"] > 0
    assert len(ids) <= 22 and ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id and not real[[0, -1]].any()
    words = TOKENIZER.decode(ids).split()
    assert [TOKENIZER.decode(ids[place:]).split()[0] for place in np.flatnonzero(real)] == words
    assert tag_scheme.first_violation([task.labels[t] for t in example.labels["tag"][real]], task.scheme) is None
  windows = task.encode_record(record, labelled=False)
  decoded = [{"tags": np.full(len(w.inputs), task.labels.index("O")), "probabilities": np.ones(99)} for w in windows]
  assert task.make_result(record, windows, decoded)["tags"] == ["O"] * len(tags)


def test_plain_tags_are_scored_by_word_and_text_is_tagged():
  pos = [{"tokens": ["a", "dog"], "tags": ["DT", "NN"]}, {"tokens": ["the"], "tags": ["DT"]}]
  task = tagger(pos)
  assert task.scheme == "none"
  measured = task.compute_metrics(pos, [{"tags": ["DT", "DT"]}, {"tags": ["DT"]}])
  assert measured["accuracy"] == pytest.approx(2 / 3) and "f1" in measured
  task = tagger()
  model, params = make(task)
  [result] = predict.predict(model, plain(params), task, [{"text": "Ada  met (Rome)."}])
  assert len(result["tags"]) == 6
  for span in result["spans"]:
    assert "Ada  met (Rome)."[span["start"] : span["end"]] == span["text"]


@pytest.mark.parametrize("use_crf", [False, True])
def test_tagging_of_packed_sentences_equals_each_alone(use_crf):
  task = tagger(use_crf=use_crf)
  model, params = make(task)
  params = plain(params)
  if use_crf:
    rng = np.random.default_rng(0)
    params["crf"] = {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in params["crf"].items()}
  forward = ModelForward(model, params)
  packed = batch_of(task, SENTENCES, size=1)
  assert packed.inputs.segments.max() > 1
  alone = [batch_of(task, [record]) for record in SENTENCES]
  total, _ = task.loss(forward, jax.tree.map(jnp.asarray, packed), {})
  each = [task.loss(forward, jax.tree.map(jnp.asarray, b), {})[0]["tag"] for b in alone]
  np.testing.assert_allclose(total["tag"], sum(each), rtol=1e-5)
  if use_crf:  # one sentence, by the definition
    out = model.apply({"params": params}, alone[0])
    mask = alone[0].weights["tag"] > 0
    scores = np.asarray(out.logits, np.float64)[0][mask[0]]
    tags = alone[0].labels["tag"][0][mask[0]]
    t = jax.tree.map(
      lambda x: np.asarray(x, np.float64), crf.add_transitions(crf.Transitions(**params["crf"]), task.constraints)
    )
    alpha = t.start + scores[0]
    for row in scores[1:]:
      alpha = np.logaddexp.reduce(alpha[:, None] + t.matrix, axis=0) + row
    gold = t.start[tags[0]] + scores[np.arange(len(tags)), tags].sum() + t.matrix[tags[:-1], tags[1:]].sum()
    expected = np.logaddexp.reduce(alpha + t.end) - gold - t.end[tags[-1]]
    np.testing.assert_allclose(each[0], expected, rtol=1e-5)


@pytest.mark.parametrize("use_crf", [False, True])
def test_predicted_tags_follow_their_scheme_and_spans_have_offsets(use_crf):
  task = tagger(use_crf=use_crf)
  model, params = make(task)
  words = [{"tokens": ["".join(w) for w in np.random.default_rng(i).choice(list("abc"), (4, 3))]} for i in range(50)]
  for record, result in zip(words, predict.predict(model, plain(params), task, words), strict=True):
    for before, tag in zip(["O", *result["tags"]], result["tags"], strict=False):
      assert not tag.startswith("I-") or before[2:] == tag[2:]
    text = " ".join(record["tokens"])
    for span in result["spans"]:
      assert text[span["start"] : span["end"]] == span["text"]
    assert 0 <= result["confidence"] <= 1


def test_unpacked_rows_carry_labels_of_any_shape():
  example = Example(TokenSequence([1, 2]), row_labels={"a": 3, "b": [0.5, 1.5]}, row_weights={"a": 1.0})
  rows = [packing.pack_row(examples, example, RowLengths(4)) for examples in ([example], [])]
  batch = packing.stack_rows(rows, [0, 1])
  assert batch.labels["a"].tolist() == [3, 0] and batch.labels["b"].tolist() == [[0.5, 1.5], [0, 0]]
  assert batch.weights["a"].tolist() == [1, 0] and batch.inputs.segments.tolist() == [[1, 1, 0, 0], [0] * 4]


@pytest.mark.parametrize(
  ("make_task", "record", "message"),
  [
    (classifier, {"text": "x", "label": "4"}, r"'label': must be one of the 3 labels, got '4'"),
    (classifier, {"text": " ", "label": "5"}, r"'text': must not be empty"),
    (classifier, {"texts": "x", "label": "5"}, r"no field 'text'.*did you mean `texts`"),
    (classifier, {"text": 3, "label": "5"}, r"'text': must be text, got 3"),
    (
      tagger,
      {"tokens": ["a"], "tags": []},
      r"'tags': must have a tag for each word of 'tokens', got 0 tags",
    ),
    (
      tagger,
      {"tokens": ["a", "b"], "tags": ["O", "I-PER"]},
      r"'I-PER' after 'O', at word 1 .*'b'.*violates objective.scheme",
    ),
    (tagger, {"tokens": ["a"], "tags": ["B-ORG"]}, r"'tags': must be among the 4 labels, got 'B-ORG'"),
    (tagger, {"tokens": [], "tags": []}, r"'tokens': must not be empty"),
  ],
)
def test_bad_task_record_is_one_line(make_task, record, message):
  task = classifier(REVIEWS) if make_task is classifier else tagger()
  with pytest.raises(ConfigError, match=message):
    task.check_record(record, labelled=True)
  with pytest.raises(ConfigError, match=r"record 0 \(from 0\): .*" + message):
    batch_of(task, [record])


def test_classifier_trained_on_csv_predicts_and_is_trained_again(home, capsys):
  """The command line infers labels, holds out a part, reports bad lines and reads its pseudo-labels back."""
  rows = "".join(f"{'good' if i % 2 else 'bad'} number {i},{i % 2 * 4 + 1}\n" for i in range(40))
  (home / "my.csv").write_text("review,stars\n" + rows)
  small = ["--config.data.tokenizer.vocab_size=300", "--config.evals.answers.limit=none"]
  flags = [f"--config=classify:train={home / 'my.csv'},text=review,label=stars,debug", *small]
  run = str(home / "run")
  assert main(["train", *flags, f"--workdir={run}"]) == 0
  assert "answers/accuracy" in capsys.readouterr().out
  with open_path(run) as found:
    assert list(found.config["objective"]["labels"]) == ["1", "5"]
  assert main(["evaluate", f"--model={run}", f"--data={home / 'my.csv'}"]) == 0
  assert "answers/accuracy" in capsys.readouterr().out

  lines = ['{"id": 7, "review": "good"}', "", '{"text": "x\t"}', '{"text": "x"}', '{"review": "bad"}', "", ""]
  (home / "in.jsonl").write_text("\n".join(lines))
  command = ["predict", f"--model={run}", f"--input={home / 'in.jsonl'}", f"--output={home / 'out.jsonl'}"]
  assert main(command) == 2
  said = capsys.readouterr().err
  assert "in.jsonl:2: the line is blank" in said and "in.jsonl:4: there is no field 'review'" in said
  assert "in.jsonl:3: not a JSON object: Invalid control character at column 12" in said and "3 of 5 lines" in said
  out = [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]
  assert out[0]["id"] == 7 and out[0]["stars"] in ("1", "5") and [o.get("line") for o in out] == [None, 2, 3, 4, None]

  (home / "in.jsonl").write_text("\n".join([lines[0], lines[4]] * 8))
  assert main([*command, "--min_confidence=0"]) == 0
  kept = list(files_source("train", str(home / "out.jsonl"), None, ("review", "stars")))
  numbers = classification(tokenizer=TOKENIZER, seq_len=32, kind="regression")
  assert not numbers.has_confidence and numbers.head["num_classes"] == 1
  (home / "empty.jsonl").write_text("\n")
  assert main(["predict", f"--model={run}", f"--input={home / 'empty.jsonl'}", f"--output={home / 'o.jsonl'}"]) == 2
  assert main([*command, "--num_beams=2"]) == 2
  assert "num_beams=2 is for tasks that generate text" in capsys.readouterr().err
  (home / "link.jsonl").symlink_to(home / "in.jsonl")
  before = (home / "in.jsonl").read_text(), (home / "out.jsonl").read_text()
  assert main([*command[:3], f"--output={home / 'link.jsonl'}"]) == 2
  assert "over --input" in capsys.readouterr().err
  assert main([*command[:2], f"--input={home / 'my.csv'}", command[3]]) == 2
  assert "predict reads JSONL" in capsys.readouterr().err
  assert before == ((home / "in.jsonl").read_text(), (home / "out.jsonl").read_text())
  assert len(kept) == 16 and {r["stars"] for r in kept} <= {"1", "5"} and all("scores" not in r for r in kept)


def test_tagger_is_trained_again_on_its_pseudo_labels(home, capsys):
  """A run that continues another reuses its labels, also when resumed, and rejects others with their location."""

  def write(name, records):
    (home / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return home / name

  def train(argument, workdir, *flags):
    small = ("--config.data.tokenizer.vocab_size=300", "--config.total_steps=1", *flags)
    status = main(["train", f"--config=tag:crf,debug,{argument}", f"--workdir={home / workdir}", *small])
    return status, capsys.readouterr().err

  gold = write("gold.jsonl", SENTENCES * 8)
  assert train(f"train={gold}", "first")[0] == 0
  texts = [{"text": f"Ada  met ({name})."} for name in ("Rome", "Ada", "no one") * 5]
  plain, sure = write("plain.jsonl", texts), home / "sure.jsonl"
  command = ["predict", f"--model={home / 'first'}", f"--input={plain}", f"--output={sure}", "--min_confidence=0"]
  assert main(command) == 0
  kept = [json.loads(line) for line in sure.read_text().splitlines()]
  assert [r["text"] for r in kept] == [r["text"] for r in texts]
  for record in kept:
    assert len(record["tokens"]) == len(record["tags"]) and "".join(record["tokens"]) == record["text"].replace(" ", "")
    assert all(record["text"][s["start"] : s["end"]] == s["text"] for s in record["spans"])

  again = f"init_from={home / 'first'}"
  few = write("few.jsonl", [{"tokens": ["no", "one"], "tags": ["O", "O"]}] * 16)
  for name, file in (("second", sure), ("third", few)):
    assert train(f"{again},train={file}", name)[0] == 0
    with open_path(home / name) as found:
      assert list(found.config["objective"]["labels"]) == ["B-LOC", "B-PER", "I-PER", "O"]
  assert train(f"{again},train={few}", "third", "--config.total_steps=2")[0] == 0
  strange = [{"tokens": ["it"], "tags": ["B-ORG"]}]
  bad = write("bad.jsonl", [*SENTENCES, *strange])
  status, said = train(f"{again},train={bad}", "fourth")
  assert status == 2 and "has a head for the labels" in said and "'B-ORG'" in said
  status, said = train(f"{again},train={gold},eval={bad}", "fourth", "--config.evals.answers.limit=1")
  assert status == 2 and "bad.jsonl:4, of split 'validation': 'tags': must be among the 4 labels, got 'B-ORG'" in said
