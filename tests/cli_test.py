"""The commands as a user types them: what they print, what they refuse, and that nothing is lost."""

import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from llmjax import cli
from llmjax.config import ConfigError

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(400))


@pytest.fixture
def text(home, monkeypatch):
  """A file to train on, in a folder of its own."""
  monkeypatch.chdir(home)
  path = home / "my.txt"
  path.write_text(TEXT)
  return path


def run(*arguments):
  return cli.main([str(a) for a in arguments])


def train(text, *flags, workdir="runs/x"):
  config = f"--config=char:text={text},debug"
  return run("train", config, "--config.batch_size=8", "--config.total_steps=4", f"--workdir={workdir}", *flags)


def test_train_evaluate_generate_report_and_inspect(text, capsys, monkeypatch):
  assert train(text) == 0
  said = capsys.readouterr().out
  assert "parameters for 4 steps" in said and "finished at 4 steps" in said and "--config.total_steps=8" in said
  lines = [json.loads(line) for line in Path("runs/x/metrics.jsonl").read_text().splitlines()]
  assert any("train/loss" in line for line in lines) and any("eval/heldout/loss" in line for line in lines)

  assert run("evaluate", f"--config=char:text={text},debug", "--config.batch_size=8", "--workdir=runs/x") == 0
  said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("heldout/"))
  final = next(line["eval/heldout/loss"] for line in reversed(lines) if "eval/heldout/loss" in line)
  assert abs(float(said["heldout/loss"]) - final) < 1e-4

  assert run("evaluate", "--model=runs/x", f"--data={text}") == 0
  assert "data/bits_per_byte" in capsys.readouterr().out
  assert run("generate", "--model=runs/x", "--prompt=line 1", "--max_new_tokens=12", "--temperature=0") == 0
  said = capsys.readouterr().out
  model, params, tokenizer = llmjax.load("runs/x")
  ids = np.asarray(tokenizer.prompt("line 1"))[None]
  tokens = llmjax.generate(model, params, ids, max_new_tokens=12)
  assert said == tokenizer.decode(np.asarray(tokens)[0].tolist()) + "\n"
  monkeypatch.setattr(sys, "stdin", io.StringIO("line 2 " * 9))
  assert run("generate", "--model=runs/x", "--stop=\n\n") == 0  # a context of 64 is enough
  said = capsys.readouterr()
  assert said.out.startswith("line 2 " * 9) and "63 tokens; only its last 32" in said.err
  for flags, words in [
    (["--prompt=a", "--max_new_tokens=64"], ["--max_new_tokens=64", "context of 64"]),
    (["--prompt=a", "--max_new_tokens=0"], ["--max_new_tokens=0", "at least 1"]),
    (["--prompt=a", "--stop="], ["--stop is empty"]),
    (["--prompt=a", "--temperature=nan"], ["temperature=nan"]),
    (["--prompt="], ["prompt is empty", "give a prompt"]),
    (["--prompt=a\udcff"], ["not UTF-8"]),
    (["--prompt=a\u20ac"], ["U+20AC", "known characters", "data.tokenizer.unknown=True"]),
  ]:
    assert run("generate", "--model=runs/x", *flags) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and all(word in said.err for word in words), said
  assert run("report", "--workdir=runs/x") == 0
  assert run("checkpoint", "inspect", "runs/x/checkpoints/4", "--arrays") == 0
  assert "params/embedding/table" in capsys.readouterr().out


