"""The algebra of trials: products, reproducible draws, and the command line of a trial."""

import math

import numpy as np
import pytest

from llmjax.config import ConfigError, load_config
from llmjax.sweeps.trials import (
  Sweep,
  chain,
  choice,
  draws,
  grid,
  integers,
  log_uniform,
  product,
  seeds,
  trial_flags,
  trial_names,
  uniform,
  vary,
  zipped,
)


def test_product_grid_zipped_and_chain_equal_nested_loops():
  first, second = vary("a", [1, 2]), vary("b", "xyz")
  assert product(first, second) == [{"a": a, "b": b} for a in (1, 2) for b in "xyz"] == grid({"a": [1, 2], "b": "xyz"})
  assert zipped({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
  assert chain(first, [{"a": 2}, {"a": 3}]) == vary("a", [1, 2, 3])
  assert product() == [{}] and product(first, []) == []
  assert product(first, product(second, seeds(2))) == product(product(first, second), seeds(2))


def test_product_accepts_a_function_of_the_trial_so_far():
  rates = {"adamw": [1e-3, 1e-2], "sgd": [1.0]}
  got = product(vary(":optim", rates), lambda trial: vary("optim.lr", rates[trial[":optim"]]))
  assert got == [{":optim": name, "optim.lr": rate} for name, of in rates.items() for rate in of]


def test_draws_have_their_distribution_and_a_stable_prefix():
  values = {"a": log_uniform(1e-4, 1e-1), "b": uniform(0, 1), "c": integers(1, 3), "d": choice("x", "y")}
  many = draws(2000, values)
  assert draws(5, values) == many[:5] and draws(5, values, seed=1) != many[:5]
  assert [t["a"] for t in draws(5, {"a": values["a"]})] == [t["a"] for t in many[:5]]  # independent of the other keys
  decades = [math.floor(math.log10(t["a"])) for t in many]
  assert all(abs(decades.count(d) - 2000 / 3) < 100 for d in (-4, -3, -2)) and set(decades) <= {-4, -3, -2, -1}
  assert abs(sum(t["b"] for t in many) / 2000 - 0.5) < 0.03
  assert {t["c"] for t in many} == {1, 2, 3} and {t["d"] for t in many} == {"x", "y"}


def test_names_contain_the_varied_values():
  trials = product(vary("optim.lr", [1e-3, 3e-4]), vary("model.d_model", [64]), vary(":size", ["a/b"]))
  assert trial_names(trials) == ["lr=0.001,d_model=64,size=a-b", "lr=0.0003,d_model=64,size=a-b"]
  assert trial_names([{"optim.name": 1, "schedule.name": 2}]) == ["optim.name=1,schedule.name=2"]
  assert trial_names([{"mesh.data": (1, 2), "x": None, "y": True}]) == ["data=1+2,x=None,y=True"]
  same_text = trial_names([{":t": "a b"}, {":t": "a-b"}])
  assert len(set(same_text)) == 2
  long = trial_names([{"x": "y" * 300}, {"x": "y" * 301}])
  assert len(set(long)) == 2 and max(map(len, long)) <= 120


def test_flags_of_a_trial_load_as_its_config():
  trial = {":size": "debug", ":text": "a,b.txt", "optim.lr": 3e-3, "trainable": ((r".*", True),), "init_from": None}
  made = trial_flags("gpt:corpus=lm1b", trial)
  assert made[0] == '--config=gpt:corpus=lm1b,size=debug,text="a,b.txt"'
  config = load_config(trial_flags("gpt", trial))
  assert config.optim.lr == 3e-3 and config.trainable == ((r".*", True),) and config.init_from is None
  assert config.model.d_model == 32 and config.data.corpus.files == "a,b.txt"


def test_flags_preserve_strings_numbers_and_none():
  trial = {":text": "a b, c.txt", ":column": None, "optim.lr": np.float64(1e-3), "init_from": 'a "b", c'}
  made = trial_flags("gpt:size=debug", trial)
  assert made[0] == '--config=gpt:size=debug,text="a b, c.txt"'
  config = load_config(made)
  assert (config.data.corpus.files, config.optim.lr, config.init_from) == ("a b, c.txt", 1e-3, 'a "b", c')


def test_names_differ_on_case_insensitive_file_systems():
  assert len({name.casefold() for name in trial_names([{":text": "a"}, {":text": "A"}])}) == 2
  assert all(len(name.encode()) <= 120 for name in trial_names([{":text": "ü" * 200}, {":text": "ü" * 201}]))


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: product(vary("a", [1]), vary("a", [2])), "two parts of a product set a"),
    (lambda: zipped({"a": [1], "b": [1, 2]}), "'b': 2"),
    (lambda: trial_names([{"a": 1}, {"a": 1}]), "a=1 is there twice"),
    (lambda: trial_names([{"a": 1, "b": 2}, {"b": 2, "a": 1}]), "there twice"),
    (lambda: log_uniform(0, 1), "0 < low"),
    (lambda: Sweep([]), "empty"),
    (lambda: Sweep([{}], mode="lowest"), "'min' or 'max'"),
  ],
)
def test_invalid_trials_are_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
