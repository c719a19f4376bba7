"""Annotation without labels: embed, cluster, fit a softmax regression, train on its confident predictions.

  python experiments/annotation/run.py --model=PATH --workdir=DIR

PATH is any model that `llmjax embed` takes; further flags, such as --config.optim.lr=3e-4, are of the training. Of the
true labels only their number is looked at before the end, where they say how well it went.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import llmjax
from llmjax.cli.main import start_jax
from llmjax.config import load_config


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", required=True, help="the pretrained model that texts are embedded with, and trained")
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--clusters", type=int, help="number of clusters (default: that of the true labels)")
  parser.add_argument("--min_confidence", type=float, default=0.9, help="minimum confidence of a pseudo-label")
  parser.add_argument("--total_steps", default="1 epochs", help="duration of training on pseudo-labels")
  arguments, flags = parser.parse_known_args()
  start_jax()
  workdir = Path(arguments.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  results = annotate(arguments, flags, workdir)
  print(json.dumps(results, indent=2))
  draw({name: value for name, value in results.items() if "held-out" in name}, workdir / "annotation.png")


def annotate(arguments: argparse.Namespace, flags: list[str], workdir: Path) -> dict[str, float]:
  """Return {metric: agreement with the true labels on the held-out functions}, for every stage."""
  from llmjax.checkpoints.paths import open_path
  from llmjax.data.sources.tfds import python_stdlib_source
  from llmjax.inference.predict import check_task, predict
  from llmjax.metrics.labels import clustering_metrics

  train, held_out = (list(python_stdlib_source(split, config="package")) for split in ("train", "test"))
  truths = {"train": [r["package"] for r in train], "held_out": [r["package"] for r in held_out]}
  count = arguments.clusters or len(set(truths["train"]))

  with open_path(arguments.model) as source:
    model, params, tokenizer = source.load()
    pooling = (source.config["objective"] or {}).get("pooling", "mean")
  length = min(128, model.cfg.max_len)
  vectors, other = (
    llmjax.embed(model, params, tokenizer, [r["text"] for r in records], pooling=pooling, max_len=length)
    for records in (train, held_out)
  )
  clusters, other_clusters = cluster(vectors, other, count)
  labels, confidence, other_labels = maximum_entropy(vectors, clusters, other)

  sure = confidence >= arguments.min_confidence
  pseudo = workdir / "pseudo_labels.jsonl"
  with pseudo.open("w", encoding="utf-8") as file:
    for record, label, share in zip(np.array(train)[sure], labels[sure], confidence[sure], strict=True):
      file.write(json.dumps({"text": record["text"], "label": f"cluster{label}", "confidence": float(share)}) + "\n")

  flags = [f"--config=classify:init_from={arguments.model},train={pseudo}", f"--config.seq_len={length}", *flags]
  config = load_config([*flags, f"--config.total_steps={arguments.total_steps}"])
  llmjax.run(config, workdir / "classifier")
  with open_path(workdir / "classifier") as source:
    tuned, task = source.load(), check_task(source.objective())
  results = predict(tuned.model, tuned.params, task, held_out)

  def nmi(truth: list[str], found: list) -> float:
    return clustering_metrics(truth, list(map(str, found)))["nmi"]

  return {
    "pseudo-labelled share of the training functions": float(np.mean(sure)),
    "NMI of k-means, training functions": nmi(truths["train"], list(clusters)),
    "NMI of k-means, held-out functions": nmi(truths["held_out"], list(other_clusters)),
    "NMI of the maximum-entropy classifier, held-out functions": nmi(truths["held_out"], list(other_labels)),
    "NMI of the trained model, held-out functions": nmi(truths["held_out"], [r["label"] for r in results]),
    "NMI of a random partition, held-out functions": nmi(
      truths["held_out"], list(np.random.default_rng(0).integers(count, size=len(held_out)))
    ),
  }


def draw(results: dict[str, float], path: Path) -> None:
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  figure, axis = pyplot.subplots(figsize=(7, 2.2), layout="constrained")
  names = [name.removeprefix("NMI of ").removesuffix(", held-out functions") for name in reversed(results)]
  axis.bar_label(axis.barh(names, list(reversed(results.values()))), fmt="%.3f", padding=3)
  axis.set_xlim(0, 1)
  axis.set_xlabel("normalised mutual information with the true packages")
  axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=130)


def cluster(vectors: np.ndarray, other: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Cluster vectors of length 1 by k-means (Lloyd 1982); return their clusters and the nearest ones of others."""
  from sklearn.cluster import KMeans

  found = KMeans(count, n_init=10, random_state=0).fit(vectors)
  return found.labels_, found.predict(other)


def maximum_entropy(
  vectors: np.ndarray, clusters: np.ndarray, other: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Fit a softmax regression on the clusters; return labels with probabilities, and labels of others."""
  from sklearn.linear_model import LogisticRegression

  classifier = LogisticRegression(C=10.0, max_iter=1000).fit(vectors, clusters)
  probabilities = classifier.predict_proba(vectors)
  return classifier.classes_[probabilities.argmax(axis=1)], probabilities.max(axis=1), classifier.predict(other)


if __name__ == "__main__":
  main()
