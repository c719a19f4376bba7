"""A small contrastive run on pairs of texts: config file, data, and programs."""

import json

from llmjax.config import load_config, to_dict
from llmjax.training import program

PAIRS = [{"title": f"how to get {i} or {i * 37 % 11}", "text": f"def getItem_{i}(): return {i}"} for i in range(30)]

CONFIG = """
from ml_collections import ConfigDict

from configs import base
from llmjax.config import optional


def get_config(arg=None):
  config = base.get_config()
  config.model.update(d_model=32, encoder_layers=1, decoder_layers=0, num_heads=4)
  config.update(seq_len=32, batch_size=8, total_steps=2)
  config.data.corpus = ConfigDict({"name": "files", "files": "pairs.jsonl"})
  config.data.train, config.data.eval = "[:50%]", "[50%:]"
  config.data.tokenizer = ConfigDict({"name": "bytes"})
  config.objective = ConfigDict({"name": "contrastive", "anchor": "title", "positive": "text", "pooling": "cls"})
  config.log.tensorboard = False
  return config
"""


def write_run(folder, pairs=PAIRS):
  """Write tiny.py and its data, pairs.jsonl, into a folder."""
  (folder / "tiny.py").write_text(CONFIG)
  (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def make_tiny_program(objective=None, model=None, devices=None):
  """Return the program of tiny.py in the current folder, with another objective or changed model keys."""
  config = to_dict(load_config(["--config=tiny.py"]))
  config["objective"] = objective or config["objective"]
  config["model"] |= model or {}
  config["data"]["tokenizer"] |= {"mask": True, "sentinels": 9}
  return program.make_program(config, devices=devices)
