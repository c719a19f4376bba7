"""Fit the loss of small runs, predict that of a larger one, and draw both.

python experiments/scaling_law/analyse.py runs/scaling_law                 the fit, and the command of the larger run
python experiments/scaling_law/analyse.py runs/scaling_law runs/larger     what that run had, beside what was said
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[2]))
from experiments.scaling_law.sweep import BUDGETS, parameters

LARGER = 4 * max(BUDGETS)  # FLOPs
WIDTHS = range(16, 257, 16)  # that the larger run may have


def loss(theta, size, tokens):
  """Return E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, equation 2)."""
  e, a, b, alpha, beta = theta
  return np.exp(e) + np.exp(a - alpha * np.log(size)) + np.exp(b - beta * np.log(tokens))


def fit(size, tokens, measured):
  """Fit the five numbers as in the paper: minimal Huber loss of the logarithm, best of many starts."""

  def objective(theta):
    error = np.abs(np.log(loss(theta, size, tokens)) - np.log(measured))
    return np.sum(np.where(error < 1e-3, error**2 / 2, 1e-3 * (error - 5e-4)))

  starts = [
    (e, a, b, alpha, beta)
    for e in (-1.0, 0.0, 0.5)
    for a in (0.0, 3.0, 6.0)
    for b in (0.0, 3.0, 6.0)
    for alpha in (0.2, 0.5)
    for beta in (0.2, 0.5)
  ]
  found = [minimize(objective, start, method="Nelder-Mead", options={"maxiter": 4000}) for start in starts]
  return min(found, key=lambda result: result.fun).x


def tokens_of(flops, size):
  return flops / (6 * size)


def best_width(theta, flops):
  """Return the width with the lowest loss for a number of FLOPs."""
  return min(WIDTHS, key=lambda width: loss(theta, parameters(width), tokens_of(flops, parameters(width))))


def measured_by(workdir):
  lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  found = [line["eval/heldout/bits_per_byte"] for line in lines if "eval/heldout/bits_per_byte" in line]
  assert found, f"{workdir} has not come to its end"
  return found[-1]


def draw(path, theta, rows, larger):
  colours = ["#9ec5ff", "#6ea3ff", "#2f6fde", "#1b3f86"]
  figure = Figure(figsize=(10, 4.4), dpi=160)
  left, right = figure.subplots(1, 2)
  sizes = np.geomspace(min(r["size"] for r in rows) / 1.3, max(r["size"] for r in rows) * 1.3, 100)
  for (flops, _), colour in zip(BUDGETS.items(), colours):
    mine = [row for row in rows if row["flops"] == flops]
    left.plot([r["size"] for r in mine], [r["loss"] for r in mine], "o", color=colour, label=f"{flops:.2g} FLOPs")
    left.plot(sizes, loss(theta, sizes, tokens_of(flops, sizes)), color=colour, linewidth=1.2)
  left.set(xscale="log", xlabel="parameters", ylabel="held-out bits per byte", title="each line spends the same FLOPs")
  left.legend(frameon=False, fontsize=8)
  budgets = np.geomspace(min(BUDGETS), LARGER, 50)
  widths = [best_width(theta, flops) for flops in budgets]
  envelope = [loss(theta, parameters(w), tokens_of(f, parameters(w))) for f, w in zip(budgets, widths)]
  right.plot(budgets, envelope, color="#6e7781", linewidth=1.2, label="the fit at its best size")
  best = [min((r for r in rows if r["flops"] == flops), key=lambda r: r["loss"]) for flops in BUDGETS]
  right.plot([r["flops"] for r in best], [r["loss"] for r in best], "o", color="#2f6fde", label="best small runs")
  if larger is not None:
    right.plot([LARGER], [larger], "*", color="#d4521a", markersize=14, label="the larger run")
  right.set(xscale="log", xlabel="training FLOPs", title="what the small runs say of the larger one")
  right.legend(frameon=False, fontsize=8)
  for axes in (left, right):
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e8ebee")
    for side in ("top", "right"):
      axes.spines[side].set_visible(False)
  figure.tight_layout()
  figure.savefig(path)


def main(folder, larger=None):
  with open(Path(folder) / "results.csv") as file:
    rows = [
      {"flops": float(row[":flops"]), "size": parameters(int(row[":width"])), "tokens": int(row["tokens"])}
      | {"loss": float(row["eval/heldout/bits_per_byte"])}
      for row in csv.DictReader(file)
      if row["state"] == "finished"
    ]
  assert len(rows) == sum(map(len, BUDGETS.values())), f"only {len(rows)} trials are finished; run the sweep to its end"
  size, tokens, measured = (np.array([row[key] for row in rows], float) for key in ("size", "tokens", "loss"))
  theta = fit(size, tokens, measured)
  e, a, b, alpha, beta = theta
  print(f"L = {np.exp(e):.3f} + {np.exp(a):.3g} / N^{alpha:.3f} + {np.exp(b):.3g} / D^{beta:.3f}   bits per byte")
  errors = loss(theta, size, tokens) / measured - 1
  print(f"of {len(rows)} runs: root mean square error {100 * np.sqrt(np.mean(errors**2)):.2f} %")
  width = best_width(theta, LARGER)
  said = loss(theta, parameters(width), tokens_of(LARGER, parameters(width)))
  print(f"at {LARGER:.3g} FLOPs: width {width}, {said:.4f} bits per byte")
  if larger is None:
    print(f"llmjax train --config=experiments/scaling_law/sweep.py:width={width},flops={LARGER:.3g} --workdir=DIR")
    return
  had = measured_by(larger)
  print(f"it had {had:.4f}: {100 * (had / said - 1):+.2f} % of what was said")
  draw(Path(__file__).with_name("result.png"), theta, rows, had)


if __name__ == "__main__":
  main(*sys.argv[1:])
