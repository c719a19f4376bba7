"""The commands of the command line: output, refusals, and that a run is never overwritten."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from llmjax.cli.commands import terminal_text
from llmjax.cli.generate import read_prompt
from llmjax.cli.main import main
from llmjax.config import ConfigError
from llmjax.inference.text import fit_prompt

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(400))


@pytest.fixture
def text(home, monkeypatch):
  """A file to train on, in the current folder."""
  monkeypatch.chdir(home)
  path = home / "my.txt"
  path.write_text(TEXT)
  return path


def run(*arguments):
  return main([str(a) for a in arguments])


def train(text, *flags, workdir="runs/x"):
  config = f"--config=char:text={text},debug"
  return run("train", config, "--config.batch_size=8", "--config.total_steps=4", f"--workdir={workdir}", *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The folder of a finished run `runs/x`, its text `my.txt`, and what `train` printed."""
  folder = tmp_path_factory.mktemp("trained")
  (folder / "my.txt").write_text(TEXT)
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
    patch.setenv("LLMJAX_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    assert train("my.txt") == 0
  return folder, output.getvalue()


@pytest.fixture
def run_x(trained, monkeypatch):
  """Change to the folder of the finished run."""
  folder, _ = trained
  monkeypatch.setenv("LLMJAX_CACHE", str(folder / "cache"))
  monkeypatch.chdir(folder)


def logged(path="runs/x/metrics.jsonl"):
  return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_train_prints_its_size_and_how_to_continue_and_logs(run_x, trained):
  _, output = trained
  assert "parameters for 4 steps" in output and "finished at 4 steps" in output
  assert "--config.total_steps=8" in output
  assert any("train/loss" in line for line in logged()) and any("eval/heldout/loss" in line for line in logged())


def test_evaluate_of_a_workdir_equals_the_logged_evaluation(run_x, capsys):
  assert run("evaluate", "--config=char:text=my.txt,debug", "--config.batch_size=8", "--workdir=runs/x") == 0
  lines = capsys.readouterr().out.splitlines()
  printed = dict(line.split(maxsplit=1) for line in lines if line.startswith("heldout/"))
  final = next(line["eval/heldout/loss"] for line in reversed(logged()) if "eval/heldout/loss" in line)
  assert abs(float(printed["heldout/loss"]) - final) < 1e-4


@pytest.mark.slow
def test_evaluate_of_a_model_prints_bits_per_byte(run_x, capsys):
  assert run("evaluate", "--model=runs/x", "--data=my.txt") == 0
  assert "data/bits_per_byte" in capsys.readouterr().out


def test_generate_prints_what_the_library_generates(run_x, capsys):
  assert run("generate", "--model=runs/x", "--prompt=line 1", "--max_new_tokens=12", "--temperature=0") == 0
  model, params, tokenizer = llmjax.load("runs/x")
  ids = np.asarray(tokenizer.prompt("line 1"))[None]
  tokens = llmjax.generate(model, params, ids, max_new_tokens=12)
  assert capsys.readouterr().out == tokenizer.decode(np.asarray(tokens)[0].tolist()) + "\n"


@pytest.mark.slow
def test_generate_truncates_a_long_prompt_from_stdin(run_x, capsys, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.StringIO("line 2 " * 9))
  assert run("generate", "--model=runs/x", "--stop=\n\n") == 0  # the context is 64 tokens
  printed = capsys.readouterr()
  assert printed.out.startswith("line 2 " * 9) and "63 tokens; only its last 32" in printed.err


@pytest.mark.parametrize(
  "flags, fragments",
  [
    (["--prompt=a", "--max_new_tokens=64"], ["--max_new_tokens=64", "context of 64"]),
    (["--prompt=a", "--max_new_tokens=0"], ["--max_new_tokens=0", "at least 1"]),
    (["--prompt=a", "--stop="], ["--stop is empty"]),
    (["--prompt=a", "--temperature=nan"], ["temperature=nan"]),
    (["--prompt="], ["prompt is empty", "give a prompt"]),
    (["--prompt=a\udcff"], ["not UTF-8"]),
    (["--prompt=a\u20ac"], ["U+20AC", "has no character", "data.tokenizer.unknown=True"]),
  ],
)
def test_generate_with_wrong_flags_is_one_line_and_exit_code_2(run_x, capsys, flags, fragments):
  assert run("generate", "--model=runs/x", *flags) == 2
  printed = capsys.readouterr()
  assert not printed.out and printed.err.count("\n") == 1
  assert all(fragment in printed.err for fragment in fragments), printed.err


def test_report_of_a_run_succeeds(run_x):
  assert run("report", "--workdir=runs/x") == 0


def test_checkpoint_inspect_lists_the_arrays(run_x, capsys):
  assert run("checkpoint", "inspect", "runs/x/checkpoints/4", "--arrays") == 0
  assert "params/embedding/table" in capsys.readouterr().out


@pytest.mark.parametrize("context", [2, 3, 64, 256, 300, 1024])
def test_fit_truncates_the_prompt_to_the_context(context):
  for length in {1, context // 2, context - 1, context, 3 * context}:
    ids = np.arange(max(length, 1))
    remaining, count = fit_prompt(ids, context, None)
    assert 1 <= count <= 200 and len(remaining) + count <= context
    assert len(remaining) >= min(len(ids), context // 2)
    np.testing.assert_array_equal(remaining, ids[len(ids) - len(remaining) :])
    assert len(fit_prompt(ids, context, context - 1)[0]) == 1


def test_prompt_that_is_not_utf8_is_refused(monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfc\xdfe"), encoding="utf-8"))
  with pytest.raises(ConfigError, match=r"^the prompt is not UTF-8: .* position 2"):
    read_prompt(None)


def test_shown_replaces_control_characters_on_a_terminal(monkeypatch):
  text = "a\x1b[2Jb\n"
  assert terminal_text(text) == text
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  assert terminal_text(text) == "a\ufffd[2Jb\n"


def test_finished_run_is_not_trained_again(run_x, capsys):
  assert train("my.txt") == 0
  assert "is finished at 4 steps" in capsys.readouterr().out


@pytest.fixture
def copied_run(run_x, tmp_path, monkeypatch):
  """Change to a copy of the folder of the finished run, which the test may change."""
  shutil.copytree(".", tmp_path, dirs_exist_ok=True)
  monkeypatch.chdir(tmp_path)


def test_rerun_resumes_and_prints_changed_keys(copied_run, capsys):
  assert train("my.txt", "--config.total_steps=6", "--config.optim.lr=0.5") == 0
  output = capsys.readouterr().out
  assert "resuming runs/x at 4/6" in output and "optim.lr" in output and "→ 0.5" in output
  assert "total_steps 4 → 6" in output


@pytest.mark.parametrize(
  "flag, key",
  [
    ("--config.model.d_model=64", "model.d_model"),
    ("--config.seed=7", "seed"),
    ("--config.batch_size=16", "batch_size"),
    ("--config.data.tokenizer.unknown=True", "data.tokenizer"),
    ("--config.data.train=[:50%]", "data.train"),
    ("--config.objective.z_loss=0.1", "objective.z_loss"),
    ("--config.optim.name=sgd", "optim"),
  ],
)
def test_rerun_with_a_changed_immutable_key_is_refused(copied_run, capsys, flag, key):
  before = sorted(Path("runs/x").rglob("*"))
  assert train("my.txt", flag, "--config.total_steps=6") == 2
  error = capsys.readouterr().err
  assert key in error and error.count("\n") == 1
  assert sorted(Path("runs/x").rglob("*")) == before


def test_rerun_with_other_data_is_refused(copied_run, capsys):
  Path("my.txt").write_text(TEXT.upper())
  assert train("my.txt", "--config.total_steps=6") == 2
  assert "data.corpus" in capsys.readouterr().err


@pytest.mark.slow
def test_fresh_archives_the_previous_run(copied_run, capsys):
  assert train("my.txt", "--config.total_steps=2", "--fresh") == 0
  assert "runs/x.1" in capsys.readouterr().out and Path("runs/x.1/checkpoints/4").is_dir()


def test_dry_run_prints_sizes_and_first_batch_and_writes_nothing(text, capsys):
  assert train(text, "--dry_run") == 0
  output = capsys.readouterr().out
  assert (
    "total" in output
    and "Memory per device" in output
    and "fits" in output
    and "First batch" in output
    and "lazy" in output
  )
  assert not Path("runs").exists()


@pytest.mark.parametrize(
  "flags, fragments",
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
def test_wrong_config_flag_is_one_line_and_exit_code_2(text, capsys, flags, fragments):
  assert train(text, *flags) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "Traceback" not in error, error
  for fragment in fragments:
    assert fragment in error
  assert not Path("runs/x/checkpoints").exists() or not any(Path("runs/x/checkpoints").iterdir())


@pytest.mark.parametrize(
  "content, fragments",
  [(None, ["nowhere.txt"]), (b"", ["empty"]), (b"good\n" * 50 + b"\xff\xfe bad", ["UTF-8", "250"])],
)
def test_bad_data_file_is_named(home, capsys, content, fragments):
  path = home / "nowhere.txt"
  if content is not None:
    path.write_bytes(content)
  assert train(path, workdir=home / "x") == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  for fragment in [str(path), *fragments]:
    assert fragment in error


@pytest.mark.parametrize(
  "arguments, fragments",
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
def test_wrong_arguments_are_one_line_and_exit_code_2(home, monkeypatch, capsys, arguments, fragments):
  monkeypatch.chdir(home)
  assert run(*arguments) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1, error
  for fragment in fragments:
    assert fragment in error


@pytest.mark.slow
def test_configs_are_listed_by_the_module_as_a_process():
  out = subprocess.run([sys.executable, "-m", "llmjax", "configs"], capture_output=True, text=True, check=True).stdout
  assert "llmjax train --config=gpt:size=nano" in out and "base" not in out.split()


def test_help_does_not_import_jax():
  code = "import sys, llmjax.cli.main; llmjax.cli.main.make_parser().format_help(); print('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_user_module_of_a_checkpoint_needs_trust(text, monkeypatch, capsys):
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


@pytest.mark.slow
def test_run_resumes_on_another_mesh_and_loads_on_one_device(copied_run):
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
  assert train("my.txt", *mesh, "--config.total_steps=6") == 0
  _, params, _ = llmjax.load("runs/x")
  assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(params))
