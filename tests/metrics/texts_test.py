"""Metrics of texts against values by hand, and against the libraries for the languages that those support."""

import unicodedata

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from llmjax.config import ConfigError
from llmjax.metrics.texts import answer_metrics, rouge_words, summary_metrics, translation_metrics

pytestmark = pytest.mark.filterwarnings("error")

CHINESE = "今天天气很好，我们去公园散步。"
JAPANESE = "今日は良い天気なので公園を散歩します。"
KOREAN = "오늘은 날씨가 좋아서 공원을 걷습니다."
THAI = "วันนี้อากาศดี เราไปเดินเล่นในสวนสาธารณะ"
ARABIC = "ذهبنا اليوم إلى الحديقة"
HINDI = "आज हम हिन्दी में बगीचे गए"
RUSSIAN = "Сегодня мы гуляли в парке."
ENGLISH = "The well-known cats don't sit on 2 mats.\nThey were running, x_1 says!"


@pytest.mark.parametrize(
  "accepted, prediction, exact, f1",
  [
    (["The Eiffel-Tower!"], " eiffeltower", 1, 1),  # punctuation and articles leave no space
    (["Paris", "in the city of Paris"], "city of Paris", 0, 6 / 7),  # the best F1; without the article
    (["to be or not to be"], "to to to", 0, 4 / 9),  # multisets
    (["another theatre"], "theatre", 0, 2 / 3),  # an article is a whole word
    (["Paris"], "", 0, 0),
    (["Paris", "The"], "a", 0, 0),  # an accepted answer without words does not count
    (["the"], "an", 1, 1),
  ],
)
def test_answer_metrics_equal_values_by_hand(accepted, prediction, exact, f1):
  assert answer_metrics([accepted], [prediction]) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_answer_metrics_count_questions_without_answer_separately():
  assert answer_metrics([[], [], [], ["big cat"]], ["", "the", "cat", "cat"]) == {
    "exact_match": 2 / 4,
    "f1": pytest.approx((1 + 1 + 0 + 2 / 3) / 4),
    "no_answer_accuracy": pytest.approx(2 / 3),
    "has_answer_exact_match": 0.0,
    "has_answer_f1": pytest.approx(2 / 3),
  }


def test_answer_metrics_without_any_answer_have_no_has_answer_metrics():
  assert answer_metrics([[]], [""]) == {"exact_match": 1, "f1": 1, "no_answer_accuracy": 1}


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_summary_metrics_of_english_equal_rouge_score(use_stemmer):
  truths = [ENGLISH, "A dog\nruns home. Policies ads!", "same"]
  predictions = ["Well-known mats: cats run\nthey said x 1; it don't sit", "The dogs run policy ad\n\nhome", "same"]
  names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
  scorer = rouge_scorer.RougeScorer(names, use_stemmer=use_stemmer)
  each = [scorer.score(truth, prediction) for truth, prediction in zip(truths, predictions)]
  expected = {name: pytest.approx(np.mean([scores[name].fmeasure for scores in each])) for name in names}
  assert summary_metrics(truths, predictions, use_stemmer) == expected
  assert 0 < expected["rouge2"].expected < expected["rougeL"].expected < expected["rougeLsum"].expected < 1


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, KOREAN, THAI, ARABIC, HINDI, RUSSIAN, ENGLISH])
def test_summary_metrics_score_equal_and_half_texts_in_any_script(text):
  assert summary_metrics([text], [text]) == dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 1)
  half = summary_metrics([text], [text[: len(text) // 2]])
  assert 0.4 < half["rouge1"] < 0.8 and half["rouge2"] < 0.8


@pytest.mark.parametrize(
  "text, words",
  [
    ("GPT-4模型，很大v2", ["gpt", "4", "模", "型", "很", "大", "v2"]),
    ("コーラ、々ーxl", ["コ", "ー", "ラ", "々", "ー", "xl"]),
    ("날씨 A", ["날", "씨", "a"]),
    (unicodedata.normalize("NFD", "날씨 a"), ["날", "씨", "a"]),
    ("วันดี", ["วั", "น", "ดี"]),
    ("हिन्दी में", ["हिन्दी", "में"]),  # marks belong to their letters
    ("Café, ПРИВЕТ x_1 m² ٣", ["café", "привет", "x", "1", "m", "٣"]),
    (ENGLISH, "the well known cats don t sit on 2 mats they were running x 1 says".split()),
  ],
)
def test_rouge_words_finds_words_in_any_script(text, words):
  assert rouge_words(text) == words


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
def test_translation_metrics_use_the_tokenizer_of_the_language(monkeypatch, truth, language, tokenizer):
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
  assert translation_metrics(truths, predictions, language) == expected
  assert used == [tokenizer] and 0 < expected["chrf"] < 100


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: answer_metrics(["Paris"], ["Paris"]), r"truth 0 must be a list.*'Paris'\. Write \['Paris'\]"),
    (lambda: translation_metrics(["a"], ["a"], "German"), "language='German' must be an ISO 639 code"),
  ],
)
def test_wrong_arguments_raise_one_line(call, message):
  with pytest.raises(ConfigError, match=message) as error:
    call()
  assert "\n" not in str(error.value)
