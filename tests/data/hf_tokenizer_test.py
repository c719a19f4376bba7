"""Tokenizers of Hugging Face folders and exported ones; testdata/tokenizers/make.py makes the references."""

import contextlib
import json
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.extra_tokens import extend_vocabulary
from llmjax.data.tokenizers.hf_export import to_huggingface
from llmjax.data.tokenizers.hf_folder import read_tokenizer_folder
from llmjax.data.tokenizers.huggingface import tokenizer_from_folder
from llmjax.data.tokenizers.registry import make_tokenizer, tokenizer_from_files
from llmjax.data.tokenizers.sentencepiece import parse_sentencepiece_model, sentencepiece_from_files

FOLDERS = Path(__file__).parents[1] / "testdata" / "tokenizers"
EXPECTED = json.loads((FOLDERS / "expected.json").read_text(encoding="utf-8"))
TEXTS = EXPECTED["texts"]
TEMPLATES = {
  "gpt2": ([], []),
  "roberta": ([0], [2]),
  "llama3": ([400], []),
  "bert": ([2], [3]),
  "bert_cased": ([2], [3]),
}
TEMPLATES |= {"t5": ([], [1]), "llama": ([1], []), "gemma": ([2], [])}


@pytest.fixture(params=TEMPLATES, scope="module")
def name(request):
  return request.param


@pytest.fixture(scope="module")
def expected(name):
  return EXPECTED["folders"][name]


@pytest.fixture(scope="module")
def tokenizer(name):
  return tokenizer_from_folder(FOLDERS / name)


def copy_folder(name, to, **files):
  """Copy a folder to `to`, with some files replaced or removed (None), and return `to`."""
  shutil.copytree(FOLDERS / name, to)
  for file, content in files.items():
    path = to / file.replace("__", ".")
    path.unlink(missing_ok=True)
    if content is not None:
      path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
  return to


def export(tokenizer, folder):
  """Write an exported tokenizer to a folder and return the folder."""
  for name, content in to_huggingface(tokenizer).items():
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
  return folder


# Import


def test_folder_tokenizer_gives_the_ids_and_texts_of_transformers(tokenizer, expected):
  ids, mask = tokenizer.pad(TEXTS)
  assert ids.dtype == mask.dtype == np.int32
  assert [row[real == 1].tolist() for row, real in zip(ids, mask)] == expected["single"]
  assert (ids[mask == 0] == expected["roles"]["pad"]).all()
  left, mask = tokenizer.pad(TEXTS, side="left")
  assert [row[real == 1].tolist() for row, real in zip(left, mask)] == expected["single"]
  assert [tokenizer.decode(ids) for ids in expected["single"]] == expected["decoded"]


def test_special_tokens_around_texts_are_those_of_the_folder(name, tokenizer, expected):
  before, behind = TEMPLATES[name]
  bos, eos = ([] if token is None else [token] for token in (tokenizer.bos_id, tokenizer.eos_id))
  for text, single in zip(TEXTS, expected["single"]):
    ids = tokenizer.encode(text).tolist()
    assert before + ids + behind == single
    assert tokenizer.prompt(text).tolist() == before + ids
    assert tokenizer.document(text).tolist() == bos + ids + eos


def test_special_tokens_have_the_roles_of_transformers(tokenizer, expected):
  roles = expected["roles"]
  assert tokenizer.vocab_size == expected["size"] and tokenizer.pad_id == roles["pad"]
  assert tokenizer.bos_id in (roles["bos"], roles["cls"]) and tokenizer.eos_id in (roles["eos"], roles["sep"])
  assert (tokenizer.unk_id, tokenizer.mask_id) == (roles["unk"], roles["mask"])
  assert (
    set(tokenizer.names) == set(np.flatnonzero(tokenizer.special)) and tokenizer.decode(list(tokenizer.names)) == ""
  )
  assert (tokenizer.byte_lengths()[tokenizer.special] == 0).all()


