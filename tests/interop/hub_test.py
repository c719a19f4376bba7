"""Models by their hub names: from the cache, and downloaded."""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

from llmjax.config import ConfigError
from llmjax.interop.hub import fetch_from_hub, is_hub_name
from tests.support.huggingface_folders import DATA

GPT2 = DATA / "gpt2"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Return an empty Hugging Face cache; the hub cannot be reached."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  return tmp_path / "hub"


def add_to_cache(cache, name, revision="0" * 40):
  """Store the reference folder in the cache as a repository, with the layout of huggingface_hub."""
  repository = cache / f"models--{name.replace('/', '--')}"
  (repository / "refs").mkdir(parents=True)
  (repository / "refs" / "main").write_text(revision)
  shutil.copytree(GPT2, repository / "snapshots" / revision)


@pytest.mark.parametrize("name", ["openai-community/gpt2", "gpt2", f"openai-community/gpt2@{'0' * 40}"])
def test_fetch_from_hub_finds_a_cached_model(name, cache):
  add_to_cache(cache, "openai-community/gpt2")
  assert (fetch_from_hub(name) / "model.safetensors").read_bytes() == (GPT2 / "model.safetensors").read_bytes()


def test_fetch_from_hub_of_a_short_name_ignores_other_organizations(cache):
  add_to_cache(cache, "mallory/gpt2")
  with pytest.raises(ConfigError, match="not in the Hugging Face cache"):
    fetch_from_hub("gpt2")


@pytest.mark.parametrize(
  ("text", "expected"),
  [("gpt2", True), ("org/x@main", True), ("../runs/x", False), ("/tmp/x", False), ("a/b/c", False)],
)
def test_is_hub_name_excludes_paths(text, expected):
  assert is_hub_name(text) == expected


class Hub(http.server.BaseHTTPRequestHandler):
  """The parts of the hub that a download uses, with the files of `folder` as org/tiny."""

  folder: Path
  revision = "1" * 40
  requests: list[str]

  def do_GET(self):
    self.reply(True)

  def do_HEAD(self):
    self.reply(False)

  def reply(self, with_body):
    self.requests.append(self.path)
    files, headers = sorted(self.folder.iterdir()), {}
    if self.path.startswith("/api/models/org/tiny/tree"):
      sizes = [(p, p.stat().st_size) for p in files]
      body = json.dumps([{"type": "file", "path": p.name, "oid": "2" * 40, "size": size} for p, size in sizes]).encode()
    elif self.path.startswith("/api/models/org/tiny"):
      siblings = [{"rfilename": p.name} for p in files]
      body = json.dumps({"id": "org/tiny", "sha": self.revision, "siblings": siblings}).encode()
    else:
      body = (self.folder / self.path.rpartition("/")[2]).read_bytes()
      headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.revision}
    self.send_response(200)
    for key, value in {"Content-Length": str(len(body)), **headers}.items():
      self.send_header(key, value)
    self.end_headers()
    if with_body:
      self.wfile.write(body)

  def log_message(self, *_):
    pass


def test_download_skips_pickles_and_fills_the_cache(cache, tmp_path, monkeypatch):
  shutil.copytree(GPT2, tmp_path / "hub_files")
  (tmp_path / "hub_files" / "pytorch_model.bin").write_bytes(b"pickle")
  handler = type("Handler", (Hub,), {"folder": tmp_path / "hub_files", "requests": []})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
  try:
    folder = fetch_from_hub("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == (GPT2 / "model.safetensors").read_bytes()
    assert not any("pytorch_model.bin" in path for path in handler.requests)
    count = len(handler.requests)
    assert fetch_from_hub("org/tiny") == folder
    assert len(handler.requests) == count
  finally:
    server.shutdown()
    server.server_close()
