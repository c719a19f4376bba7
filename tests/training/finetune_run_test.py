"""Whole fine-tuning runs: runs that start from other runs, with adapters, frozen parameters and new heads."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import llmjax
from llmjax.checkpoints.convert import export_adapter
from llmjax.checkpoints.manager import Checkpoints
from llmjax.config import ConfigError
from llmjax.config import files as cfglib
from llmjax.distributed import sharding
from llmjax.models.lora import is_adapter
from llmjax.training import loop
from llmjax.training.components import open_source
from llmjax.training.program import make_program
from llmjax.trees import flatten_tree

LABELS = ("no", "yes")
SMALL = {"d_model": 32, "num_heads": 2, "decoder_layers": 0, "encoder_layers": 2, "d_ff": 48, "max_len": 24}
DECODER = {"model.encoder_layers": 0, "model.decoder_layers": 2}
CONSTANT = {"schedule": ConfigDict({"name": "constant", "warmup": None})}  # independent of total_steps
ADAPTERS = {"trainable": ((r".*lora_[ab]", True), (r".*", False)), "model.lora_rank": 2}
CLASSIFICATION, CAUSAL, MASKED = {"name": "classification"}, {"name": "causal_lm"}, {"name": "masked_lm"}
NO_CHANGE = 1e-30  # a learning rate that is too small to change a float32 parameter
TUNED = {
  **CONSTANT,
  "trainable": ((r".*lora_[ab]|head.*", True), (r".*", False)),
  "model.lora_rank": 2,
  "model.lora_dropout": 0.1,
  "model.dropout": 0.1,
  "optim.layer_decay": 0.5,
  "ema_decay": 0.9,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with texts and labelled texts, in which runs are made."""
  home = tmp_path_factory.mktemp("finetune")
  rng = np.random.default_rng(0)
  lines = ["".join(map(chr, rng.integers(97, 123, 12))) for _ in range(64)]
  (home / "t.txt").write_text("\n".join(lines) + "\n")
  records = [{"text": line, "label": LABELS[line[0] < "n"]} for line in lines]
  (home / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LLMJAX_CACHE", str(home / "cache"))
    yield home


@pytest.fixture(scope="module")
def encoder_run(folder):
  """A run of masked_lm with an average of its parameters."""
  run(folder, "masked", {"ema_decay": 0.5}, MASKED)
  return folder / "masked"


@pytest.fixture(scope="module")
def decoder_run(folder):
  """A run of causal_lm."""
  run(folder, "causal", DECODER, CAUSAL)
  return folder / "causal"


def make_config(folder, objective, changes):
  """The config of a tiny run; `changes` are {dotted key: value}."""
  config = cfglib.load_config(["--config=base"])
  labelled = objective["name"] in ("classification", "preference")
  config.data.corpus = ConfigDict(
    {"name": "jsonl" if labelled else "text", "files": str(folder / f"t.{'jsonl' if labelled else 'txt'}")}
  )
  config.data.tokenizer = ConfigDict({"name": "bytes", "mask": True})
  config.data.train = config.data.eval = "train"
  config.objective = ConfigDict(objective)
  config.model.update(SMALL)
  config.update(total_steps=2, batch_size=8, seq_len=24)
  config.log.update(every=1, tensorboard=False)
  config.data.update(pack=False, workers=1, prefetch=0)
  config.checkpoint.every = None
  for key, value in changes.items():
    section = config
    for name in key.split(".")[:-1]:
      section = section[name]
    with section.unlocked():
      section[key.split(".")[-1]] = value
  return config


def run(folder, name, changes, objective=CLASSIFICATION):
  """Train in `folder/name` and return {path: array} of the newest checkpoint."""
  loop.run(make_config(folder, objective, changes), folder / name)
  return read_checkpoint(folder / name)


def read_checkpoint(workdir):
  checkpoints = Checkpoints(workdir)
  tree = checkpoints.manager.restore(checkpoints.steps()[-1])["state"]
  checkpoints.close()
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def subtree(state, name):
  return {path.removeprefix(f"{name}/"): leaf for path, leaf in state.items() if path.startswith(f"{name}/")}


def assert_identical(got, want):
  assert got.keys() == want.keys()
  for path, leaf in want.items():
    np.testing.assert_array_equal(got[path], leaf, err_msg=path)


# Adapters and frozen parameters.


@pytest.fixture(scope="module")
def tuned(encoder_run):
  """Changes of a run that trains adapters and a head from the encoder's run."""
  return TUNED | {"init_from": str(encoder_run), "data.prefetch": 2}


@pytest.fixture(scope="module")
def tuned_run(folder, tuned):
  """The checkpoint after four steps of such a run."""
  return run(folder, "whole", tuned | {"total_steps": 4})


@pytest.mark.slow
def test_run_with_frozen_parameters_resumes_identically(folder, tuned, tuned_run):
  run(folder, "halves", tuned)
  assert_identical(run(folder, "halves", tuned | {"total_steps": 4}), tuned_run)


@pytest.mark.slow
def test_run_freezes_the_average_of_the_parameters_it_starts_from(folder, encoder_run, tuned_run):
  body = subtree(read_checkpoint(encoder_run), "ema")
  for path, leaf in subtree(tuned_run, "frozen").items():
    np.testing.assert_array_equal(leaf, body[path], err_msg=path)
  trained = subtree(tuned_run, "params")
  assert set(trained) == set(subtree(tuned_run, "ema"))
  assert all(is_adapter(path) or path.startswith("head/") for path in trained)
  assert all(leaf.any() for path, leaf in trained.items() if path.endswith("lora_b"))
  loaded = llmjax.load(folder / "whole")
  assert set(flatten_tree(loaded.params)) == {*trained, *subtree(tuned_run, "frozen")}


def test_program_state_has_moments_of_trainable_parameters_only(folder):
  program = make_program(make_config(folder, CLASSIFICATION, TUNED))
  state = program.abstract_state
  trainable = {path for path, value in flatten_tree(program.trainable).items() if value}
  assert set(flatten_tree(state.params)) == trainable
  assert all(is_adapter(path) or path.startswith("head/") for path in trainable)
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim and leaf.size > 2]
  assert sum(leaf.size for leaf in moments) <= 2 * program.num_trainable < program.num_params / 10
  assert program.num_params == sum(leaf.size for leaf in jax.tree.leaves(program.abstract_params))