def test_encode_reads_names_of_special_tokens_as_text(tokenizer):
  for name in tokenizer.names.values():
    ids = tokenizer.encode(f"a{name} {name}b")
    assert not tokenizer.special[ids[ids != tokenizer.unk_id]].any(), name
    shown = tokenizer.show([*tokenizer.encode("a"), *[i for i in tokenizer.names if tokenizer.names[i] == name]])
    assert shown.endswith(name)


def test_stream_of_folder_tokenizer_equals_decode(tokenizer, expected):
  rng = random.Random(0)
  strange = [[rng.randrange(tokenizer.vocab_size + 3) for _ in range(12)] for _ in range(60)]
  for ids in [*expected["single"], *strange]:
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_byte_lengths_of_folder_tokenizer_sum_to_the_text(name, tokenizer):
  if name in ("gpt2", "llama3", "gemma"):
    for text in TEXTS:
      if name != "gemma" or "\u2581" not in text:  # SentencePiece's symbol for a space
        assert tokenizer.byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())
  else:
    assert tokenizer.byte_lengths()[tokenizer.encode("the dog")].sum() in (len("thedog"), len(" the dog"))


def test_offsets_of_folder_tokenizer_contain_the_piece(name, tokenizer):
  """Texts are compared without what a vocabulary removes, such as accents and capitals."""

  def bare(text):
    text = unicodedata.normalize("NFKC", text).lower() if name != "bert_cased" else text
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)).replace("\u2581", " ")

  checked = 0
  for text in TEXTS:
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids.tolist() == tokenizer.encode(text).tolist() and offsets.shape == (len(ids), 2)
    assert (np.diff(offsets, axis=0) >= 0).all() and (offsets <= len(text)).all()
    for token, (start, stop) in zip(ids, offsets.tolist()):
      piece = tokenizer.pieces[token]
      with contextlib.suppress(UnicodeDecodeError):  # part of a character
        if piece.strip():
          assert bare(piece.decode()).strip() in bare(text[start:stop])
          assert len(text[start:stop].strip()) <= len(piece.decode().strip())
          checked += 1
  assert checked > 100


def test_hash_sign_is_removed_from_word_piece_continuations_only(tokenizer, name):
  ids = tokenizer.encode("##")
  assert b"".join(tokenizer.pieces[i] for i in ids).strip() in (
    {b"##"} if not name.startswith("bert") else {b"##", b""}
  )
  assert bool(tokenizer.continuation_ids) == name.startswith("bert")


def test_folder_files_rebuild_the_tokenizer(name, tokenizer, expected):
  files = tokenizer.to_files()
  assert files == {p.name: p.read_bytes() for p in (FOLDERS / name).iterdir()}
  again = tokenizer_from_files(json.loads(json.dumps(tokenizer.spec())), files)
  assert [again.pad([text])[0][0].tolist() for text in TEXTS] == expected["single"]
  assert (
    again.special.tolist() == tokenizer.special.tolist()
    and again.names == tokenizer.names
    and again.pieces == tokenizer.pieces
  )
  assert again.chat_templates == tokenizer.chat_templates


def test_config_name_hf_gives_the_folder_tokenizer(tokenizer, name):
  same = make_tokenizer({"name": "hf", "path": str(FOLDERS / name)})
  assert same.to_files() == tokenizer.to_files() and same.single_template == tokenizer.single_template


@pytest.mark.parametrize("name", ["roberta", "bert", "t5", "llama", "gemma"])
def test_folder_without_class_is_recognized_by_its_vocabulary(tmp_path, name):
  config = json.loads((FOLDERS / name / "tokenizer_config.json").read_text())
  del config["tokenizer_class"]
  bare = tokenizer_from_folder(copy_folder(name, tmp_path / name, tokenizer_config__json=config))
  assert [bare.pad([text])[0][0].tolist() for text in TEXTS] == EXPECTED["folders"][name]["single"]
  if name != "t5":  # its configuration gives the number of sentinels
    alone = tokenizer_from_folder(
      copy_folder(name, tmp_path / "alone", tokenizer_config__json=None, special_tokens_map__json=None)
    )
    assert alone.single_template == bare.single_template and alone.eos_id == bare.eos_id


