"""From configuration to code: what is built, what is refused, and what the one line says."""

import dataclasses
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict, FieldReference

from llmjax import config
from llmjax.config import ConfigError, build, differences, duration, nearest, parse_arg
from llmjax.models.config import TransformerConfig


def point(x, y=2, *, origin=None):
  return x, y, origin


def anything(name_of_run="r", **rest):
  return {"name_of_run": name_of_run, **rest}


HERE = __name__
TABLE = {"point": f"{HERE}:point", "anything": f"{HERE}:anything"}


def test_build_calls_what_the_name_says():
  assert build({"name": "point", "x": 1}, TABLE, "part") == (1, 2, None)
  assert build({"name": f"{HERE}:point", "x": 1, "y": (3,)}, {}, "part") == (1, (3,), None)
  spec = ConfigDict({"name": "point", "x": FieldReference(5), "y": {"deep": [1, 2]}})
  assert build(spec, TABLE, "part") == (5, {"deep": (1, 2)}, None)


def test_what_the_program_knows_reaches_only_those_who_ask():
  assert build({"name": "point", "x": 1}, TABLE, "part", origin=0, unasked=1) == (1, 2, 0)
  assert build({"name": "anything", "a": 1}, TABLE, "part", b=2) == {"name_of_run": "r", "a": 1, "b": 2}


@pytest.mark.parametrize(
  "spec, line",
  [
    ({}, "part has no `name`; known: anything, point"),
    ({"name": None}, "part.name=None is unknown; known: anything, point (or give 'module:function')"),
    ({"name": "poin"}, "part.name='poin' is unknown; did you mean `point`? (or give 'module:function')"),
    ({"name": "point"}, "part.x: 'point' needs it"),
    ({"name": "point", "x": 1, "orgin": 0}, "part.orgin: 'point' has no such key; known: x, y"),
    ({"name": "point", "x": 1, "origin": 0}, "part.origin: 'point' has no such key; known: x, y"),
    ({"name": "anything", "origin": 0}, "part.origin: 'anything' has no such key; known: name_of_run"),
    ({"name": "nowhere_at_all:f"}, "part.name='nowhere_at_all:f' cannot be imported: No module named 'nowhere_at_all'"),
    ({"name": ":f"}, "part.name=':f' cannot be imported: Empty module name"),
    ({"name": "math:tau2"}, "part.name='math:tau2' cannot be imported: module 'math' has no attribute 'tau2'"),
    ({"name": "math:tau"}, "part.name='math:tau' is a float, not something to call"),
  ],
)
def test_what_cannot_be_built_is_told_in_one_line(spec, line):
  with pytest.raises(ConfigError) as error:
    build(spec, TABLE, "part", origin=1)
  assert str(error.value) == line


def test_a_checkpoint_runs_only_our_own_code_unless_trusted():
  table = {"plain": "llmjax.config:to_dict"}
  for name in ("plain", "llmjax.config:to_dict"):
    assert build({"name": name, "spec": (1,)}, table, "model", trust=False) == (1,)
  for name in ("os:getcwd", "llmjaxen:f", "llmjax.config:Path", "llmjax.config:build"):  # the last calls any other
    with pytest.raises(ConfigError, match="pass --trust"):
      build({"name": name}, table, "model", trust=False)


def test_a_mistyped_key_is_told_the_nearest_and_what_others_call_it():
  keys = ["optim.lr", "optim.b1", "batch_size", "model.d_model", "seq_len"]
  assert nearest("optim.lrr", keys) == "did you mean `optim.lr` or `optim.b1`?"
  assert nearest("learning_rate", keys) == nearest("optim.learning_rate", keys) == "here it is called `optim.lr`"
  assert nearest("per_device_train_batch_size", keys) == "here it is called `batch_size`"
  assert nearest("adam_beta1", ["b1", "b2"]) == "here it is called `b1`"
  assert nearest("trainer.batch_size", keys) == "did you mean `batch_size`?"
  assert nearest("output_dir", keys) == "here it is called `--workdir`"
  assert nearest("zzz", ["b", "a"]) == "known: a, b"
  assert nearest("lr_scheduler_type", ["name"]) == "here it is called `name`"


