"""Runs and data in a bucket equal those on disk, also after a kill, and nothing is downloaded twice."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from llmjax.checkpoints.manager import Checkpoints
from llmjax.cli.main import main
from llmjax.config import ConfigError
from llmjax.config import files as cfglib
from llmjax.data.sources.registry import files_source
from llmjax.storage import buckets
from llmjax.telemetry import writers
from llmjax.telemetry.curves import read_curves, read_samples
from llmjax.training import loop
from llmjax.training.program import make_program
from tests.support import fake_bucket

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason='needs `pip install "llmjax[gcs]"`')

TEXT = "".join(f"{i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(400))
RUN = "gs://bucket/runs/x"
COPY = "gs://bucket/corpus/t.txt"


@pytest.fixture(scope="module")
def server():
  with fake_bucket.serve_buckets("bucket", "forbidden") as server, pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", server.url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    patch.setenv(
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
    )  # else gcsfs queries the kind of bucket outside the emulation
    yield server


def downloads(server, start=0):
  return [r for r in server.requests[start:] if r.startswith("GET") and "alt=media" in r and "corpus" in r]


def run(text, workdir, *more):
  base = [f"--config=char:text={text},debug", "--config.batch_size=8", "--config.checkpoint.every=2"]
  steps = ["--config.total_steps=6", "--config.checkpoint.keep=2", "--config.log.every=1", "--config.evals={}"]
  loop.run(cfglib.load_config([*base, *steps, *more]), workdir)


def saved(workdir):
  """Return the newest checkpoint's state as {path: array}, data cursor, data fingerprint, and all steps."""
  checkpoints = Checkpoints(workdir)
  step = checkpoints.steps()[-1]
  leaves = jax.tree_util.tree_leaves_with_path(checkpoints.manager.restore(step)["state"])
  state = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
  cursor, manifest = checkpoints.read_cursor(step), checkpoints.read_manifest(step)
  steps = checkpoints.steps()
  checkpoints.close()
  return state, cursor, manifest["data_fingerprint"], steps


def curves(workdir):
  """Return the curves without measurements of time."""
  return {name: curve for name, curve in read_curves(workdir).items() if "per_second" not in name}


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
  """A folder with a local run "x"; the same one is in the bucket, after a kill in the middle of its second save."""
  folder = tmp_path_factory.mktemp("runs")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LLMJAX_CACHE", str(folder / "cache"))
    (folder / "t.txt").write_text(TEXT)
    server.objects["bucket"]["corpus/t.txt"] = TEXT.encode()
    run(folder / "t.txt", folder / "x")
    run(COPY, RUN)
    assert len(downloads(server)) == 1
    names = [name for name, _ in server.changes]
    cut = names.index("runs/x/checkpoints/4/state/commit_success.txt")
    objects = {"corpus/t.txt": TEXT.encode()}
    for name, content in server.changes[:cut]:
      objects[name] = content
    server.objects["bucket"] = {name: content for name, content in objects.items() if content is not None}
    assert max(read_curves(RUN)["train/loss"][0]) > 2 and not any("checkpoints/6" in name for name in objects)
    run(COPY, RUN)
    assert len(downloads(server)) == 1
  return folder


@pytest.mark.slow
def test_killed_run_in_bucket_resumes_to_the_local_state_bitwise(runs):
  (state, *others), (local, *local_others) = saved(RUN), saved(runs / "x")
  assert others == local_others and others[-1] == [4, 6]
  assert state.keys() == local.keys() and len(state) > 10
  for path, leaf in state.items():
    np.testing.assert_array_equal(leaf, local[path], err_msg=path)
  assert curves(RUN) == curves(runs / "x") and curves(RUN)["train/loss"][0] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_run_in_bucket_has_the_files_of_a_local_run(runs, server):
  def kinds(names):
    return {name.partition("/")[0] for name in names}

  there = [name.removeprefix("runs/x/") for name in server.objects["bucket"] if name.startswith("runs/x/")]
  here = [path.relative_to(runs / "x").as_posix() for path in (runs / "x").rglob("*")]
  assert kinds(there) == kinds(here) >= {"checkpoints", "config.json", "metrics.jsonl", "samples.jsonl", "tensorboard"}
  assert not list((runs / "cache" / "scratch").iterdir())


