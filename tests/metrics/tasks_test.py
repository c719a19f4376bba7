"""What metrics of tasks say is what counting by hand says, and what the libraries say where they are right."""

import itertools
import math
import sys
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from sklearn import metrics as sklearn

from llmjax.config import ConfigError
from llmjax.metrics import tasks

pytestmark = pytest.mark.filterwarnings("error")

CHINESE = "今天天气很好，我们去公园散步。"
JAPANESE = "今日は良い天気なので公園を散歩します。"
KOREAN = "오늘은 날씨가 좋아서 공원을 걷습니다."
THAI = "วันนี้อากาศดี เราไปเดินเล่นในสวนสาธารณะ"
ARABIC = "ذهبنا اليوم إلى الحديقة"
HINDI = "आज हम हिन्दी में बगीचे गए"
RUSSIAN = "Сегодня мы гуляли в парке."
ENGLISH = "The well-known cats don't sit on 2 mats.\nThey were running, x_1 says!"


def f1(truths, predictions, name):
  """By the formula, of sets or lists of labels."""
  hits = sum(name in t and name in p for t, p in zip(truths, predictions))
  return 2 * hits / max(sum(name in t for t in truths) + sum(name in p for p in predictions), 1)


# choices


def test_classification_is_that_of_the_formulas():
  rng = np.random.default_rng(0)
  for labels in (["no", "yes"], ["a", "b", "c", "never"]):
    truths, predictions = rng.choice(labels[:3], 40).tolist(), rng.choice(labels[:3], 40).tolist()
    found = tasks.classification(truths, predictions, labels)
    assert found["accuracy"] == np.mean([t == p for t, p in zip(truths, predictions)])
    each = [f1([[t] for t in truths], [[p] for p in predictions], label) for label in labels[:3]]
    assert found["f1_macro"] == pytest.approx(np.mean(each))  # "never" occurs nowhere
    one_hot = [np.array([[x == label for label in labels] for x in side], float) for side in (truths, predictions)]
    x, y = (side - side.mean(axis=0) for side in one_hot)
    assert found["matthews"] == pytest.approx(np.sum(x * y) / math.sqrt(np.sum(x * x) * np.sum(y * y)))
    if len(labels) == 2:
      assert found["f1"] == pytest.approx(each[1])
      tp, tn, fp, fn = (
        sum((t, p) == pair for t, p in zip(truths, predictions))
        for pair in (("yes", "yes"), ("no", "no"), ("no", "yes"), ("yes", "no"))
      )
      matthews = (tp * tn - fp * fn) / math.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
      assert found["matthews"] == pytest.approx(matthews)
    else:
      assert "f1" not in found


def test_a_prediction_that_is_no_label_is_wrong():
  found = tasks.classification(["no", "yes"], ["no", "yes, indeed"], ["no", "yes"])
  assert (found["accuracy"], found["f1"], found["f1_macro"]) == (0.5, 0.0, 0.5)
  found = tasks.multi_label([["joy"]], [["joy", "bliss"]], ["joy", "fear"])
  assert found == {"f1_micro": pytest.approx(2 / 3), "f1_macro": 1.0, "exact_match": 0.0}


@pytest.mark.parametrize("labels", [["a", "b", "c", "never"], ["a"]])
def test_multi_label_is_that_of_the_formulas(labels):
  rng = np.random.default_rng(0)
  occurring = labels[:3]
  truths, predictions = ([set(rng.choice(occurring, rng.integers(4))) for _ in range(30)] for _ in range(2))
  found = tasks.multi_label(truths, [list(p) for p in predictions], labels)
  hits = sum(len(t & p) for t, p in zip(truths, predictions))
  assert found["f1_micro"] == pytest.approx(2 * hits / sum(len(t) + len(p) for t, p in zip(truths, predictions)))
  assert found["f1_macro"] == pytest.approx(np.mean([f1(truths, predictions, label) for label in occurring]))
  assert found["exact_match"] == np.mean([t == p for t, p in zip(truths, predictions)])


