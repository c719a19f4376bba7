"""`llmjax evaluate` of a model on files, and its refusal of code in a checkpoint."""

import json
import shutil

import pytest

from llmjax.cli.main import main
from tests.support.contrastive_run import PAIRS, write_run


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
  """Return a folder with a contrastive run x."""
  folder = tmp_path_factory.mktemp("contrastive")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LLMJAX_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    write_run(folder)
    assert main(["train", "--config=tiny.py", "--workdir=x"]) == 0
  return folder


@pytest.fixture
def trained(home, trained_folder, monkeypatch):
  """Change into `trained_folder`, and return it."""
  monkeypatch.chdir(trained_folder)
  return trained_folder


@pytest.fixture
def evaluate(trained, capsys):
  """Return a function that runs `llmjax evaluate --model=x` and returns the printed {metric: value}."""

  def run(data):
    assert main(["evaluate", "--model=x", f"--data={data}"]) == 0
    return dict(line.split() for line in capsys.readouterr().out.splitlines() if "/" in line)

  return run


def test_evaluate_of_pairs_prints_loss_and_retrieval(evaluate):
  metrics = evaluate("pairs.jsonl")
  assert {"data/loss", "data/accuracy", "retrieval/mrr", "retrieval/uniformity"} <= metrics.keys()


def test_evaluate_of_csv_equals_jsonl(trained, evaluate):
  (trained / "pairs.csv").write_text("text,title\n" + "".join(f"{p['text']},{p['title']}\n" for p in PAIRS))
  assert evaluate("pairs.csv") == evaluate("pairs.jsonl")


def test_evaluate_of_scored_pairs_prints_similarity(trained, evaluate):
  (trained / "scored.csv").write_text("text_a,text_b,score\n" + "".join(f"a{i},b,{i}\n" for i in range(9)))
  assert evaluate("scored.csv").keys() == {"similarity/spearman"}


def test_evaluate_of_plain_text_exits_2_with_the_fields(trained, capsys):
  (trained / "plain.txt").write_text("a\nb\n")
  assert main(["evaluate", "--model=x", "--data=plain.txt"]) == 2
  out, error = capsys.readouterr()
  assert "/" not in out and error.count("\n") == 1
  assert all(word in error for word in ("plain.txt", "fields text;", "title, text", "score"))


@pytest.mark.parametrize(
  "command", [["evaluate", "--data=pairs.jsonl"], ["embed", "--input=plain.txt", "--output=v.npy"]], ids=lambda c: c[0]
)
def test_command_refuses_a_checkpoint_whose_objective_names_code(trained, tmp_path, capsys, command):
  (trained / "plain.txt").write_text("a\nb\n")
  workdir = tmp_path / "strange"
  shutil.copytree(trained / "x", workdir)
  [manifest] = (workdir / "checkpoints" / "2" / "manifest").rglob("metadata")
  content = json.loads(manifest.read_text())
  strange = {"a": {"weight": 1.0, "name": "os:abort"}}
  content["config"]["objective"] = {"name": "weighted_sum", "principal": "a", "parts": strange}
  manifest.write_text(json.dumps(content))
  assert main([*command, f"--model={workdir}"]) == 2
  error = capsys.readouterr().err
  assert "'os:abort'" in error and "--trust" in error