@pytest.mark.parametrize("context", [2, 3, 64, 256, 300, 1024])
def test_prompt_and_new_tokens_fit_the_context(context):
  for length in {1, context // 2, context - 1, context, 3 * context}:
    ids = np.arange(max(length, 1))
    kept, count = cli.fit(ids, context, None)
    assert 1 <= count <= 200 and len(kept) + count <= context
    assert len(kept) >= min(len(ids), context // 2)
    np.testing.assert_array_equal(kept, ids[len(ids) - len(kept) :])
    assert len(cli.fit(ids, context, context - 1)[0]) == 1


def test_a_prompt_from_standard_input_is_utf8(monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfc\xdfe"), encoding="utf-8"))
  with pytest.raises(ConfigError, match=r"^the prompt is not UTF-8: .* position 2"):
    cli.read_prompt(None)


def test_a_terminal_gets_no_control_characters(monkeypatch):
  text = "a\x1b[2Jb\n"
  assert cli.shown(text) == text
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  assert cli.shown(text) == "a\ufffd[2Jb\n"


def test_a_rerun_says_what_it_does(text, capsys):
  assert train(text, "--config.total_steps=2") == 0
  capsys.readouterr()
  assert train(text, "--config.total_steps=2") == 0
  assert "is finished at 2 steps" in capsys.readouterr().out
  assert train(text, "--config.optim.lr=0.5") == 0
  said = capsys.readouterr().out
  assert "resuming runs/x at 2/4" in said and "optim.lr" in said and "→ 0.5" in said and "total_steps 2 → 4" in said
  before = sorted(Path("runs/x").rglob("*"))
  for flag, key in [
    ("--config.model.d_model=64", "model.d_model"),
    ("--config.seed=7", "seed"),
    ("--config.batch_size=16", "batch_size"),
    ("--config.data.tokenizer.unknown=True", "data.tokenizer"),
    ("--config.data.train=[:50%]", "data.train"),
    ("--config.objective.z_loss=0.1", "objective.z_loss"),
    ("--config.optim.name=sgd", "optim"),
  ]:
    assert train(text, flag, "--config.total_steps=6") == 2
    said = capsys.readouterr().err
    assert key in said and said.count("\n") == 1, said
  text.write_text(TEXT.upper())
  assert train(text, "--config.total_steps=6") == 2
  assert "data.corpus" in capsys.readouterr().err
  assert sorted(Path("runs/x").rglob("*")) == before
  assert train(text, "--config.total_steps=2", "--fresh") == 0
  assert "runs/x.1" in capsys.readouterr().out and Path("runs/x.1/checkpoints/4").is_dir()


def test_dry_run_says_parameters_memory_and_the_first_batch_and_writes_nothing(text, capsys):
  assert train(text, "--dry_run") == 0
  said = capsys.readouterr().out
  assert "total" in said and "Memory per device" in said and "fits" in said and "First batch" in said and "lazy" in said
  assert not Path("runs").exists()


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--config.optim.learnig_rate=1"], ["optim.learnig_rate"]),
    (["--config.learning_rate=1"], ["learning_rate", "`optim.lr`"]),
    (["--config.modle.d_model=1"], ["modle.d_model", "model.d_model"]),
    (["--config.seed=abc"], ["config.seed", "abc"]),
    (["--config.seed=none"], ["config.seed cannot be none", "int"]),
    (["--config.batch_size=6"], ["batch_size=6", "8 devices", "multiple of 8"]),
    (["--config.batch_size=8", "--config.accum=3"], ["batch_size=8", "accum=3"]),
    (["--config.mesh.tensor=3"], ["mesh", "multiple of 3", "8"]),
    (["--config.mesh.data=4"], ["mesh", "4 devices", "8"]),
    (["--config.model.vocab_size=5"], ["model.vocab_size=5", "tokenizer"]),
    (["--config.model.max_len=8"], ["seq_len=64", "model.max_len=8"]),
    (["--config.total_steps=soon"], ["total_steps", "soon", "steps"]),
    (["--config.total_steps=2 epochs"], ["total_steps", "data.epoch_tokens"]),
    (["--config.profile=3"], ["config.profile", "10:15"]),
    (["--config.init_from=nowhere"], ["nowhere"]),
    (["--confg.seed=1"], ["--confg.seed"]),
  ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(text, capsys, flags, words):
  assert train(text, *flags) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "Traceback" not in said, said
  for word in words:
    assert word in said
  assert not Path("runs/x/checkpoints").exists() or not any(Path("runs/x/checkpoints").iterdir())


@pytest.mark.parametrize(
  "content, words", [(None, ["nowhere.txt"]), (b"", ["empty"]), (b"good\n" * 50 + b"\xff\xfe bad", ["UTF-8", "250"])]
)
def test_bad_data_is_named(home, capsys, content, words):
  path = home / "nowhere.txt"
  if content is not None:
    path.write_bytes(content)
  assert train(path, workdir=home / "x") == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  for word in [str(path), *words]:
    assert word in said


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["train"], ["--config"]),
    (["train", "--config=gtp"], ["gtp", "gpt"]),
    (["train", "--config=gpt:sise=nano"], ["sise", "size"]),
    (["train", "--config=gpt:size=nanoo"], ["nanoo", "nano"]),
    (["generate", "--model=nowhere", "--prompt=x"], ["nowhere"]),
    (["generate", "--model=.", "--prompt=x"], ["no checkpoint"]),
    (["evaluate", "--model=x"], ["--data"]),
    (["report", "--workdir=nowhere"], ["nowhere"]),
    (["checkpoint", "inspect", "nowhere"], ["nowhere"]),
    (["tokenizer", "--input", "nowhere.txt", "--vocab_size=300", "--output=x.model"], ["nowhere.txt"]),
  ],
)
def test_commands_refuse_in_one_line(home, monkeypatch, capsys, arguments, words):
  monkeypatch.chdir(home)
  assert run(*arguments) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1, said
  for word in words:
    assert word in said


def test_configs_are_listed_and_help_is_quick_to_import():
  out = subprocess.run([sys.executable, "-m", "llmjax", "configs"], capture_output=True, text=True, check=True).stdout
  assert "llmjax train --config=gpt:size=nano" in out and "base" not in out.split()
  code = "import sys, llmjax.cli; llmjax.cli.parser().format_help(); print('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_an_own_module_in_a_config_is_not_run_from_a_checkpoint_unless_trusted(text, monkeypatch, capsys):
  Path("mine.py").write_text(
    "from llmjax.models.transformer import make_transformer\n"
    "def make(*, vocab_size, **fields):\n  return make_transformer(vocab_size=vocab_size, **fields)\n"
  )
  monkeypatch.syspath_prepend(".")
  assert train(text, "--config.model.name=mine:make") == 0
  capsys.readouterr()
  arguments = ["generate", "--model=runs/x", "--prompt=a", "--max_new_tokens=2"]
  assert run(*arguments) == 2
  assert "--trust" in capsys.readouterr().err
  assert run(*arguments, "--trust") == 0


def test_a_run_restores_onto_another_mesh_and_loads_on_one_device(text):
  assert train(text, "--config.total_steps=2") == 0
  assert train(text, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2") == 0
  _, params, _ = llmjax.load("runs/x")
  assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(params))