@pytest.mark.slow
def test_checkpoint_without_newer_config_keys_resumes_identically(folder, encoder_run):
  """Such checkpoints were written before adapters, frozen parameters and learning rates by layer."""
  keys = ("trainable", "init_map", "auxiliary", "optim/lr_scale", "optim/layer_decay", "model/crf", "model/num_classes")
  keys += tuple(f"model/lora_{key}" for key in ("rank", "alpha", "dropout", "targets"))
  for name in ("older", "newer"):
    shutil.copytree(encoder_run, folder / name)
  for manifest in (folder / "older" / "checkpoints").glob("*/manifest/metadata"):
    content = json.loads(manifest.read_text())
    for key in keys:
      *section, name = key.split("/")
      del (content["config"][section[0]] if section else content["config"])[name]
    content["model"] = content["config"]["model"]
    manifest.write_text(json.dumps(content))
  assert "lora_rank" not in manifest.read_text()
  assert llmjax.load(folder / "older").model.cfg.lora is None
  longer = {"ema_decay": 0.5, "total_steps": 3, **CONSTANT}
  assert_identical(run(folder, "older", longer, MASKED), run(folder, "newer", longer, MASKED))


@pytest.mark.slow
def test_init_from_rejects_adapters_that_the_model_lacks(folder):
  run(folder, "adapted", {"model.lora_rank": 2, "total_steps": 1})
  with pytest.raises(ConfigError, match=r"init_from=.*lora_a has no place in this model.*set model\.\* as it was"):
    run(folder, "bare", {"init_from": str(folder / "adapted"), "total_steps": 1})


@pytest.mark.full("meshes")
def test_run_with_adapters_on_eight_devices_equals_one_device(folder):
  """Two steps of gradient descent with dropout and a head."""
  settings = TUNED | {"optim.name": "sgd", "optim.momentum": 0.9, "optim.lr": 0.1, "optim.clip_norm": 1.0}

  def train_two_steps(sizes, devices):
    mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, **sizes})
    rules = {"rules.vocab": None, "rules.act_vocab": None, "mesh": mesh}
    program = make_program(make_config(folder, CLASSIFICATION, settings | rules), devices=jax.devices()[:devices])
    stream = program.make_stream(open_source(program.config, "train"), prefetch=0)
    state, key = program.init(), jax.device_put(jax.random.key(0), program.replicated)
    with sharding.use_mesh(program.mesh, program.rules):
      for _ in range(2):
        state, _ = program.train_step(state, program.put(next(stream), 8), key, 0.1, {})
        jax.block_until_ready(state)  # two programs at once can starve each other of threads on a busy CPU
    stream.close()
    return jax.device_get(state)

  want, got = train_two_steps({}, 1), train_two_steps({"data": 2, "fsdp": 2, "tensor": 2}, 8)
  jax.tree.map(np.testing.assert_array_equal, got.frozen, want.frozen)
  params = flatten_tree(got.params)
  for path, leaf in flatten_tree(want.params).items():
    assert np.linalg.norm(params[path] - leaf) <= 1e-4 * np.linalg.norm(leaf), path


