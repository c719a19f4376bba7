"""What predictions for labelled data are worth, by the libraries that papers report. No JAX.

Each function takes truths and predictions, entry i of each for example i, and gives {name: number}: shares and F1 in
[0, 1], where more is better, unless said otherwise. What is 0 / 0 counts as 0, so no number is NaN that was not
predicted. A different number of truths and predictions, or none, is a ConfigError; so is a missing library.
"""

from __future__ import annotations

import functools
import importlib
import math
import numbers
import re
import string
import types
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import numpy as np

from llmjax.config import ConfigError, suggest_name

# Prefixes of tags as each scheme writes them, and as seqeval reads them.
SCHEMES = {
  "iob1": {"B": "B", "I": "I"},
  "iob2": {"B": "B", "I": "I"},
  "iobes": {"B": "B", "I": "I", "E": "E", "S": "S"},
  "bilou": {"B": "B", "I": "I", "L": "E", "U": "S"},
}

# sacrebleu's tokenizers by ISO 639 codes; "13a" for any other language.
BLEU_TOKENIZERS = {
  **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
  **dict.fromkeys(("ja", "jpn", "ko", "kor", "th", "tha", "lo", "lao", "km", "khm", "my", "mya"), "char"),
}

# Scripts without spaces between words, and Hangul, whose words carry particles, as a set of the package `regex`.
BY_CHARACTER = (
  r"[[\p{Han}\p{Bopomofo}\p{Hiragana}\p{Katakana}ー\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
  r"&&[\p{L}\p{Nl}\p{Nd}]]"
)


# choices


