"""Configuration: building objects from it, what is refused, and the one-line error messages."""

import dataclasses
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict, FieldReference

from llmjax.config import (
  ConfigError,
  build,
  config_differences,
  duration_to_steps,
  errors,
  files,
  flatten_config,
  parse_arg,
  suggest_name,
)
from llmjax.config.model import TransformerConfig


def point(x, y=2, *, origin=None):
  return x, y, origin


def anything(name_of_run="r", **rest):
  return {"name_of_run": name_of_run, **rest}


HERE = __name__
TABLE = {"point": f"{HERE}:point", "anything": f"{HERE}:anything"}


def test_build_calls_the_named_function():
  assert build({"name": "point", "x": 1}, TABLE, "part") == (1, 2, None)
  assert build({"name": f"{HERE}:point", "x": 1, "y": (3,)}, {}, "part") == (1, (3,), None)
  spec = ConfigDict({"name": "point", "x": FieldReference(5), "y": {"deep": [1, 2]}})
  assert build(spec, TABLE, "part") == (5, {"deep": (1, 2)}, None)


def test_build_passes_extra_arguments_only_where_accepted():
  assert build({"name": "point", "x": 1}, TABLE, "part", origin=0, unasked=1) == (1, 2, 0)
  assert build({"name": "anything", "a": 1}, TABLE, "part", b=2) == {"name_of_run": "r", "a": 1, "b": 2}


@pytest.mark.parametrize(
  "spec, line",
  [
    ({}, "part has no `name`; known: anything, point"),
    ({"name": None}, "part.name=None is unknown; known: anything, point (or give 'module:function')"),
    ({"name": "poin"}, "part.name='poin' is unknown; did you mean `point`? (or give 'module:function')"),
    ({"name": "point"}, "part.x is missing; 'point' needs it"),
    ({"name": "point", "x": 1, "orgin": 0}, "part.orgin: 'point' has no such key; known: x, y"),
    ({"name": "point", "x": 1, "origin": 0}, "part.origin: 'point' has no such key; known: x, y"),
    ({"name": "anything", "origin": 0}, "part.origin: 'anything' has no such key; known: name_of_run"),
    ({"name": "nowhere_at_all:f"}, "part.name='nowhere_at_all:f' cannot be imported: No module named 'nowhere_at_all'"),
    ({"name": ":f"}, "part.name=':f' cannot be imported: Empty module name"),
    ({"name": "math:tau2"}, "part.name='math:tau2' cannot be imported: module 'math' has no attribute 'tau2'"),
    ({"name": "math:tau"}, "part.name='math:tau' is a float, which cannot be called"),
  ],
)
def test_build_with_wrong_spec_is_a_one_line_error(spec, line):
  with pytest.raises(ConfigError) as error:
    build(spec, TABLE, "part", origin=1)
  assert str(error.value) == line


def test_build_without_trust_runs_only_code_of_llmjax():
  table = {"plain": "llmjax.config.values:to_dict"}
  for name in ("plain", "llmjax.config.values:to_dict"):
    assert build({"name": name, "spec": (1,)}, table, "model", trust=False) == (1,)
  for name in (
    "os:getcwd",
    "llmjaxen:f",
    "llmjax.config.files:Path",
    "llmjax.config.registry:build",
  ):  # the last one would call any other
    with pytest.raises(ConfigError, match="pass --trust"):
      build({"name": name}, table, "model", trust=False)


def test_nearest_suggests_similar_keys_and_names_of_other_libraries():
  keys = ["optim.lr", "optim.b1", "batch_size", "model.d_model", "seq_len"]
  assert suggest_name("optim.lrr", keys) == "did you mean `optim.lr` or `optim.b1`?"
  assert (
    suggest_name("learning_rate", keys) == suggest_name("optim.learning_rate", keys) == "here it is called `optim.lr`"
  )
  assert suggest_name("per_device_train_batch_size", keys) == "here it is called `batch_size`"
  assert suggest_name("adam_beta1", ["b1", "b2"]) == "here it is called `b1`"
  assert suggest_name("trainer.batch_size", keys) == "did you mean `batch_size`?"
  assert suggest_name("output_dir", keys) == "here it is called `--workdir`"
  assert suggest_name("zzz", ["b", "a"]) == "known: a, b"
  assert suggest_name("lr_scheduler_type", ["name"]) == "here it is called `name`"


def test_aliases_point_to_existing_keys():
  known = set(flatten_config(files.load_config(["--config=char:recipe=nanogpt"])))
  known |= {f"model.{field.name}" for field in dataclasses.fields(TransformerConfig)}
  for alias, key in errors.ALIASES.items():
    assert key == "--workdir" or key in known, alias


def test_parse_arg_converts_to_the_type_of_the_default():
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