def test_correlations_are_those_of_the_formulas_ties_too():
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 5, (2, 30)).astype(float)

  def pearson(x, y):
    x, y = x - np.mean(x), y - np.mean(y)
    return np.sum(x * y) / math.sqrt(np.sum(x * x) * np.sum(y * y))

  def ranks(x):
    return np.array([np.sum(x < value) + (np.sum(x == value) + 1) / 2 for value in x])

  assert tasks.regression(x.tolist(), y.tolist()) == {
    "pearson": pytest.approx(pearson(x, y)),
    "spearman": pytest.approx(pearson(ranks(x), ranks(y))),
    "mse": pytest.approx(np.mean((x - y) ** 2)),
  }


@pytest.mark.parametrize("truths, predictions", [([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3), ([1], [2])])
def test_what_is_constant_correlates_with_nothing(truths, predictions):
  found = tasks.regression(truths, predictions)
  assert (found["pearson"], found["spearman"]) == (0, 0) and found["mse"] > 0


def test_clusters_are_compared_pair_by_pair():
  rng = np.random.default_rng(0)
  truths, clusters = rng.integers(0, 3, 25).tolist(), rng.integers(0, 4, 25).tolist()
  pairs = Counter((truths[i] == truths[j], clusters[i] == clusters[j]) for i, j in itertools.combinations(range(25), 2))
  a, b, c, d = (pairs[key] for key in ((True, True), (True, False), (False, True), (False, False)))

  def entropy(side):
    shares = np.array(list(Counter(side).values())) / len(side)
    return -np.sum(shares * np.log(shares))

  mutual = entropy(truths) + entropy(clusters) - entropy(list(zip(truths, clusters)))
  names = ["news" if t else "sport" if t is None else "art" for t in truths]
  assert tasks.clustering(truths, clusters) == {
    "ari": pytest.approx(2 * (a * d - b * c) / ((a + b) * (b + d) + (a + c) * (c + d))),
    "nmi": pytest.approx(2 * mutual / (entropy(truths) + entropy(clusters))),
  }
  assert tasks.clustering(names, names) == {"nmi": 1.0, "ari": 1.0}


# tags


def spans_of(tags):
  """{(start, stop, type)} by trying all: I begins a span too where none of its type is open before it."""
  found = set()
  for i, j in itertools.combinations(range(len(tags) + 1), 2):
    kind = tags[i][2:]
    begins = tags[i][0] == "B" or (tags[i][0] == "I" and (i == 0 or tags[i - 1][2:] != kind))
    ends = j == len(tags) or tags[j] != f"I-{kind}"
    if begins and ends and all(tag == f"I-{kind}" for tag in tags[i + 1 : j]):
      found.add((i, j, kind))
  return found


def test_spans_are_those_of_trying_all_ill_formed_ones_too():
  rng = np.random.default_rng(0)
  tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
  truths, predictions = ([rng.choice(tags, n).tolist() for n in range(40)] for _ in range(2))
  found = tasks.spans([tuple(t) for t in truths], predictions)

  def scores(kinds):
    true, predicted = (
      {(n, *span) for n, row in enumerate(side) for span in spans_of(row) if span[2] in kinds}
      for side in (truths, predictions)
    )
    hits = len(true & predicted)
    return hits / len(predicted), hits / len(true), 2 * hits / (len(predicted) + len(true))

  assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(scores(("PER", "LOC")))
  assert found["f1/PER"] == pytest.approx(scores("PER".split())[2])
  assert found["f1/LOC"] == pytest.approx(scores("LOC".split())[2])
  flat = [t == p for row in zip(truths, predictions) for t, p in zip(*row)]
  assert found["accuracy"] == pytest.approx(np.mean(flat))


def test_every_scheme_says_the_same_of_the_same_spans():
  one = {
    "iob1": ["I-X", "I-X", "B-X", "O", "I-Y", "I-X"],
    "iob2": ["B-X", "I-X", "B-X", "O", "B-Y", "B-X"],
    "iobes": ["B-X", "E-X", "S-X", "O", "S-Y", "S-X"],
    "bilou": ["B-X", "L-X", "U-X", "O", "U-Y", "U-X"],
  }
  other = {
    "iob1": ["I-X", "B-X", "I-X", "O", "I-Y", "O"],
    "iob2": ["B-X", "B-X", "I-X", "O", "B-Y", "O"],
    "iobes": ["S-X", "B-X", "E-X", "O", "S-Y", "O"],
    "bilou": ["U-X", "B-X", "L-X", "O", "U-Y", "O"],
  }
  assert set(one) == set(tasks.SCHEMES)
  for scheme in one:
    found = tasks.spans([one[scheme]], [other[scheme]], scheme)
    assert (found["precision"], found["recall"]) == (pytest.approx(1 / 3), 1 / 4)
    assert (found["f1/X"], found["f1/Y"]) == (0, 1)
  for truth, prediction in (["B-X", "L-X", "I-X"], ["B-X", "L-X", "U-X"]), (["U-X", "I-X"], ["U-X", "B-X"]):
    assert tasks.spans([truth], [prediction], "bilou")["f1"] == 1  # a span ends at L and U, whatever follows


def test_no_span_at_all_is_no_warning():
  assert tasks.spans([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1}


# texts


@pytest.mark.parametrize(
  "accepted, prediction, exact, f1",
  [
    (["The Eiffel-Tower!"], " eiffeltower", 1, 1),  # without punctuation and articles, which leave no space
    (["Paris", "in the city of Paris"], "city of Paris", 0, 6 / 7),  # the best: in, city, of, paris; the article goes
    (["to be or not to be"], "to to to", 0, 4 / 9),  # a word counts as often as it stands there
    (["another theatre"], "theatre", 0, 2 / 3),  # an article is a whole word
    (["Paris"], "", 0, 0),
    (["Paris", "The"], "a", 0, 0),  # an accepted answer without words is none
    (["the"], "an", 1, 1),
  ],
)
def test_answers_are_scored_as_by_hand(accepted, prediction, exact, f1):
  found = tasks.answers([accepted], [prediction])
  assert found == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_questions_without_an_answer_are_counted_apart():
  found = tasks.answers([[], [], [], ["big cat"]], ["", "the", "cat", "cat"])
  assert found == {
    "exact_match": 2 / 4,
    "f1": pytest.approx((1 + 1 + 0 + 2 / 3) / 4),
    "no_answer_accuracy": pytest.approx(2 / 3),
    "has_answer_exact_match": 0.0,
    "has_answer_f1": pytest.approx(2 / 3),
  }
  assert tasks.answers([[]], [""]) == {"exact_match": 1, "f1": 1, "no_answer_accuracy": 1}


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_english_summaries_are_scored_as_by_rouge_score(use_stemmer):
  truths = [ENGLISH, "A dog\nruns home. Policies ads!", "same"]
  predictions = ["Well-known mats: cats run\nthey said x 1; it don't sit", "The dogs run policy ad\n\nhome", "same"]
  names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
  scorer = rouge_scorer.RougeScorer(names, use_stemmer=use_stemmer)
  each = [scorer.score(truth, prediction) for truth, prediction in zip(truths, predictions)]
  expected = {name: pytest.approx(np.mean([scores[name].fmeasure for scores in each])) for name in names}
  assert tasks.summaries(truths, predictions, use_stemmer) == expected
  assert 0 < expected["rouge2"].expected < expected["rougeL"].expected < expected["rougeLsum"].expected < 1


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, KOREAN, THAI, ARABIC, HINDI, RUSSIAN, ENGLISH])
def test_the_same_text_is_a_perfect_summary_in_any_script(text):
  assert tasks.summaries([text], [text]) == dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 1)
  half = tasks.summaries([text], [text[: len(text) // 2]])
  assert 0.4 < half["rouge1"] < 0.8 and half["rouge2"] < 0.8


def test_words_of_summaries():
  words = tasks.summary_words
  assert words("GPT-4模型，很大v2") == ["gpt", "4", "模", "型", "很", "大", "v2"]
  assert words("コーラ、々ーxl") == ["コ", "ー", "ラ", "々", "ー", "xl"]
  assert words("날씨 A") == words("날씨 a") == ["날", "씨", "a"]  # however composed
  assert words("วันดี") == ["วั", "น", "ดี"]
  assert words("हिन्दी में") == ["हिन्दी", "में"]  # marks belong to their letters
  assert words("Café, ПРИВЕТ x_1 m² ٣") == ["café", "привет", "x", "1", "m", "٣"]
  assert words(ENGLISH) == "the well known cats don t sit on 2 mats they were running x 1 says".split()


@pytest.mark.parametrize(
  "truth, language, tokenizer",
  [
    (ENGLISH, None, "13a"),
    (RUSSIAN, None, "13a"),
    (CHINESE, None, "zh"),
    (f"{CHINESE} (GPT-4)", None, "zh"),
    (f"{ENGLISH} 今天", None, "13a"),
    (JAPANESE, None, "char"),
    (KOREAN, None, "char"),
    (THAI, None, "char"),
    (ENGLISH, "zh-TW", "zh"),
    (CHINESE, "ja", "char"),
    (CHINESE, "de", "13a"),
  ],
)
def test_translations_are_scored_as_by_sacrebleu(monkeypatch, truth, language, tokenizer):
  truths, predictions = [truth, truth[:12]], [truth[3:], truth[:12]]
  expected = {
    "bleu": sacrebleu.corpus_bleu(predictions, [truths], tokenize=tokenizer).score,
    "chrf": sacrebleu.corpus_chrf(predictions, [truths]).score,
  }
  used = []  # on a short text two tokenizers may agree
  bleu = sacrebleu.corpus_bleu
  monkeypatch.setattr(
    sacrebleu, "corpus_bleu", lambda *args, tokenize: used.append(tokenize) or bleu(*args, tokenize=tokenize)
  )
  assert tasks.translations(truths, predictions, language) == expected
  assert used == [tokenizer] and 0 < expected["chrf"] < 100


# mistakes


@pytest.mark.parametrize(
  "call",
  [
    lambda t, p: tasks.classification(t, p, ["a"]),
    lambda t, p: tasks.multi_label(t, p, ["a"]),
    tasks.regression,
    tasks.clustering,
    tasks.spans,
    tasks.answers,
    tasks.summaries,
    tasks.translations,
  ],
)
def test_nothing_to_score_or_another_number_of_predictions_is_a_clear_mistake(call):
  with pytest.raises(ConfigError, match="no examples to score"):
    call([], [])
  with pytest.raises(ConfigError, match="1 predictions for 2 truths"):
    call([["a"], ["a"]], [["a"]])


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: tasks.classification(["yess"], ["yes"], ["no", "yes"]), "truth 0 has 'yess'.*mean `yes`"),
    (lambda: tasks.classification(["a"], ["a"], ["a", "a"]), "'a' is given twice"),
    (lambda: tasks.multi_label([[], ["c"]], [[], []], ["a"]), "truth 1 has 'c'.*known: a"),
    (lambda: tasks.multi_label(["joy"], [["joy"]], ["joy"]), r"write \['joy'\]"),
    (lambda: tasks.regression([1, float("nan")], [1, 2]), "truth 1 is nan"),
    (lambda: tasks.regression(["1"], [1]), "truth 0 is '1'"),
    (lambda: tasks.spans([["O"]], [["O", "O"]]), "2 predicted tags for the 1 of truth 0"),
    (lambda: tasks.spans([["O"]], [["S-PER"]]), "prediction 0 has the tag 'S-PER'.*B-TYPE, I-TYPE"),
    (lambda: tasks.spans([["O"]], [["O"]], "iob"), "scheme='iob' is unknown; did you mean"),
    (lambda: tasks.spans([[]], [[]]), "no tokens"),
    (lambda: tasks.answers(["Paris"], ["Paris"]), r"truth 0 is the text 'Paris'.*write \['Paris'\]"),
    (lambda: tasks.translations(["a"], ["a"], "German"), "language='German' must be an ISO 639 code"),
  ],
)
def test_mistakes_are_told_in_one_line(call, message):
  with pytest.raises(ConfigError, match=message) as error:
    call()
  assert "\n" not in str(error.value)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "sacrebleu", None)
  with pytest.raises(ConfigError, match=r"needs the package sacrebleu: pip install 'llmjax\[eval\]'"):
    tasks.translations(["a"], ["a"])


def test_many_labels_for_few_examples_are_no_warning():
  labels = [str(i) for i in range(50)]
  found = tasks.classification(labels[:30], labels[:30], labels)
  assert found["f1_macro"] == sklearn.f1_score(range(30), range(30), average="macro") == 1
  assert tasks.clustering(labels, labels)["nmi"] == pytest.approx(1)
