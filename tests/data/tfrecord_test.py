"""TFDS datasets in TFRecord files, read without TensorFlow."""

import gzip
import itertools
import json
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llmjax.config import ConfigError, build
from llmjax.data.sources import tfrecord
from llmjax.data.sources.registry import SOURCES
from llmjax.data.sources.tfrecord import RecordRange, TFRecords
from llmjax.storage.cache import cache_dir

SIZES = {"train": 50, "test": 3}  # in four shards and in one


def masked(data):
  """Return the masked CRC-32C, computed bit by bit."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecords(contents):
  """Return the bytes of a TFRecord file."""
  lengths = [struct.pack("<Q", len(content)) for content in contents]
  return b"".join(n + masked(n) + content + masked(content) for n, content in zip(lengths, contents))


def open_(split="train", **spec):
  return build({"name": "tfds", "text": "line", **spec}, SOURCES, "data.corpus", split=split)


@pytest.fixture
def folders(home):
  """A small dataset in the format of TFDS, as ArrayRecord and as TFRecord."""
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter

  features = tfds.features.FeaturesDict({"line": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)})
  splits = []
  for kind in ("array_record", "tfrecord"):
    (home / kind / "1.0.0").mkdir(parents=True)
  for name, size in SIZES.items():
    shards = 4 if name == "train" else 1
    edges = [size * i // shards for i in range(shards + 1)]
    for i in range(shards):
      numbers = range(edges[i], edges[i + 1])
      contents = [features.serialize_example({"line": "é" * n + name, "number": n}) for n in numbers]
      end = f"{i:05d}-of-{shards:05d}"
      writer = ArrayRecordWriter(str(home / f"array_record/1.0.0/tiny-{name}.array_record-{end}"), "group_size:1")
      for content in contents:
        writer.write(content)
      writer.close()
      (home / f"tfrecord/1.0.0/tiny-{name}.tfrecord-{end}").write_bytes(tfrecords(contents))
    lengths = [str(b - a) for a, b in itertools.pairwise(edges)]
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits.append({"name": name, "shardLengths": lengths, "numBytes": "1", "filepathTemplate": template})
  for kind in ("array_record", "tfrecord"):
    folder = home / kind / "1.0.0"
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": kind, "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features.save_config(str(folder))
  return home / "array_record" / "1.0.0", home / "tfrecord" / "1.0.0"


@pytest.mark.parametrize(
  "split", ["train", "test", "all", "train[:10%]", "train[10%:]", "train[12:13]", "train[5:40]", "train[-25%:]"]
)
def test_tfrecord_and_array_record_have_the_same_records(folders, split):
  one, other = (open_(split, folder=str(folder)) for folder in folders)
  assert len(one) == len(other) > 0 and list(one) == list(other)
  assert all(record["text"] == record["line"] and record["number"] < 50 for record in other)
  with pytest.raises(IndexError):
    other[len(other)]


def test_reading_tfds_does_not_import_tensorflow(folders):
  code = f"""
from llmjax.data.sources.tfds import tfds_source
assert len(list(tfds_source("all", folder={str(folders[1])!r}, text="line"))) == 53
import sys
assert not [m for m in sys.modules if m.split(".")[0] == "tensorflow"]
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_prepared_dataset_is_not_prepared_again(folders, home, monkeypatch):
  import tensorflow_datasets as tfds

  (home / "data" / "tiny").mkdir(parents=True)
  folders[1].rename(home / "data" / "tiny" / "1.0.0")
  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", None)  # preparing it again would fail
  assert len(open_(dataset="tiny", data_dir=str(home / "data"))) == 50
  assert len(open_(dataset="tiny:1.0.0", data_dir=str(home / "data"))) == 50


def test_threads_read_more_files_than_stay_open(home, monkeypatch):
  """Several threads open each file for the first time at once."""
  monkeypatch.setattr(tfrecord, "MAX_OPEN_FILES", 3)
  parts = []
  for i in range(8):
    path = home / f"{i}"
    path.write_bytes(tfrecords([f"{i} {j}".encode() * j for j in range(20)]))
    parts.append(RecordRange(path, 20, 2, 18))
  records, start = TFRecords(parts), threading.Barrier(8)

  def read(order):
    start.wait()
    return [records[i] for i in order]

  expected = [f"{i} {j}".encode() * j for i in range(8) for j in range(2, 18)]
  assert len(records) == len(expected) == 128
  with ThreadPoolExecutor(8) as pool:
    for contents in pool.map(read, [range(128)] * 8):
      assert contents == expected
  assert len(list((cache_dir() / "tfrecord").iterdir())) == 8  # no temporary files


def test_index_of_a_file_is_built_once(home, monkeypatch):
  path = home / "file"
  path.write_bytes(tfrecords([b"one", b"", b"three"]))
  whole = [RecordRange(path, 3, 0, 3)]
  records = TFRecords(whole)
  assert [records[i] for i in range(3)] == [b"one", b"", b"three"]
  monkeypatch.setattr(tfrecord, "record_offsets", None)  # a second scan would fail
  assert TFRecords(whole)[2] == b"three"


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda data: data[:-7], r"file: must hold 4 records, got 3\. Copy"),
    (lambda data: data[:-21], r"file: must hold 4 records, got 3"),
    (lambda data: data[:-22], r"file: must hold 4 records, got 2"),
    (lambda data: data + tfrecords([b"more"]), r"file: must hold 4 records, got more"),
    (lambda data: data[:21] + b"\x06" + data[22:], r"file: is damaged: the length of record 1, at byte 21, does not"),
    (lambda data: data[:28] + b"\xff" + data[29:], r"file: is damaged: the length of record 1, at byte 21"),
    (gzip.compress, r"file: is compressed\. Decompress it"),
    (lambda data: b"", r"file: cannot be read"),
  ],
)
def test_damaged_file_is_named(home, damage, message):
  path = home / "file"
  path.write_bytes(damage(tfrecords([b"12345"] * 4)))
  with pytest.raises(ConfigError, match=message) as caught:
    TFRecords([RecordRange(path, 4, 0, 4)])[0]
  assert "\n" not in str(caught.value) and not list(Path(cache_dir()).glob("tfrecord/*.npy"))


def test_broken_tfds_folder_is_one_line_error(folders):
  folder = folders[1]
  with pytest.raises(ConfigError, match=r"tiny/1\.0\.0 has no split 'validation'.*: train, test$"):
    open_("validation", folder=str(folder))
  shard = folder / "tiny-train.tfrecord-00002-of-00004"
  content = shard.read_bytes()
  shard.write_bytes(content.replace(b"number", b"\xff\xff\xff\xff\xff\xff", 1))
  with pytest.raises(ConfigError, match=r"record 25 of split 'train' is damaged"):
    open_(folder=str(folder))[25]
  shard.unlink()
  with pytest.raises(ConfigError, match=r"00002-of-00004: there is no such file"):
    open_(folder=str(folder))
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
  with pytest.raises(ConfigError, match=r"must be stored as array_record or tfrecord, got riegeli"):
    open_(folder=str(folder))