@pytest.mark.slow
def test_exported_adapters_load_as_the_run_and_start_another(folder, decoder_run):
  """The format is PEFT's, next to the run from which the adapters were trained."""
  changes = {**DECODER, "model.lora_rank": 2, "model.lora_alpha": 3.0, "init_from": str(decoder_run), "total_steps": 2}
  changes["trainable"] = ((r".*lora_[ab]|.*/mlp_norm/.*", True), (r".*", False))
  run(folder, "lora", changes, CAUSAL)
  architecture, base = export_adapter(str(folder / "lora"), str(folder / "peft"))
  assert (architecture, base) == ("GPT2LMHeadModel", str(decoder_run.resolve()))
  adapter_config = json.loads((folder / "peft" / "adapter_config.json").read_text())
  assert adapter_config["target_modules"] == ["c_attn"] and len(adapter_config["modules_to_save"]) == 2
  want, got = (llmjax.load(folder / name) for name in ("lora", "peft"))
  assert_identical(flatten_tree(got.params), flatten_tree(want.params))
  assert got.tokenizer.vocab_size == want.tokenizer.vocab_size
  changes |= {"init_from": str(folder / "peft"), "optim.lr": NO_CHANGE, "total_steps": 1}
  state = run(folder, "further", changes, CAUSAL)
  assert_identical(subtree(state, "params") | subtree(state, "frozen"), flatten_tree(want.params))


@pytest.mark.slow
def test_export_adapter_rejects_a_run_without_init_from(folder, decoder_run):
  with pytest.raises(ConfigError, match=r"did not start from a pretrained model \(init_from\)"):
    export_adapter(str(decoder_run), str(folder / "none"))


# Heads.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_new_head_is_initialized_from_the_seed_on_a_loaded_body(name, folder, request):
  base = request.getfixturevalue(f"{name}_run")
  changes = {"init_from": str(base), "optim.lr": NO_CHANGE, "total_steps": 1}
  changes |= {**DECODER, "model.pooling": "last"} if name == "decoder" else {}
  state = subtree(run(folder, f"{name} head", changes), "params")
  body = read_checkpoint(base)
  body = subtree(body, "ema") or subtree(body, "params")
  head = {path for path in state if path.startswith("head")}
  assert head and set(state) - set(body) <= head
  assert_identical({path: state[path] for path in set(state) - head}, {path: body[path] for path in set(state) - head})
  same, other = (make_program(make_config(folder, CLASSIFICATION, {**changes, "seed": seed})).init() for seed in (0, 1))
  np.testing.assert_array_equal(same.params["head"]["kernel"], state["head/kernel"])
  assert (np.asarray(other.params["head"]["kernel"]) != state["head/kernel"]).any()


@pytest.fixture(scope="module")
def two_classes(folder):
  """The checkpoint of a run with a head of two classes."""
  return run(folder, "two", {"total_steps": 1})


@pytest.mark.slow
def test_init_map_of_the_error_message_replaces_a_head_of_another_size(folder, two_classes):
  objective = {"name": "classification", "labels": ("maybe", "no", "yes")}
  changes = {"init_from": str(folder / "two"), "optim.lr": NO_CHANGE, "total_steps": 1}
  with pytest.raises(ConfigError, match=r"head/\w+ has shape .* --config\.init_map='(.*)'") as error:
    run(folder, "three", changes, objective)
  assert "\n" not in str(error.value)
  flag = re.search(r"--config\.init_map='.*'", str(error.value))[0].replace("'(", "(", 1)[:-1]
  rules = cfglib.load_config(["--config=base", flag]).init_map
  state = subtree(run(folder, "three", changes | {"init_map": rules}, objective), "params")
  assert state["head/kernel"].shape == (32, 3)
  np.testing.assert_array_equal(state["embedding/table"], two_classes["params/embedding/table"])


