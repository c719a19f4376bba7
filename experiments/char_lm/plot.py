"""The held-out loss of every run as a picture and a table: python experiments/char_lm/plot.py WORKDIR"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from llmjax.telemetry.curves import read_curves

COLOURS = {"nanogpt": "#8a8f98", "modern": "#2563c9"}
NAMES = {"nanogpt": "nanoGPT's recipe", "modern": "this config's recipe"}


def main(workdir: Path) -> None:
  figure, axes = plt.subplots(figsize=(8, 5), dpi=160, layout="constrained")
  for recipe, colour in COLOURS.items():
    finals = []
    for run in sorted(workdir.glob(f"{recipe}-*")):
      steps, losses = read_curves(run)["eval/heldout/loss"]
      axes.plot(steps, losses, color=colour, linewidth=1.6, alpha=0.9)
      finals.append(losses[-1])
      print(f"{run.name:<12} {losses[-1]:.4f}")
    axes.annotate(
      f"{NAMES[recipe]}\n{min(finals):.3f} to {max(finals):.3f}",
      (steps[-1], sum(finals) / len(finals)),
      xytext=(8, 0),
      textcoords="offset points",
      va="center",
      color=colour,
    )
  axes.set_xlabel("step (12 windows of 64 characters each)")
  axes.set_ylabel("held-out loss, nats per character")
  axes.set_title("Tiny Shakespeare, 0.80 M parameters, three seeds each", loc="left")
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", alpha=0.25)
  axes.margins(x=0.02)
  figure.savefig(Path(__file__).parent / "result.png", bbox_inches="tight")


if __name__ == "__main__":
  main(Path(sys.argv[1]))
