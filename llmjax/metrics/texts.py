"""Metrics of predicted texts: answers to questions (SQuAD), summaries (ROUGE) and translations (BLEU, chrF)."""

from __future__ import annotations

import functools
import re
import string
import types
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from llmjax.config import ConfigError
from llmjax.metrics.examples import as_floats, check_examples, import_library

# {ISO 639 code: tokenizer of sacrebleu}; "13a" for any other language.
BLEU_TOKENIZERS = {
  **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
  **dict.fromkeys(("ja", "jpn", "ko", "kor", "th", "tha", "lo", "lao", "km", "khm", "my", "mya"), "char"),
}

# Characters of scripts without spaces between words, and of Hangul, whose words carry particles. A set in the syntax of
# the package `regex`.
UNSPACED_CHARACTERS = (
  r"[[\p{Han}\p{Bopomofo}\p{Hiragana}\p{Katakana}ー\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
  r"&&[\p{L}\p{Nl}\p{Nd}]]"
)


def answer_metrics(truths: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
  """Score answers to questions as the official evaluation of SQuAD 2.0 does, but in [0, 1].

  - "exact_match": share of predictions equal to an accepted answer after normalisation: lower case, without ASCII
    punctuation, without "a", "an" and "the", and with single spaces.
  - "f1": mean F1 of the words between spaces, for the accepted answer with the highest F1. For a question without
    answer it is 1 if the prediction is empty, else 0.
  - "has_answer_exact_match", "has_answer_f1", "no_answer_accuracy": the same for questions with and without an answer,
    if there are any without.

  See Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822. A text without spaces, such as Chinese, is one word.

  Args:
    truths: accepted answers of each question, [] if it has none.
    predictions: one text per question, "" for none.

  Raises:
    ConfigError: a truth is a string.
  """
  check_examples("answers", truths, predictions, list_of="accepted answers")
  exact, f1 = np.zeros(len(truths)), np.zeros(len(truths))
  for i, (accepted, prediction) in enumerate(zip(truths, predictions)):
    predicted = _normalized_words(prediction)
    true = [words for words in map(_normalized_words, accepted) if words] or [[]]
    exact[i] = predicted in true
    f1[i] = max(_word_f1(words, predicted) for words in true)
  scores = {"exact_match": np.mean(exact), "f1": np.mean(f1)}
  has_answer = np.array([len(accepted) > 0 for accepted in truths])
  if not has_answer.all():
    scores["no_answer_accuracy"] = np.mean(exact[~has_answer])
    if has_answer.any():
      scores |= {"has_answer_exact_match": np.mean(exact[has_answer]), "has_answer_f1": np.mean(f1[has_answer])}
  return as_floats(scores)


def _normalized_words(text: str) -> list[str]:
  text = text.lower().translate(str.maketrans("", "", string.punctuation))
  return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _word_f1(true: list[str], predicted: list[str]) -> float:
  """Return the F1 of two multisets of words."""
  if not (true and predicted):
    return float(true == predicted)
  return 2 * (Counter(true) & Counter(predicted)).total() / (len(true) + len(predicted))


def summary_metrics(truths: Sequence[str], predictions: Sequence[str], use_stemmer: bool = False) -> dict[str, float]:
  """Return the mean F-measures of ROUGE (Lin 2004, https://aclanthology.org/W04-1013), computed by rouge_score.

  - "rouge1", "rouge2": of words and of word bigrams.
  - "rougeL": of the longest common subsequence of words.
  - "rougeLsum": of the union of the longest common subsequences of each sentence with all others. Each line is a
    sentence.

  Words are those of `rouge_words`, because the tokenizer of rouge_score drops all letters but a to z.

  Args:
    truths: reference summaries.
    predictions: one summary per reference.
    use_stemmer: replace words in ASCII by their stems (Porter's rules for English).
  """
  check_examples("summaries", truths, predictions)
  stem = import_library("nltk.stem.porter").PorterStemmer().stem if use_stemmer else None
  tokenizer = types.SimpleNamespace(tokenize=functools.partial(rouge_words, stem=stem))
  names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
  scorer = import_library("rouge_score.rouge_scorer").RougeScorer(names, tokenizer=tokenizer)
  scores = [scorer.score(truth, prediction) for truth, prediction in zip(truths, predictions)]
  return as_floats({name: np.mean([score[name].fmeasure for score in scores]) for name in names})


def rouge_words(text: str, stem: Callable[[str], str] | None = None) -> list[str]:
  """Return the words of a text in lower case: runs of letters, their marks and digits, of any script.

  "x_1" gives x and 1. Each Chinese, Japanese, Korean, Thai, Lao, Khmer or Burmese character is a word, as in
  multilingual ROUGE. For a text in ASCII the words are those of rouge_score.

  Args:
    text: any text.
    stem: applied to words in ASCII of more than 3 letters, as in rouge_score.
  """
  pattern = rf"(?V1){UNSPACED_CHARACTERS}\p{{M}}*|[[\p{{L}}\p{{Nd}}\p{{M}}]--{UNSPACED_CHARACTERS}]+"
  words = import_library("regex").findall(pattern, unicodedata.normalize("NFC", text).lower())
  return [stem(word) if stem and len(word) > 3 and word.isascii() else word for word in words]


def translation_metrics(
  truths: Sequence[str], predictions: Sequence[str], language: str | None = None
) -> dict[str, float]:
  """Return "bleu" and "chrf" of the corpus in [0, 100], computed by sacrebleu with its defaults.

  BLEU (Papineni et al. 2002; Post 2018, https://arxiv.org/abs/1804.08771) counts the words of sacrebleu's tokenizer
  "13a", or "zh" for Chinese. Its "ja-mecab" and "ko-mecab" need further packages. Japanese, Korean, Thai, Lao, Khmer
  and Burmese are therefore counted by characters ("char"). That BLEU is higher than BLEU of words, and the two cannot
  be compared. BLEU is 0 if no prediction has 4 words. chrF (Popović 2015,
  https://aclanthology.org/W15-3049) counts characters in any language.

  Args:
    truths: reference translations.
    predictions: one translation per reference.
    language: language of the truths, an ISO 639 code such as "zh" or "zh-TW". None: inferred from most of their
      letters.

  Raises:
    ConfigError: the language is not such a code.
  """
  check_examples("translations", truths, predictions)
  tokenizer = _bleu_tokenizer(truths, language)
  sacrebleu = import_library("sacrebleu")
  truths, predictions = list(truths), list(predictions)
  return as_floats(
    {
      "bleu": sacrebleu.corpus_bleu(predictions, [truths], tokenize=tokenizer).score,
      "chrf": sacrebleu.corpus_chrf(predictions, [truths]).score,
    }
  )


def _bleu_tokenizer(truths: Sequence[str], language: str | None) -> str:
  """Return the name of sacrebleu's tokenizer for a language, which is inferred if None."""
  if language is not None:
    if not re.fullmatch(r"[A-Za-z]{2,3}([-_]\w+)*", language):
      raise ConfigError(f"translations: language={language!r} must be an ISO 639 code such as 'de', 'ja' or 'zh-TW'")
    return BLEU_TOKENIZERS.get(re.split("[-_]", language.lower())[0], "13a")
  text = "\n".join(truths)
  letters, unspaced, han = (
    len(import_library("regex").findall(f"(?V1){kind}", text)) for kind in (r"\p{L}", UNSPACED_CHARACTERS, r"\p{Han}")
  )
  if 2 * unspaced <= letters:
    return "13a"
  return "zh" if 10 * han > 9 * unspaced else "char"  # kana beside Han characters are Japanese