@pytest.mark.slow
def test_run_in_bucket_can_be_loaded_generate_and_report(runs, server, home, capsys):
  _, params, tokenizer = llmjax.load(RUN)
  _, same, _ = llmjax.load(str(runs / "x" / "checkpoints" / "6"))
  jax.tree.map(np.testing.assert_array_equal, params, same)
  assert tokenizer.decode(tokenizer.encode("lazy")) == "lazy"
  assert main(["generate", f"--model={RUN}/checkpoints/6", "--prompt=the ", "--max_new_tokens=4"]) == 0
  assert capsys.readouterr().out.startswith("the ")
  assert main(["report", f"--workdir={RUN}"]) == 0
  assert "report.html, report.png, metrics.jsonl, samples.jsonl, tensorboard" in capsys.readouterr().out
  assert b"<html" in server.objects["bucket"]["runs/x/report.html"] and "runs/x/report.png" in server.objects["bucket"]


@pytest.mark.slow
def test_init_from_bucket_starts_with_its_params_and_fresh_is_refused(runs, home):
  config = cfglib.load_config(
    [f"--config=char:text={COPY},debug", f"--config.init_from={RUN}", "--config.batch_size=8"]
  )
  with pytest.raises(ConfigError, match=r"gcloud storage mv gs://bucket/runs/x "):
    loop.run(config, RUN, fresh=True)
  params, afresh = make_program(config).starting_params()
  assert not afresh
  jax.tree.map(np.testing.assert_array_equal, params, llmjax.load(str(runs / "x")).params)


@pytest.mark.slow
def test_damaged_checkpoint_in_bucket_is_moved_completely(runs, server):
  objects = server.objects["bucket"]
  before = sorted(content for name, content in objects.items() if "/checkpoints/6/" in name)
  copies = {name.replace("runs/x", "moved"): content for name, content in objects.items() if "checkpoints/" in name}
  objects |= copies
  checkpoints = Checkpoints("gs://bucket/moved", write=True)
  checkpoints.archive_damaged([6])
  assert checkpoints.steps() == [4]
  checkpoints.close()
  assert sorted(content for name, content in objects.items() if name.startswith("moved/damaged/6-")) == before


def test_hugging_face_folder_in_bucket_is_downloaded_once(server, home):
  folder = Path(__file__).parents[1] / "testdata" / "huggingface" / "gpt2"
  for path in folder.iterdir():
    server.put("bucket", f"corpus/gpt2/{path.name}", path.read_bytes())
  jax.tree.map(np.testing.assert_array_equal, llmjax.load("gs://bucket/corpus/gpt2").params, llmjax.load(folder).params)
  count = len(downloads(server))
  llmjax.load("gs://bucket/corpus/gpt2")
  assert len(downloads(server)) == count


def test_path_sees_objects_written_by_another_host(server):
  server.put("bucket", "z/1", b"")
  folder = buckets.as_path("gs://bucket/z")
  assert [path.name for path in folder.iterdir()] == ["1"]
  server.put("bucket", "z/2", b"")
  assert (folder / "2").exists() and sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_upload_merges_staged_folders_into_the_bucket(server, home):
  target = buckets.as_path("gs://bucket/p/profile")
  for name in ("a/1", "a/2"):  # into a new folder, and into an existing one
    folder = buckets.staging_dir(target)
    (folder / "a").mkdir()
    (folder / name).write_text(name)
    buckets.upload_folder(folder, target)
  found = {name: content for name, content in server.objects["bucket"].items() if name.startswith("p/")}
  assert found == {"p/profile/a/1": b"a/1", "p/profile/a/2": b"a/2"}


def test_metrics_writer_uploads_only_changed_files_when_due(server, home, monkeypatch):
  writer = writers.MetricWriter("gs://bucket/w", tensorboard=False)
  objects, name = server.objects["bucket"], "w/metrics.jsonl"
  writer.write_text(1, "sample", "the lazy dog")
  writer.write(1, {"a": 1.0})
  assert name not in objects
  writer.sync()
  assert objects[name].count(b"\n") == 1
  start = len(server.changes)
  writer.write(2, {"a": 1.0})
  writer.sync()
  assert [changed for changed, _ in server.changes[start:]] == [name]
  monkeypatch.setattr(buckets, "UPLOAD_INTERVAL_SECONDS", 0.0)
  writer.write(3, {"a": 1.0})
  writer.close()
  assert objects[name].count(b"\n") == 3
  again = writers.MetricWriter("gs://bucket/w", start_step=2, tensorboard=False)
  again.write(3, {"a": 2.0})
  again.close()
  assert read_curves("gs://bucket/w") == {"a": ([1, 2, 3], [1.0, 1.0, 2.0])}
  assert [sample["text"] for sample in read_samples("gs://bucket/w")] == ["the lazy dog"]