def test_flag_none_unsets_optional_keys_and_removes_evaluations():
  flags = ["model.remat", "model.positions", "optim.clip_norm", "schedule.warmup", "rules.vocab", "evals.sample"]
  got = files.load_config(["--config=gpt:debug", *(f"--config.{key}=none" for key in flags)])
  assert (got.model.remat, got.model.positions) == ("none", "none")
  assert got.optim.clip_norm is got.schedule.warmup is got.rules.vocab is None
  assert list(got.evals) == ["heldout"] and got.is_locked and got.evals.is_locked
  assert files.load_config(["--config=gpt:debug", "--config.init_from", "none"]).init_from is None
  for values, last in [(("none", "5"), 5), (("5", "none"), None)]:
    both = [f"--config.total_steps={value}" for value in values]
    assert files.load_config(["--config=gpt:debug", *both]).total_steps == last


@pytest.mark.parametrize(
  "key, message",
  [
    ("optim.lr", "config.optim.lr cannot be none; give a value of type float, such as 0.02"),
    ("model.d_model", "config.model.d_model cannot be none; give a value of type int, such as 32"),
    ("schedule.final", "config.schedule.final cannot be none; give a value of type float"),
    ("log.tensorboard", "config.log.tensorboard cannot be none; give a value of type bool"),
    ("evals", "config.evals cannot be none; it is a group of keys"),
    ("evals.smaple", "config.evals.smaple does not exist; did you mean `evals.sample`"),
    ("rules.vocabb", "config.rules.vocabb does not exist; did you mean `rules.vocab`"),
  ],
)
def test_flag_none_for_a_required_key_is_refused(key, message):
  with pytest.raises(ConfigError, match="^" + re.escape(message)):
    files.load_config(["--config=gpt:debug", f"--config.{key}=none"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A current folder; sys.path is restored afterwards."""
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
def test_error_in_a_config_file_is_one_line_with_its_location(folder, body, message):
  path = folder / "my.py"
  path.write_text(f"from llmjax.config import ConfigError\n\ndef get_config(arg=None):\n  {body}\n")
  with pytest.raises(ConfigError) as error:
    files.load_config(["--config=my.py"])
  text = str(error.value)
  assert text.startswith(message.replace("FILE", str(path))) and "\n" not in text and "Traceback" not in text, text


def test_error_in_a_config_argument_has_no_location():
  with pytest.raises(ConfigError) as error:
    files.load_config(["--config=gpt:size=nanno"])
  assert str(error.value) == "config argument size='nanno' is unknown; did you mean `nano` or `nano_moe`?"


def test_find_accepts_paths_with_colons_and_py_suffixes(folder):
  path = folder / "dir:x" / "my.py"
  path.parent.mkdir()
  path.touch()
  assert files.find_config_file("dir:x/my.py") == files.find_config_file(f"{path}:") == (path, "")
  assert files.find_config_file("dir:x/my.py:debug,text=a:b") == (path, "debug,text=a:b")
  assert files.find_config_file("gpt:text=my.py") == (files.shipped_configs()["gpt"], "text=my.py")
  with pytest.raises(ConfigError, match=r"^--config=gtp:text=a\.py: no such file; did you mean `gpt`\?$"):
    files.find_config_file("gtp:text=a.py")
  with pytest.raises(ConfigError, match=r"^--config is given 2 times: gpt, char; give it once$"):
    files.load_config(["--config=gpt", "--config", "char"])


@pytest.mark.parametrize("package", [True, False])
def test_user_folder_configs_extends_the_shipped_one(tmp_path, package):
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
  return duration_to_steps(value, "part.every", **{"batch_size": 8, "seq_len": 128, "total_steps": 1000} | known)


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
def test_duration_is_rounded_up_to_steps(value, expected):
  assert steps(value, epoch_tokens=102_400) == expected


def test_duration_in_percent_is_exact_for_whole_steps():
  assert [steps(f"{p}%", total_steps=100) for p in range(101)] == list(range(101))


@pytest.mark.parametrize(
  "value, known, message",
  [
    ("soon", {}, "part.every='soon' is not a duration; give 500"),
    (True, {}, "part.every=True is not a duration"),
    (-5, {}, "part.every=-5 is not a duration"),
    (float("nan"), {}, "part.every=nan is not a duration"),
    ("5%", {"total_steps": None}, "percents refer to total_steps"),
    ("1 epoch", {}, "set data.epoch_tokens"),
  ],
)
def test_invalid_duration_is_refused(value, known, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    steps(value, **known)


def test_differences_ignore_tuple_and_list():
  old = ConfigDict({"a": {"b": (1, 2), "c": 1}, "gone": 3, "same": None})
  new = {"a": {"b": [1, 2], "c": 2}, "same": None, "come": "x"}
  assert config_differences(old, new) == {"a.c": (1, 2), "gone": (3, None), "come": (None, "x")}
  assert config_differences(old, old) == {}