def test_what_others_call_our_keys_leads_to_keys_that_exist():
  known = set(config.flatten(config.load_config(["--config=char:recipe=nanogpt"])))
  known |= {f"model.{field.name}" for field in dataclasses.fields(TransformerConfig)}
  for theirs, ours in config.ALIASES.items():
    assert ours == "--workdir" or ours in known, theirs


def test_arguments_take_the_type_of_their_default():
  defaults = {"size": "small", "debug": False, "layers": 2, "rate": 0.5, "shape": (1,), "path": None}
  read = lambda text: parse_arg(text, **defaults).to_dict()  # noqa: E731
  assert read(None) == read("") == defaults
  assert read("size=nano,debug") == defaults | {"size": "nano", "debug": True}
  assert read("debug=false,layers=3,rate=1") == defaults | {"layers": 3, "rate": 1.0}
  assert isinstance(read("rate=1")["rate"], float)
  assert read("shape=(4,2),path=a=b") == defaults | {"shape": (4, 2), "path": "a=b"}
  wrong = {
    "siz=nano": "`siz` is unknown; did you mean `size`?",
    "debug=maybe": "debug='maybe' must be true or false",
    "layers=many": "layers='many' must be of type int",
    "layers=3.7": "layers='3.7' must be of type int",
    "shape=4": "shape='4' must be of type tuple",
    "size": "`size` needs a value",
  }
  assert read("path=\"a,b.txt\",size='x,y',debug") == defaults | {"path": "a,b.txt", "size": "x,y", "debug": True}
  assert read("path=it's.txt,layers=3") == defaults | {"path": "it's.txt", "layers": 3}
  for text, message in wrong.items():
    with pytest.raises(ConfigError, match=re.escape(message)):
      read(text)


def test_none_unsets_what_is_optional_removes_an_evaluation_and_is_a_word_elsewhere():
  flags = ["model.remat", "model.positions", "optim.clip_norm", "schedule.warmup", "rules.vocab", "evals.sample"]
  got = config.load_config(["--config=gpt:debug", *(f"--config.{key}=none" for key in flags)])
  assert (got.model.remat, got.model.positions) == ("none", "none")
  assert got.optim.clip_norm is got.schedule.warmup is got.rules.vocab is None
  assert list(got.evals) == ["heldout"] and got.is_locked and got.evals.is_locked
  assert config.load_config(["--config=gpt:debug", "--config.init_from", "none"]).init_from is None
  for said, last in [(("none", "5"), 5), (("5", "none"), None)]:
    both = [f"--config.total_steps={value}" for value in said]
    assert config.load_config(["--config=gpt:debug", *both]).total_steps == last