def classification(truths: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
  """One label for each example.

  - "accuracy": the share of right predictions.
  - "f1_macro": the mean F1 of the labels that occur in truths or predictions, by scikit-learn.
  - "f1": of two labels, that of the second, as GLUE has it for MRPC and QQP (Wang et al. 2019,
    https://arxiv.org/abs/1804.07461).
  - "matthews": the correlation coefficient in [-1, 1], by scikit-learn; of CoLA in GLUE. Of more than two labels it is
    that of Gorodkin (2004, https://doi.org/10.1016/j.compbiolchem.2004.09.006).

  Args:
    predictions: one that is no label, as a model of text may write, is wrong; to "matthews" all such are one label.
    labels: all there are.
  Raises:
    ConfigError: a truth that is no label; a label given twice.
  """
  _check("classification", truths, predictions)
  index = _index("classification", labels)
  for i, truth in enumerate(truths):
    _check_label("classification", i, truth, index)
  metrics = _library("sklearn.metrics")
  true, predicted = ([index.get(label, -1) for label in side] for side in (truths, predictions))
  f1 = functools.partial(metrics.f1_score, true, predicted, average="macro", zero_division=0)
  with warnings.catch_warnings(action="ignore"):  # many labels for few examples are no mistake
    found = {
      "accuracy": metrics.accuracy_score(true, predicted),
      "f1_macro": f1(labels=sorted({*true, *predicted} - {-1})),
      "matthews": metrics.matthews_corrcoef(true, predicted),
    }
    if len(labels) == 2:
      found["f1"] = f1(labels=[1])
  return _floats(found)


def multi_label(
  truths: Sequence[Collection[str]], predictions: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, float]:
  """Any number of labels for each example, none too.

  - "f1_micro": of all decisions whether an example has a label, by scikit-learn.
  - "f1_macro": the mean F1 of the labels that occur in truths or predictions.
  - "exact_match": the share of examples with all of their labels and no other.

  Args:
    predictions: one that is no label is wrong, and none of those that f1_macro is a mean over.
    labels: all there are.
  Raises:
    ConfigError: a truth that is no label; a label given twice; a text in the place of a list.
  """
  _check("multi_label", truths, predictions, "labels")
  index = _index("multi_label", labels)
  for i, truth in enumerate(truths):
    for label in truth:
      _check_label("multi_label", i, label, index)
  names = [*labels, *sorted({label for row in predictions for label in row} - set(labels))]
  true, predicted = (np.array([[name in row for name in names] for row in side], int) for side in (truths, predictions))
  f1 = functools.partial(_library("sklearn.metrics").f1_score, zero_division=0)  # of the ones
  occurring = np.flatnonzero(true.any(axis=0) | predicted.any(axis=0))
  by_label = [f1(true[:, k], predicted[:, k]) for k in occurring if k < len(labels)]
  return _floats(
    {
      "f1_micro": f1(true.ravel(), predicted.ravel()),
      "f1_macro": np.mean(by_label) if by_label else 0.0,
      "exact_match": np.mean(np.all(true == predicted, axis=1)),
    }
  )


def regression(truths: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
  """A number for each example: "pearson" and "spearman", both in [-1, 1], and "mse", in squared units and best at 0.

  A correlation with what is constant is 0. Predictions that are not finite give NaN.

  Raises:
    ConfigError: a truth that is not finite.
  """
  _check("regression", truths, predictions)
  for i, truth in enumerate(truths):
    if not (isinstance(truth, numbers.Real) and math.isfinite(truth)):
      raise ConfigError(f"regression: truth {i} is {truth!r}, not a finite number; mend it or leave the example out")
  stats = _library("scipy.stats")
  true, predicted = np.array(truths, np.float64), np.array(predictions, np.float64)
  if not np.isfinite(predicted).all():
    return dict.fromkeys(("pearson", "spearman", "mse"), float("nan"))
  constant = not (np.ptp(true) and np.ptp(predicted))
  with warnings.catch_warnings(action="ignore"):  # of what is nearly constant
    return _floats(
      {
        "pearson": 0.0 if constant else stats.pearsonr(true, predicted).statistic,
        "spearman": 0.0 if constant else stats.spearmanr(true, predicted).statistic,
        "mse": np.mean(np.square(true - predicted)),
      }
    )


def clustering(truths: Sequence[Hashable], clusters: Sequence[Hashable]) -> dict[str, float]:
  """A group for each example, whose name means nothing; by scikit-learn.

  - "nmi": mutual information over the arithmetic mean of both entropies.
  - "ari": the adjusted Rand index, the share of pairs that both see alike, less what chance gives; 0 for chance, -0.5
    at the least (Hubert and Arabie 1985, https://doi.org/10.1007/BF01908075).
  """
  _check("clustering", truths, clusters)
  metrics = _library("sklearn.metrics")
  ids = [list(map({name: i for i, name in enumerate(dict.fromkeys(side))}.get, side)) for side in (truths, clusters)]
  with warnings.catch_warnings(action="ignore"):  # many groups of few examples are no mistake
    return _floats({"nmi": metrics.normalized_mutual_info_score(*ids), "ari": metrics.adjusted_rand_score(*ids)})


# tags


def spans(
  truths: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], scheme: str = "iob2"
) -> dict[str, float]:
  """Spans of a type by a tag for each token: O, or a prefix that says where in a span it is, and the span's type.

  - "precision", "recall", "f1": of spans with the right type and both the right ends, over all types together, by
    seqeval.
  - "f1/TYPE": of each type in truths or predictions; "_" where tags have none.
  - "accuracy": the share of tokens with the right tag.

  A span is read as CoNLL's conlleval does, which is seqeval's default and what Hugging Face's `evaluate` reports, not
  its strict mode: one begins at I too where none of its type is open, and so those of ill-formed predictions count.

  Args:
    truths, predictions: per example [T] of tags such as "B-PER".
    scheme: "iob2" (every span begins with B), "iob1" (with I, and with B behind one of the same type), "iobes" (E ends,
      S stands alone) or "bilou" (the same as L and U).
  Raises:
    ConfigError: a tag that is none of the scheme's; examples of different length, or without tokens.
  """
  _check("spans", truths, predictions, "tags")
  if scheme not in SCHEMES:
    raise ConfigError(f"spans: scheme={scheme!r} is unknown; {suggest_name(scheme, SCHEMES)}")
  for i, (truth, prediction) in enumerate(zip(truths, predictions)):
    if len(truth) != len(prediction):
      raise ConfigError(f"spans: {len(prediction)} predicted tags for the {len(truth)} of truth {i}; give one for each")
  if not any(map(len, truths)):
    raise ConfigError("spans: there are no tokens to score; choose a split that has some")
  labeling = _library("seqeval.metrics.sequence_labeling")
  true = [_read_tags(f"truth {i}", row, scheme) for i, row in enumerate(truths)]
  predicted = [_read_tags(f"prediction {i}", row, scheme) for i, row in enumerate(predictions)]
  score = functools.partial(labeling.precision_recall_fscore_support, true, predicted, zero_division=0)
  names = sorted({type_ for side in (true, predicted) for type_, _, _ in labeling.get_entities(side)})  # as seqeval's
  found = dict(zip(("precision", "recall", "f1"), score(average="micro")))
  by_type = zip(names, score(average=None)[2])
  accuracy = labeling.accuracy_score(true, predicted)
  return _floats({**found, "accuracy": accuracy, **{f"f1/{type_}": f1 for type_, f1 in by_type}})


def _read_tags(where: str, tags: Sequence[str], scheme: str) -> list[str]:
  """The tags with prefixes that seqeval knows."""
  prefixes = SCHEMES[scheme]
  for tag in tags:
    if not re.fullmatch(rf"O|[{''.join(prefixes)}](-.+)?", tag):
      known = ", ".join(f"{prefix}-TYPE" for prefix in prefixes)
      raise ConfigError(f"spans: {where} has the tag {tag!r}, but scheme={scheme!r} has O, {known} alone")
  return [prefixes.get(tag[0], "O") + tag[1:] for tag in tags]


# texts


def answers(truths: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
  """Answers to questions, as the official evaluation of SQuAD 2.0 scores them, but in [0, 1].

  - "exact_match": the share of predictions that are an accepted answer, in lower case and without ASCII punctuation,
    "a", "an", "the" and further spaces.
  - "f1": the mean F1 of words between spaces, of the accepted answer where it is highest; 1 where there is no answer
    and none is predicted, 0 where one of them is.
  - "has_answer_exact_match", "has_answer_f1", "no_answer_accuracy": the questions with and without an answer apart,
    where some have none.

  See Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822. A text without spaces is one word, in Chinese as well.

  Args:
    truths: accepted answers; [] where the question has none.
    predictions: "" is that there is none.
  Raises:
    ConfigError: a text in the place of a list.
  """
  _check("answers", truths, predictions, "accepted answers")
  exact, f1 = np.zeros(len(truths)), np.zeros(len(truths))
  for i, (accepted, prediction) in enumerate(zip(truths, predictions)):
    predicted = _answer_words(prediction)
    true = [words for words in map(_answer_words, accepted) if words] or [[]]
    exact[i] = predicted in true
    f1[i] = max(_overlap(words, predicted) for words in true)
  found = {"exact_match": np.mean(exact), "f1": np.mean(f1)}
  answerable = np.array([len(accepted) > 0 for accepted in truths])
  if not answerable.all():
    found["no_answer_accuracy"] = np.mean(exact[~answerable])
    if answerable.any():
      found |= {"has_answer_exact_match": np.mean(exact[answerable]), "has_answer_f1": np.mean(f1[answerable])}
  return _floats(found)


def _answer_words(text: str) -> list[str]:
  text = text.lower().translate(str.maketrans("", "", string.punctuation))
  return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _overlap(true: list[str], predicted: list[str]) -> float:
  """F1 of words, which count as often as they stand there."""
  if not (true and predicted):
    return float(true == predicted)
  return 2 * (Counter(true) & Counter(predicted)).total() / (len(true) + len(predicted))


def summaries(truths: Sequence[str], predictions: Sequence[str], use_stemmer: bool = False) -> dict[str, float]:
  """The mean F-measures of ROUGE (Lin 2004, https://aclanthology.org/W04-1013), by rouge_score.

  - "rouge1", "rouge2": of words and of pairs of neighbours.
  - "rougeL": of the longest common subsequence of words.
  - "rougeLsum": that of each sentence with all others; sentences stand on lines of their own.

  Words are those of `summary_words`, as rouge_score's own tokenizer takes no letters but a to z.

  Args:
    use_stemmer: whether words in ASCII are cut to their stems by Porter's rules for English.
  """
  _check("summaries", truths, predictions)
  stem = _library("nltk.stem.porter").PorterStemmer().stem if use_stemmer else None
  tokenizer = types.SimpleNamespace(tokenize=functools.partial(summary_words, stem=stem))
  names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
  scorer = _library("rouge_score.rouge_scorer").RougeScorer(names, tokenizer=tokenizer)
  scores = [scorer.score(truth, prediction) for truth, prediction in zip(truths, predictions)]
  return _floats({name: np.mean([score[name].fmeasure for score in scores]) for name in names})


def summary_words(text: str, stem: Callable[[str], str] | None = None) -> list[str]:
  """Words in lower case: runs of letters, their marks and digits, of any script; "x_1" is x, 1.

  Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese characters are words of their own, as multilingual ROUGE has
  them. Of a text in ASCII these are the words that rouge_score takes.

  Args:
    stem: of words in ASCII with more than 3 letters, as in rouge_score.
  """
  pattern = rf"(?V1){BY_CHARACTER}\p{{M}}*|[[\p{{L}}\p{{Nd}}\p{{M}}]--{BY_CHARACTER}]+"
  words = _library("regex").findall(pattern, unicodedata.normalize("NFC", text).lower())
  return [stem(word) if stem and len(word) > 3 and word.isascii() else word for word in words]


def translations(truths: Sequence[str], predictions: Sequence[str], language: str | None = None) -> dict[str, float]:
  """ "bleu" and "chrf" of the whole corpus in [0, 100], as papers give them, by sacrebleu with its defaults.

  BLEU (Papineni et al. 2002; Post 2018, https://arxiv.org/abs/1804.08771) counts words, which sacrebleu's tokenizer
  "13a" finds, and "zh" in Chinese. Its "ja-mecab" and "ko-mecab" need further packages: Japanese and Korean, and Thai,
  Lao, Khmer and Burmese, are counted by characters ("char"), so that their BLEU is higher than and none to compare with
  that of words. A corpus without 4 words in a row has a BLEU of 0. chrF (Popović 2015,
  https://aclanthology.org/W15-3049) counts characters in any language.

  Args:
    language: of the truths, as an ISO 639 code such as "zh" or "zh-TW"; None tells it by most of their letters.
  Raises:
    ConfigError: a language that is no such code.
  """
  _check("translations", truths, predictions)
  tokenizer = _bleu_tokenizer(truths, language)
  sacrebleu = _library("sacrebleu")
  truths, predictions = list(truths), list(predictions)
  return _floats(
    {
      "bleu": sacrebleu.corpus_bleu(predictions, [truths], tokenize=tokenizer).score,
      "chrf": sacrebleu.corpus_chrf(predictions, [truths]).score,
    }
  )


def _bleu_tokenizer(truths: Sequence[str], language: str | None) -> str:
  if language is not None:
    if not re.fullmatch(r"[A-Za-z]{2,3}([-_]\w+)*", language):
      raise ConfigError(f"translations: language={language!r} must be an ISO 639 code such as 'de', 'ja' or 'zh-TW'")
    return BLEU_TOKENIZERS.get(re.split("[-_]", language.lower())[0], "13a")
  text = "\n".join(truths)
  letters, by_character, han = (
    len(_library("regex").findall(f"(?V1){kind}", text)) for kind in (r"\p{L}", BY_CHARACTER, r"\p{Han}")
  )
  if 2 * by_character <= letters:
    return "13a"
  return "zh" if 10 * han > 9 * by_character else "char"  # where there are kana too it is Japanese


# what all need


def _check(name: str, truths: Sequence[Any], predictions: Sequence[Any], rows: str | None = None) -> None:
  """As many predictions as truths, at least one; each a list of `rows` where that is given."""
  if len(truths) != len(predictions):
    raise ConfigError(f"{name}: {len(predictions)} predictions for {len(truths)} truths; give one for each")
  if not len(truths):
    raise ConfigError(f"{name}: there are no examples to score; choose a split that has some")
  for i, truth in enumerate(truths):
    if rows and isinstance(truth, str):
      raise ConfigError(f"{name}: truth {i} is the text {truth!r}, not a list of {rows}; write [{truth!r}]")


def _index(name: str, labels: Sequence[str]) -> dict[str, int]:
  index = {label: i for i, label in enumerate(labels)}
  if len(index) < len(labels):
    twice = next(label for label, count in Counter(labels).items() if count > 1)
    raise ConfigError(f"{name}: the label {twice!r} is given twice; give each once")
  return index


def _check_label(name: str, i: int, label: str, index: dict[str, int]) -> None:
  if label not in index:
    raise ConfigError(
      f"{name}: truth {i} has {label!r}, which is none of the {len(index)} labels; {suggest_name(label, index)}"
    )


def require(modules: Sequence[str]) -> None:
  """Raises ConfigError where a library that a metric needs is missing."""
  for module in modules:
    _library(module)


def _library(module: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition(".")[0]
    raise ConfigError(f"this metric needs the package {package}: pip install 'llmjax[eval]'") from error


def _floats(found: dict[str, Any]) -> dict[str, float]:
  return {name: float(value) for name, value in found.items()}