def test_mask_with_lstrip_removes_the_space_before_it():
  tokenizer = tokenizer_from_folder(FOLDERS / "roberta")
  assert tokenizer.to_special_ids("the <mask>") == [*tokenizer.encode("the").tolist(), tokenizer.mask_id]


def test_t5_sentinels_are_its_last_tokens(tmp_path):
  tokenizer = tokenizer_from_folder(FOLDERS / "t5")
  assert [tokenizer.names[i] for i in tokenizer.sentinels] == [f"<extra_id_{k}>" for k in range(5)]
  assert tokenizer.sentinels == tuple(tokenizer.vocab_size - 1 - k for k in range(5))
  assert tokenizer.parse("the<extra_id_0>dog").tolist().count(tokenizer.sentinels[0]) == 1
  bare = tokenizer_from_folder(copy_folder("t5", tmp_path / "t5", tokenizer_config__json=None))
  assert len(bare.sentinels) == 100 and bare.single_template == ((), (1,))


def test_encoder_json_and_vocab_bpe_are_read_as_gpt2(tmp_path):
  folder = tmp_path / "gpt2"
  folder.mkdir()
  shutil.copy(FOLDERS / "gpt2" / "vocab.json", folder / "encoder.json")
  shutil.copy(FOLDERS / "gpt2" / "merges.txt", folder / "vocab.bpe")
  tokenizer = tokenizer_from_folder(folder)
  assert [tokenizer.encode(text).tolist() for text in TEXTS] == EXPECTED["folders"]["gpt2"]["single"]
  assert tokenizer.bos_id == tokenizer.eos_id == 0 and tokenizer.single_template == ((), ())
  assert set(to_huggingface(tokenizer)) > {"tokenizer.json"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_add_bos_token_and_add_eos_token_are_obeyed(tmp_path, name, bos, eos):
  config = json.loads((FOLDERS / name / "tokenizer_config.json").read_text())
  config |= {"add_bos_token": bos, "add_eos_token": eos}
  tokenizer = tokenizer_from_folder(copy_folder(name, tmp_path / name, tokenizer_config__json=config))
  assert tokenizer.single_template == ((tokenizer.bos_id,) * bos, (tokenizer.eos_id,) * eos)
  assert tokenizer.prompt("a").tolist() == [tokenizer.bos_id] * bos + tokenizer.encode("a").tolist()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({}, "tHÉ é"),
    ({"do_lower_case": False}, "the É"),
    ({"strip_accents": False}, "the é"),
    ({"do_lower_case": False, "strip_accents": True}, "the E"),
  ],
)
def test_bert_normalizer_obeys_the_configuration(tmp_path, options, words):
  vocabulary = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "e", "é", "E", "É"]) + "\n"
  (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
  tokenizer = tokenizer_from_folder(tmp_path)
  found = [tokenizer.pieces[i].decode() for i in tokenizer.encode(words)]
  assert found == {"tHÉ é": ["the", "e"]}.get(words, words.split())


def test_tokenizer_json_is_preferred_to_older_files(tmp_path):
  folder = copy_folder("llama3", tmp_path / "both")
  shutil.copy(FOLDERS / "gpt2" / "vocab.json", folder)
  shutil.copy(FOLDERS / "gpt2" / "merges.txt", folder)
  tokenizer = tokenizer_from_folder(folder)
  assert tokenizer.single_template == ((400,), ()) and "vocab.json" not in tokenizer.to_files()


def test_tokens_named_only_by_the_configuration_are_added(tmp_path):
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[P]", "additional_special_tokens": ["<|turn|>"]}
  tokenizer = tokenizer_from_folder(copy_folder("llama3", tmp_path / "more", tokenizer_config__json=config))
  assert (tokenizer.pad_id, tokenizer.names[406], tokenizer.vocab_size) == (405, "<|turn|>", 407)
  assert tokenizer.special[405] and tokenizer.special[406] and not tokenizer.special[tokenizer.encode("<|turn|>")].any()


def test_added_tokens_json_keeps_ids_and_roles(tmp_path):
  added = {"a word": 406, "<|x|>": 405}  # in the order of ids, not of names or positions
  roles = {"pad_token": {"content": "<|x|>", "lstrip": True, "rstrip": False}, "bos_token": "<|eot_id|>"}
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|end_of_text|>",
    "eos_token": "<|end_of_text|>",
  }
  files = {"tokenizer_config__json": config, "added_tokens__json": added, "special_tokens_map__json": roles}
  tokenizer = tokenizer_from_folder(copy_folder("llama3", tmp_path / "old", **files))
  assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (405, 404, 401)
  assert tokenizer.special[405] and tokenizer.pieces[406] == b"a word" and not tokenizer.special[406]
  settings, _ = read_tokenizer_folder(tokenizer.files)
  assert [(t["id"], t["content"], t["special"]) for t in settings["added_tokens"][-2:]] == [
    (405, "<|x|>", True),
    (406, "a word", False),
  ]


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({}, r"has no tokenizer\. .* one of tokenizer\.json, vocab\.json \+ merges\.txt, .*vocab\.txt, spiece\.model"),
    ({"merges.txt": "a b"}, r"has merges\.txt but no vocab\.json"),
    ({"vocab.json": "{}"}, r"has vocab\.json but no merges\.txt"),
    ({"tokenizer.json": "{"}, r"tokenizer\.json: not JSON: "),
    ({"tokenizer.json": "[]"}, r"tokenizer\.json: must hold an object, got a list"),
    ({"tokenizer.json": "{}"}, "no model, decoder, added_tokens"),
    (
      {"tokenizer.json": '{"model": {"vocab": {}}, "decoder": null, "added_tokens": []}'},
      r"tokenizer\.json: not valid: ",
    ),
    ({"vocab.txt": "the\nfox\n"}, "a vocabulary of unknown kind needs a tokenizer.json .*Transformers"),
    ({"vocab.json": '{"a</w>": 0}', "merges.txt": ""}, "a vocabulary of unknown kind"),
    (
      {"vocab.json": '{"a": 0}', "merges.txt": "a b\n"},
      r"merges\.txt: a merge must join two tokens .*got 'a b'",
    ),
    ({"tokenizer.model": "no"}, r"tokenizer\.model: not a SentencePiece model"),
    ({"spiece.model": "", "tokenizer_config.json": "{}"}, r"spiece\.model: not a SentencePiece model"),
    ({"vocab.txt": "[CLS]", "tokenizer_config.json": "{"}, r"tokenizer_config\.json: not JSON"),
    (
      {"vocab.txt": "[CLS]", "tokenizer_config.json": '{"tokenizer_class": "MPNetTokenizer"}'},
      "tokenizer_class='MPNetTokenizer' needs a tokenizer.json",
    ),
  ],
)
def test_damaged_or_unknown_folder_is_one_line_error(tmp_path, files, message):
  for name, content in files.items():
    (tmp_path / name).write_text(content)
  with pytest.raises(ConfigError, match=message) as caught:
    tokenizer_from_folder(tmp_path)
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