@pytest.mark.slow
def test_init_map_renames_parameters(folder, two_classes):
  swap = ((r"(encoder/layers/attention)/query/(.*)", r"\1/key/\2"), (r"(.*)/key/(.*)", r"\1/query/\2"))
  changes = {"init_from": str(folder / "two"), "optim.lr": NO_CHANGE, "total_steps": 1, "init_map": swap}
  state = subtree(run(folder, "swapped", changes), "params")
  for name, source in (("query", "key"), ("key", "query"), ("value", "value")):
    kernel = two_classes[f"params/encoder/layers/attention/{source}/kernel"]
    np.testing.assert_array_equal(state[f"encoder/layers/attention/{name}/kernel"], kernel)


# Reference models.

PREFERENCE = {"name": "preference", "prompt": "text", "chosen": "label", "rejected": "text", "sft_weight": 0.1}


@pytest.fixture(scope="module")
def preference(folder, decoder_run):
  """Changes of a run whose reference is the model with adapters from which it starts."""
  changes = DECODER | ADAPTERS | CONSTANT | {"optim.lr": 0.1}
  run(folder, "sft", changes | {"init_from": str(decoder_run)}, CAUSAL)
  return changes | {"init_from": str(folder / "sft"), "auxiliary.reference": ConfigDict({"init_from": None})}


@pytest.mark.slow
def test_reference_model_equals_the_initial_model_with_adapters(folder, preference):
  program = make_program(make_config(folder, PREFERENCE, preference))
  state = program.init(program.starting_params()[0])
  stream = program.make_stream(open_source(program.config, "train"), prefetch=0)
  batch = program.put(next(stream), 8)
  stream.close()
  metrics = program.eval_step(program.eval_params(state), batch, program.auxiliary_params)
  loss, margin = (float(metrics[name][0] / metrics[name][1]) for name in ("loss", "margin"))
  np.testing.assert_allclose([loss, margin], [np.log(2), 0], atol=1e-6)


@pytest.mark.slow
def test_run_with_reference_resumes_identically(folder, preference):
  whole = run(folder, "dpo", preference | {"total_steps": 4}, PREFERENCE)
  run(folder, "dpo halves", preference, PREFERENCE)
  assert_identical(run(folder, "dpo halves", preference | {"total_steps": 4}, PREFERENCE), whole)


@pytest.mark.slow
def test_run_with_another_init_from_is_rejected(folder, decoder_run, preference):
  run(folder, "fixed", preference | {"total_steps": 1}, PREFERENCE)
  with pytest.raises(ConfigError, match=r"holds a run with init_from="):
    run(folder, "fixed", preference | {"total_steps": 2, "init_from": str(decoder_run)}, PREFERENCE)


# Programs without a run.


def test_custom_model_needs_no_layer_names_without_layer_decay(folder):
  config = make_config(folder, CAUSAL, {})
  name = "tests.support.custom_model:make_model"
  config.model = ConfigDict({"name": name, "vocab_size": None, "max_len": None, "width": 8})
  config.optim.decay_mask = ((".*", True),)
  assert make_program(config).num_params > 0
  config.optim.layer_decay = 0.5
  with pytest.raises(ConfigError, match=r"layer_decay needs a model whose layers are known"):
    make_program(config)


def test_total_steps_in_epochs_count_every_example_once(folder):
  assert make_program(make_config(folder, CLASSIFICATION, {"total_steps": "2 epochs"})).total_steps == 16


def test_total_steps_in_epochs_count_every_window_of_long_contexts(folder):
  context = "one two three four five six seven. " * 4
  record = {"question": "q", "context": context, "answers": []}
  (folder / "qa.jsonl").write_text(json.dumps(record) + "\n")
  config = make_config(folder, CLASSIFICATION, {"total_steps": "8 epochs", "batch_size": 8})
  config.data.corpus = ConfigDict({"name": "jsonl", "files": str(folder / "qa.jsonl"), "text": None})
  config.objective = ConfigDict({"name": "span_qa", "stride": 4, "max_question": 4, "no_answer": True})
  program = make_program(config)
  assert program.total_steps == len(program.objective.encode_record(record, labelled=True))


def test_total_steps_in_epochs_is_rejected_for_packed_data(folder):
  with pytest.raises(ConfigError, match="an epoch of packed data has no known number of steps"):
    make_program(make_config(folder, MASKED, {"total_steps": "1 epochs"}))
