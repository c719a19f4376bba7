"""Task metrics under their former names. Imported until objectives import the modules themselves."""

from llmjax.metrics.examples import require_libraries as require
from llmjax.metrics.labels import classification_metrics as classification
from llmjax.metrics.labels import clustering_metrics as clustering
from llmjax.metrics.labels import multi_label_metrics as multi_label
from llmjax.metrics.labels import regression_metrics as regression
from llmjax.metrics.spans import TAG_PREFIXES as SCHEMES
from llmjax.metrics.spans import span_metrics as spans
from llmjax.metrics.texts import answer_metrics as answers
from llmjax.metrics.texts import rouge_words as summary_words
from llmjax.metrics.texts import summary_metrics as summaries
from llmjax.metrics.texts import translation_metrics as translations

__all__ = [
  "SCHEMES",
  "answers",
  "classification",
  "clustering",
  "multi_label",
  "regression",
  "require",
  "spans",
  "summaries",
  "summary_words",
  "translations",
]