@pytest.mark.parametrize(
  "key, message",
  [
    ("optim.lr", "config.optim.lr cannot be none; give a value of type float, such as 0.02"),
    ("model.d_model", "config.model.d_model cannot be none; give a value of type int, such as 32"),
    ("schedule.final", "config.schedule.final cannot be none; give a value of type float"),
    ("log.tensorboard", "config.log.tensorboard cannot be none; give a value of type bool"),
    ("evals", "config.evals cannot be none; it is a group of keys"),
    ("evals.smaple", "config.evals.smaple is no key of this config; did you mean `evals.sample`"),
    ("rules.vocabb", "config.rules.vocabb is no key of this config; did you mean `rules.vocab`"),
  ],
)
def test_what_cannot_be_none_says_so(key, message):
  with pytest.raises(ConfigError, match="^" + re.escape(message)):
    config.load_config(["--config=gpt:debug", f"--config.{key}=none"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where the command runs; sys.path is put back."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  return tmp_path


@pytest.mark.parametrize(
  "body, message",
  [
    ("raise ConfigError('depth=3 is odd')", "depth=3 is odd"),
    ("return {}['x']", "KeyError: 'x' (FILE:4)"),
    ("raise OSError('no\\nsuch')", "OSError: no such (FILE:4)"),
    ("import json; return json.loads('{')", "JSONDecodeError: Expecting property name"),
    ("retrun 1", "SyntaxError: invalid syntax (FILE:4)"),
    ("return 1", "FILE: get_config must return a ConfigDict, not int"),
  ],
)
def test_a_mistake_in_a_config_file_is_told_in_one_line_with_its_place(folder, body, message):
  path = folder / "my.py"
  path.write_text(f"from llmjax.config import ConfigError\n\ndef get_config(arg=None):\n  {body}\n")
  with pytest.raises(ConfigError) as error:
    config.load_config(["--config=my.py"])
  said = str(error.value)
  assert said.startswith(message.replace("FILE", str(path))) and "\n" not in said and "Traceback" not in said, said


def test_a_mistake_in_a_configs_argument_is_its_own_line_alone():
  with pytest.raises(ConfigError) as error:
    config.load_config(["--config=gpt:size=nanno"])
  assert str(error.value) == "config argument size='nanno' is unknown; did you mean `nano` or `nano_moe`?"


def test_config_files_are_found_with_colons_and_python_in_their_names(folder):
  path = folder / "dir:x" / "my.py"
  path.parent.mkdir()
  path.touch()
  assert config.find("dir:x/my.py") == config.find(f"{path}:") == (path, "")
  assert config.find("dir:x/my.py:debug,text=a:b") == (path, "debug,text=a:b")
  assert config.find("gpt:text=my.py") == (config.shipped()["gpt"], "text=my.py")
  with pytest.raises(ConfigError, match=r"^--config=gtp:text=a\.py: no such file; did you mean `gpt`\?$"):
    config.find("gtp:text=a.py")
  with pytest.raises(ConfigError, match=r"^--config is given 2 times: gpt, char; give it once$"):
    config.load_config(["--config=gpt", "--config", "char"])


@pytest.mark.parametrize("package", [True, False])
def test_a_folder_configs_of_ones_own_adds_to_ours_and_hides_none(tmp_path, package):
  own = tmp_path / "configs"
  own.mkdir()
  (own / "sizes.py").write_text("raise RuntimeError\n")
  (own / "shapes.py").write_text("WIDTH = 48\n")
  body = "  config = gpt.get_config('debug')\n  config.model.d_model = shapes.WIDTH\n  return config\n"
  (own / "mine.py").write_text(f"from configs import gpt, shapes\n\ndef get_config():\n{body}")
  if package:
    (own / "__init__.py").touch()
  code = "from llmjax.config import load_config; print(load_config(['--config=mine']).model.d_model)"
  run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
  assert run.stdout == "48\n", run.stderr


def steps(value, **known):
  return duration(value, "part.every", **{"batch_size": 8, "seq_len": 128, "total_steps": 1000} | known)


@pytest.mark.parametrize(
  "value, expected",
  [
    (None, None),
    (0, 0),
    (500, 500),
    ("500", 500),
    ("1 step", 1),
    ("1_000 steps", 1000),
    ("2.5k", 2500),
    ("10M tokens", 9766),  # 9765.6 steps of 1024 tokens
    ("1024 tokens", 1),
    ("1025 tokens", 2),
    ("2k examples", 250),
    ("1.5 epochs", 150),
    ("5%", 50),
    ("0.01%", 1),
  ],
)
def test_durations_are_steps_rounded_up(value, expected):
  assert steps(value, epoch_tokens=102_400) == expected


def test_no_percentage_is_rounded_up_for_lack_of_digits():
  assert [steps(f"{p}%", total_steps=100) for p in range(101)] == list(range(101))


@pytest.mark.parametrize(
  "value, known, message",
  [
    ("soon", {}, "part.every='soon' is not a duration; say 500"),
    (True, {}, "part.every=True is not a duration"),
    (-5, {}, "part.every=-5 is not a duration"),
    (float("nan"), {}, "part.every=nan is not a duration"),
    ("5%", {"total_steps": None}, "percents refer to total_steps"),
    ("1 epoch", {}, "set data.epoch_tokens"),
  ],
)
def test_what_is_no_duration_is_refused(value, known, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    steps(value, **known)


def test_differences_are_those_that_json_sees():
  old = ConfigDict({"a": {"b": (1, 2), "c": 1}, "gone": 3, "same": None})
  new = {"a": {"b": [1, 2], "c": 2}, "same": None, "come": "x"}
  assert differences(old, new) == {"a.c": (1, 2), "gone": (3, None), "come": (None, "x")}
  assert differences(old, old) == {}