FILES = {
  "a/1.txt": b"one\n\ntwo\n",
  "a/b/2.txt": b"three\n",
  "a/.hidden/3.txt": b"no\n",
  "1.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
  "1.csv": b"text,label\none,1\ntwo,2\n",
}


@pytest.mark.parametrize("pattern", ["a/**/*.txt", "a/1.txt", "*.jsonl", "1.csv", "1.parquet", "1.array_record"])
def test_data_in_bucket_has_the_local_fingerprint_and_one_download(server, home, pattern):
  for name, content in FILES.items():
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    (home / name).write_bytes(content)
  make_records(home)
  for path in filter(lambda p: p.is_file(), home.rglob("*")):
    server.put("bucket", f"corpus/{path.relative_to(home)}", path.read_bytes())
  local = files_source("[:100%]", str(home / pattern))
  start = len(server.requests)
  there = files_source("[:100%]", f"gs://bucket/corpus/{pattern}")
  assert there.fingerprint == local.fingerprint and list(there) == list(local)
  fetched = downloads(server, start)
  assert len(fetched) == (2 if "**" in pattern else 1)
  files_source("[:100%]", f"gs://bucket/corpus/{pattern}")
  assert downloads(server, start) == fetched
  if pattern == "*.jsonl":
    server.put("bucket", "corpus/1.jsonl", b'{"text": "new"}\n{"text": "two"}\n')
    assert files_source("[:100%]", f"gs://bucket/corpus/{pattern}")[0]["text"] == "new"
    assert len(downloads(server, start)) == 2


def make_records(folder):
  import pyarrow
  from array_record.python.array_record_module import ArrayRecordWriter
  from pyarrow import parquet

  parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / "1.parquet")
  writer = ArrayRecordWriter(str(folder / "1.array_record"), "group_size:1")
  writer.write(b"one")
  writer.close()


@pytest.mark.parametrize(
  "path, message",
  [
    ("gs://nowhere/corpus/*.txt", "gs://nowhere.*there is no such bucket.*credentials"),
    ("gs://forbidden/corpus/*.txt", "gs://forbidden.*Forbidden.*Storage Object User"),
    ("gs://bucket/absent/*.txt", r"data\.corpus\.files: there is no such file, got 'gs://bucket/absent/\*.txt'$"),
    ("gs://bucket/corpus", r"is a folder, got .*\. Write 'gs://bucket/corpus/\*\*/\*'"),
  ],
)
def test_missing_or_forbidden_data_is_one_line(server, home, path, message):
  server.objects["bucket"]["corpus/t.txt"] = TEXT.encode()
  with pytest.raises(ConfigError, match=message) as caught:
    files_source("", path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bucket, message", [("nowhere", "no such bucket"), ("forbidden", "Forbidden")])
def test_run_in_missing_or_forbidden_bucket_fails_at_once(server, home, bucket, message):
  (home / "t.txt").write_text(TEXT)
  for call in (lambda: run(home / "t.txt", f"gs://{bucket}/x"), lambda: llmjax.load(f"gs://{bucket}/x")):
    with pytest.raises(ConfigError, match=f"gs://{bucket}/x.*{message}"):
      call()
  with pytest.raises(ConfigError, match="gs://bucket/nothing does not exist"):
    llmjax.load("gs://bucket/nothing")


def test_transient_storage_error_is_a_connection_error():
  import aiohttp

  with (
    pytest.raises(ConnectionError, match="gs://b/x: ServerDisconnectedError"),
    buckets.translate_storage_errors("gs://b/x"),
  ):
    raise aiohttp.ServerDisconnectedError
  with pytest.raises(ConfigError, match="gs://b/x: Forbidden"), buckets.translate_storage_errors("gs://b/x"):
    raise type("Forbidden", (Exception,), {})


def test_missing_gcsfs_names_the_extra(monkeypatch):
  monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r'pip install "llmjax\[gcs\]"'):
    buckets.as_path("gs://bucket/another")