# Export

LINES = ["def f(x):\n    return x  # the same\n", "the quick  brown   fox jumps\t\tover naïve cafés, 日本語\r\n"]
SOURCE = Source(2, lambda i: {"text": LINES[i] * 20}, "lines")
OWN_KINDS = {
  "bpe": {"name": "sentencepiece", "vocab_size": 340},
  "unigram": {"name": "sentencepiece", "vocab_size": 330, "model_type": "unigram"},
  "bytes": {"name": "bytes"},
  "bare bytes": {"name": "bytes", "special": False},
  "characters": {"name": "characters", "special": True, "unknown": True},
  "few characters": {"name": "characters", "unknown": True},
}


def hard_texts(count=400):
  rng = random.Random(0)
  hard = [
    *" \t\n\r\0ae-<>",
    "  ",
    "\u2581",
    "\u2585",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "0x4",
    "1>",
    "日",
    "e\u0301",
    "🙂",
  ]
  draw = [
    lambda: rng.choice(hard) * rng.randrange(1, 9),
    lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    lambda: rng.choice(LINES)[rng.randrange(9) :],
  ]
  return [*TEXTS, *LINES, *hard, *("".join(rng.choice(draw)() for _ in range(rng.randrange(9))) for _ in range(count))]


def open_like_transformers(folder):
  """Return (encode, decode) of an exported folder, as Transformers opens it: with the library and two flags."""
  import tokenizers as library

  model = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
  config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
  assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and not config["clean_up_tokenization_spaces"]
  model.encode_special_tokens = config["split_special_tokens"]
  return lambda text: model.encode(text).ids, model.decode


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_exported_tokenizer_gives_the_same_ids_and_texts(tmp_path, kind):
  tokenizer = make_tokenizer(OWN_KINDS[kind], SOURCE, tmp_path)
  encode, decode = open_like_transformers(export(tokenizer, tmp_path / "out"))
  again = tokenizer_from_folder(tmp_path / "out")
  for text in hard_texts():
    ids = tokenizer.prompt(text).tolist()
    assert encode(text) == ids == again.prompt(text).tolist()
    assert decode(ids) == tokenizer.decode(ids) == again.decode(ids)
  assert (again.bos_id, again.eos_id, again.unk_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
  assert again.names == tokenizer.names and again.pieces == tokenizer.pieces


@pytest.mark.parametrize("kind", ["bpe", "bytes", "unigram", "characters"])
def test_exported_tokenizer_reads_names_of_mask_and_sentinels(tmp_path, kind):
  tokenizer = make_tokenizer({**OWN_KINDS[kind], "mask": True, "sentinels": 3}, SOURCE, tmp_path)
  encode, decode = open_like_transformers(export(tokenizer, tmp_path / "out"))
  ids = [
    *tokenizer.prompt("the "),
    tokenizer.mask_id,
    tokenizer.sentinels[0],
    *tokenizer.encode("fox"),
    tokenizer.sentinels[2],
  ]
  assert encode("the <mask><extra_id_0>fox<extra_id_2>") == ids and decode(ids) == "the fox"
  again = tokenizer_from_folder(tmp_path / "out")
  assert (again.mask_id, again.sentinels, again.names) == (tokenizer.mask_id, tokenizer.sentinels, tokenizer.names)


def test_folder_is_exported_unchanged(tokenizer):
  assert to_huggingface(tokenizer) == tokenizer.to_files()


def test_tokens_added_to_a_folder_are_exported_with_it(tokenizer, expected, tmp_path):
  sentinels = 0 if tokenizer.sentinels else 3
  more = extend_vocabulary(tokenizer, mask=True, sentinels=sentinels)
  again = tokenizer_from_folder(export(more, tmp_path / "out"))
  assert (again.mask_id, again.sentinels, again.vocab_size) == (more.mask_id, more.sentinels, more.vocab_size)
  assert again.names == more.names and again.single_template == more.single_template
  assert [again.pad([text])[0][0].tolist() for text in TEXTS] == expected["single"]


def test_export_adds_new_tokens_to_added_tokens_decoder(tmp_path):
  listed = {"405": {"content": "[P]", "special": True}, "406": {"content": "word", "special": False}}
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[P]", "added_tokens_decoder": listed}
  tokenizer = tokenizer_from_folder(copy_folder("llama3", tmp_path / "llama3", tokenizer_config__json=config))
  assert (tokenizer.pad_id, tokenizer.pieces[406], tokenizer.encode("word").tolist()) == (405, b"word", [406])
  files = to_huggingface(extend_vocabulary(tokenizer, mask=True, sentinels=2))
  config = json.loads(files["tokenizer_config.json"])
  found = {i: token["content"] for i, token in config["added_tokens_decoder"].items()}
  assert found == {"405": "[P]", "406": "word", "407": "<mask>", "408": "<extra_id_1>", "409": "<extra_id_0>"}
  assert config["mask_token"] == "<mask>" and config["additional_special_tokens"] == ["<extra_id_0>", "<extra_id_1>"]


def test_export_that_would_change_ids_is_refused(tmp_path):
  words = (FOLDERS / "llama" / "tokenizer.model").read_bytes()
  with pytest.raises(ConfigError, match="this SentencePiece model changes the text"):
    to_huggingface(sentencepiece_from_files({"tokenizer.model": words}))
  lossy = make_tokenizer({**OWN_KINDS["bpe"], "vocab_size": 90, "byte_fallback": False}, SOURCE, tmp_path)
  with pytest.raises(ConfigError, match="no bytes for unknown characters"):
    to_huggingface(lossy)
  proto = parse_sentencepiece_model(make_tokenizer(OWN_KINDS["unigram"], SOURCE, tmp_path).files["tokenizer.model"])
  proto.pieces[-1].score += 0.001
  with pytest.raises(ConfigError, match="scores whose sums depend on the order"):
    to_huggingface(sentencepiece_from_files({"tokenizer.model": proto.SerializeToString()}))
  own = Tokenizer("my.module:loader", (b"a",), lambda text: [0] * len(text), {})
  with pytest.raises(ConfigError, match=r"kind 'my\.module:loader' cannot be written"):
    to_huggingface(own)


def test_vocabulary_with_holes_is_exported_only_unchanged(tmp_path):
  vocabulary = json.loads((FOLDERS / "gpt2" / "vocab.json").read_text(encoding="utf-8"))
  vocabulary = {token: i + 5 * (i == 419) for token, i in vocabulary.items()}
  config = {"tokenizer_class": "GPT2Tokenizer"}
  tokenizer = tokenizer_from_folder(
    copy_folder("gpt2", tmp_path / "holes", vocab__json=vocabulary, tokenizer_config__json=config)
  )
  assert tokenizer.vocab_size == 425 and to_huggingface(tokenizer) == tokenizer.to_files()
  with pytest.raises(ConfigError, match="holes in its ids"):
    to_huggingface(extend_vocabulary(tokenizer, mask=True))


def test_exported_unigram_reads_names_of_bytes_as_text(tmp_path):
  """All characters of the names have pieces, so that the names could be found whole."""
  text = "<0x0123456789ABCDEF> </s> <unk>\n"
  tokenizer = make_tokenizer(
    {**OWN_KINDS["unigram"], "vocab_size": 300}, Source(1, lambda i: {"text": text * 9}, "names"), tmp_path
  )
  encode, _ = open_like_transformers(export(tokenizer, tmp_path / "out"))
  for text in hard_texts(100):
    assert encode(text) == tokenizer.prompt(text).tolist()


def test_unigram_segmentation_is_the_same_after_any_text(tmp_path):
  """Scores of a unigram vocabulary are rounded, so that rounding errors do not choose."""
  tokenizer = make_tokenizer(OWN_KINDS["unigram"], SOURCE, tmp_path)
  alone = [tokenizer.encode(" " * n + "\n").tolist() for n in range(1, 24)]
  for before in ("x\n", "the fox\n", "def f(x):\n" * 7):
    for n, ids in enumerate(alone, start=1):
      assert tokenizer.encode(before + " " * n + "\n").tolist()[-len(ids) :] == ids
