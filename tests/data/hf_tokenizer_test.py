"""Tokenizers of Hugging Face folders, and ours as such; what is expected, and how it was made: testdata/tokenizers."""

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
from llmjax.data.tokenizers import base as tokenizers
from llmjax.data.tokenizers import hf_formats
from llmjax.data.tokenizers.hf_export import to_huggingface
from llmjax.data.tokenizers.huggingface import from_folder
from llmjax.data.tokenizers.sentencepiece import model_proto, sentencepiece_from_files

FOLDERS = Path(__file__).parents[1] / "testdata" / "tokenizers"
EXPECTED = json.loads((FOLDERS / "expected.json").read_text(encoding="utf-8"))
TEXTS = EXPECTED["texts"]
AROUND = {"gpt2": ([], []), "roberta": ([0], [2]), "llama3": ([400], []), "bert": ([2], [3]), "bert_cased": ([2], [3])}
AROUND |= {"t5": ([], [1]), "llama": ([1], []), "gemma": ([2], [])}


@pytest.fixture(params=AROUND, scope="module")
def name(request):
  return request.param


@pytest.fixture(scope="module")
def expected(name):
  return EXPECTED["folders"][name]


@pytest.fixture(scope="module")
def made(name):
  return from_folder(FOLDERS / name)


def copy(name, to, **files):
  """The folder with some files written anew, or left out (None)."""
  shutil.copytree(FOLDERS / name, to)
  for file, content in files.items():
    path = to / file.replace("__", ".")
    path.unlink(missing_ok=True)
    if content is not None:
      path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
  return to


def written(tokenizer, folder):
  for name, content in to_huggingface(tokenizer).items():
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
  return folder


# Reading


def test_texts_are_what_transformers_makes_of_them(made, expected):
  ids, mask = made.pad(TEXTS)
  assert ids.dtype == mask.dtype == np.int32
  assert [row[real == 1].tolist() for row, real in zip(ids, mask)] == expected["single"]
  assert (ids[mask == 0] == expected["roles"]["pad"]).all()
  left, mask = made.pad(TEXTS, side="left")
  assert [row[real == 1].tolist() for row, real in zip(left, mask)] == expected["single"]
  assert [made.decode(ids) for ids in expected["single"]] == expected["decoded"]


def test_a_text_is_framed_as_the_folder_says_a_prompt_begins_so_and_a_document_ends(name, made, expected):
  before, behind = AROUND[name]
  bos, eos = ([] if token is None else [token] for token in (made.bos_id, made.eos_id))
  for text, single in zip(TEXTS, expected["single"]):
    ids = made.encode(text).tolist()
    assert before + ids + behind == single
    assert made.prompt(text).tolist() == before + ids
    assert made.document(text).tolist() == bos + ids + eos


def test_special_tokens_have_their_roles(made, expected):
  roles = expected["roles"]
  assert made.vocab_size == expected["size"] and made.pad_id == roles["pad"]
  assert made.bos_id in (roles["bos"], roles["cls"]) and made.eos_id in (roles["eos"], roles["sep"])
  assert (made.unk_id, made.mask_id) == (roles["unk"], roles["mask"])
  assert set(made.names) == set(np.flatnonzero(made.special)) and made.decode(list(made.names)) == ""
  assert (made.byte_lengths()[made.special] == 0).all()


def test_no_text_gives_a_special_token(made):
  for name in made.names.values():
    ids = made.encode(f"a{name} {name}b")
    assert not made.special[ids[ids != made.unk_id]].any(), name
    shown = made.show([*made.encode("a"), *[i for i in made.names if made.names[i] == name]])
    assert shown.endswith(name)


def test_streams_give_what_decoding_gives(made, expected):
  rng = random.Random(0)
  strange = [[rng.randrange(made.vocab_size + 3) for _ in range(12)] for _ in range(60)]
  for ids in [*expected["single"], *strange]:
    stream = made.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == made.decode(ids)


def test_byte_lengths_sum_to_the_text(name, made):
  if name in ("gpt2", "llama3", "gemma"):
    for text in TEXTS:
      if name != "gemma" or "\u2581" not in text:  # which is how SentencePiece writes a space
        assert made.byte_lengths()[made.encode(text)].sum() == len(text.encode())
  else:
    assert made.byte_lengths()[made.encode("the dog")].sum() in (len("thedog"), len(" the dog"))


def test_offsets_say_which_characters_a_token_stands_for(name, made):
  """As the vocabulary writes them: some without accents and capitals, and of some a single "unknown" stands for all."""

  def bare(text):
    text = unicodedata.normalize("NFKC", text).lower() if name != "bert_cased" else text
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)).replace("\u2581", " ")

  checked = 0
  for text in TEXTS:
    ids, offsets = made.encode_with_offsets(text)
    assert ids.tolist() == made.encode(text).tolist() and offsets.shape == (len(ids), 2)
    assert (np.diff(offsets, axis=0) >= 0).all() and (offsets <= len(text)).all()
    for token, (start, stop) in zip(ids, offsets.tolist()):
      piece = made.pieces[token]
      with contextlib.suppress(UnicodeDecodeError):  # a part of a character
        if piece.strip():
          assert bare(piece.decode()).strip() in bare(text[start:stop])
          assert len(text[start:stop].strip()) <= len(piece.decode().strip())
          checked += 1
  assert checked > 100


def test_a_hash_is_text_where_it_does_not_continue_a_word(made, name):
  ids = made.encode("##")
  assert b"".join(made.pieces[i] for i in ids).strip() in ({b"##"} if not name.startswith("bert") else {b"##", b""})
  assert bool(made.continuing) == name.startswith("bert")


def test_its_files_are_the_folders_and_rebuild_it(name, made, expected):
  files = made.to_files()
  assert files == {p.name: p.read_bytes() for p in (FOLDERS / name).iterdir()}
  again = tokenizers.from_files(json.loads(json.dumps(made.spec())), files)
  assert [again.pad([text])[0][0].tolist() for text in TEXTS] == expected["single"]
  assert again.special.tolist() == made.special.tolist() and again.names == made.names and again.pieces == made.pieces
  assert again.chat_templates == made.chat_templates


def test_it_is_a_tokenizer_of_the_config_too(made, name):
  same = tokenizers.make_tokenizer({"name": "hf", "path": str(FOLDERS / name)})
  assert same.to_files() == made.to_files() and same.around == made.around


@pytest.mark.parametrize("name", ["roberta", "bert", "t5", "llama", "gemma"])
def test_a_folder_that_names_no_class_is_known_by_its_vocabulary(tmp_path, name):
  config = json.loads((FOLDERS / name / "tokenizer_config.json").read_text())
  del config["tokenizer_class"]
  bare = from_folder(copy(name, tmp_path / name, tokenizer_config__json=config))
  assert [bare.pad([text])[0][0].tolist() for text in TEXTS] == EXPECTED["folders"][name]["single"]
  if name != "t5":  # whose sentinels are as many as its configuration says
    alone = from_folder(copy(name, tmp_path / "alone", tokenizer_config__json=None, special_tokens_map__json=None))
    assert alone.around == bare.around and alone.eos_id == bare.eos_id


def test_a_mask_takes_the_space_before_it_where_the_folder_says_so():
  made = from_folder(FOLDERS / "roberta")
  assert made.to_special_ids("the <mask>") == [*made.encode("the").tolist(), made.mask_id]


def test_sentinels_of_t5_are_its_last_tokens(tmp_path):
  made = from_folder(FOLDERS / "t5")
  assert [made.names[i] for i in made.sentinels] == [f"<extra_id_{k}>" for k in range(5)]
  assert made.sentinels == tuple(made.vocab_size - 1 - k for k in range(5))
  assert made.parse("the<extra_id_0>dog").tolist().count(made.sentinels[0]) == 1
  bare = from_folder(copy("t5", tmp_path / "t5", tokenizer_config__json=None))
  assert len(bare.sentinels) == 100 and bare.around == ((), (1,))


def test_gpt2s_own_names_of_its_files(tmp_path):
  folder = tmp_path / "gpt2"
  folder.mkdir()
  shutil.copy(FOLDERS / "gpt2" / "vocab.json", folder / "encoder.json")
  shutil.copy(FOLDERS / "gpt2" / "merges.txt", folder / "vocab.bpe")
  made = from_folder(folder)
  assert [made.encode(text).tolist() for text in TEXTS] == EXPECTED["folders"]["gpt2"]["single"]
  assert made.bos_id == made.eos_id == 0 and made.around == ((), ()) and set(to_huggingface(made)) > {"tokenizer.json"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_are_added_where_the_folder_says_so(tmp_path, name, bos, eos):
  config = json.loads((FOLDERS / name / "tokenizer_config.json").read_text())
  config |= {"add_bos_token": bos, "add_eos_token": eos}
  made = from_folder(copy(name, tmp_path / name, tokenizer_config__json=config))
  assert made.around == ((made.bos_id,) * bos, (made.eos_id,) * eos)
  assert made.prompt("a").tolist() == [made.bos_id] * bos + made.encode("a").tolist()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({}, "tHÉ é"),
    ({"do_lower_case": False}, "the É"),
    ({"strip_accents": False}, "the é"),
    ({"do_lower_case": False, "strip_accents": True}, "the E"),
  ],
)
def test_bert_lower_cases_and_strips_accents_as_told(tmp_path, options, words):
  vocabulary = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "e", "é", "E", "É"]) + "\n"
  (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
  made = from_folder(tmp_path)
  found = [made.pieces[i].decode() for i in made.encode(words)]
  assert found == {"tHÉ é": ["the", "e"]}.get(words, words.split())


def test_a_tokenizer_json_stands_before_old_files(tmp_path):
  folder = copy("llama3", tmp_path / "both")
  shutil.copy(FOLDERS / "gpt2" / "vocab.json", folder)
  shutil.copy(FOLDERS / "gpt2" / "merges.txt", folder)
  made = from_folder(folder)
  assert made.around == ((400,), ()) and "vocab.json" not in made.to_files()


def test_tokens_that_only_the_configuration_names_follow_the_vocabulary(tmp_path):
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[P]", "additional_special_tokens": ["<|turn|>"]}
  made = from_folder(copy("llama3", tmp_path / "more", tokenizer_config__json=config))
  assert (made.pad_id, made.names[406], made.vocab_size) == (405, "<|turn|>", 407)
  assert made.special[405] and made.special[406] and not made.special[made.encode("<|turn|>")].any()


def test_added_tokens_of_old_folders_keep_their_order_and_their_roles(tmp_path):
  added = {"a word": 406, "<|x|>": 405}  # by their ids, not by their names or places
  roles = {"pad_token": {"content": "<|x|>", "lstrip": True, "rstrip": False}, "bos_token": "<|eot_id|>"}
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|end_of_text|>",
    "eos_token": "<|end_of_text|>",
  }
  files = {"tokenizer_config__json": config, "added_tokens__json": added, "special_tokens_map__json": roles}
  made = from_folder(copy("llama3", tmp_path / "old", **files))
  assert (made.pad_id, made.bos_id, made.eos_id) == (405, 404, 401)
  assert made.special[405] and made.pieces[406] == b"a word" and not made.special[406]
  settings, _ = hf_formats.read_tokenizer_folder(made.files)
  assert [(t["id"], t["content"], t["special"]) for t in settings["added_tokens"][-2:]] == [
    (405, "<|x|>", True),
    (406, "a word", False),
  ]


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({}, r"holds no tokenizer: none of tokenizer\.json, vocab\.json \+ merges\.txt, .*vocab\.txt, spiece\.model"),
    ({"merges.txt": "a b"}, r"holds merges\.txt but no vocab\.json"),
    ({"vocab.json": "{}"}, r"holds vocab\.json but no merges\.txt"),
    ({"tokenizer.json": "{"}, r"the file is no tokenizer\.json: "),
    ({"tokenizer.json": "[]"}, r"the file is no tokenizer\.json: it holds a list"),
    ({"tokenizer.json": "{}"}, "no model, decoder, added_tokens"),
    ({"tokenizer.json": '{"model": {"vocab": {}}, "decoder": null, "added_tokens": []}'}, r"no tokenizer\.json: "),
    ({"vocab.txt": "the\nfox\n"}, "a vocabulary of unknown kind can only be read from a tokenizer.json .*Transformers"),
    ({"vocab.json": '{"a</w>": 0}', "merges.txt": ""}, "a vocabulary of unknown kind"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "the merge 'a b' is none of two tokens of the vocabulary"),
    ({"tokenizer.model": "no"}, r"the tokenizer\.model is no SentencePiece model"),
    ({"spiece.model": "", "tokenizer_config.json": "{}"}, r"the spiece\.model is no SentencePiece model"),
    ({"vocab.txt": "[CLS]", "tokenizer_config.json": "{"}, r"the file is no tokenizer_config\.json"),
    (
      {"vocab.txt": "[CLS]", "tokenizer_config.json": '{"tokenizer_class": "MPNetTokenizer"}'},
      "tokenizer_class='MPNetTokenizer' can only be read from a tokenizer.json",
    ),
  ],
)
def test_what_is_no_tokenizer_is_told_in_one_line(tmp_path, files, message):
  for name, content in files.items():
    (tmp_path / name).write_text(content)
  with pytest.raises(ConfigError, match=message) as caught:
    from_folder(tmp_path)
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


# Writing

LINES = ["def f(x):\n    return x  # the same\n", "the quick  brown   fox jumps\t\tover naïve cafés, 日本語\r\n"]
SOURCE = Source(2, lambda i: {"text": LINES[i] * 20}, "lines")
OURS = {
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


def opened(folder):
  """(ids with what stands around them, decoding) as Transformers opens such a folder: by the library and two flags."""
  import tokenizers as library

  model = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
  config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
  assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and not config["clean_up_tokenization_spaces"]
  model.encode_special_tokens = config["split_special_tokens"]
  return lambda text: model.encode(text).ids, model.decode


@pytest.mark.parametrize("kind", OURS)
def test_ours_give_the_same_ids_and_texts_as_hugging_face_folders(tmp_path, kind):
  made = tokenizers.make_tokenizer(OURS[kind], SOURCE, tmp_path)
  encode, decode = opened(written(made, tmp_path / "out"))
  again = from_folder(tmp_path / "out")
  for text in hard_texts():
    ids = made.prompt(text).tolist()
    assert encode(text) == ids == again.prompt(text).tolist()
    assert decode(ids) == made.decode(ids) == again.decode(ids)
  assert (again.bos_id, again.eos_id, again.unk_id) == (made.bos_id, made.eos_id, made.unk_id)
  assert again.names == made.names and again.pieces == made.pieces


@pytest.mark.parametrize("kind", ["bpe", "bytes", "unigram", "characters"])
def test_added_tokens_can_be_written_in_a_text_for_transformers(tmp_path, kind):
  made = tokenizers.make_tokenizer({**OURS[kind], "mask": True, "sentinels": 3}, SOURCE, tmp_path)
  encode, decode = opened(written(made, tmp_path / "out"))
  ids = [*made.prompt("the "), made.mask_id, made.sentinels[0], *made.encode("fox"), made.sentinels[2]]
  assert encode("the <mask><extra_id_0>fox<extra_id_2>") == ids and decode(ids) == "the fox"
  again = from_folder(tmp_path / "out")
  assert (again.mask_id, again.sentinels, again.names) == (made.mask_id, made.sentinels, made.names)


def test_a_folder_is_written_as_it_was(made):
  assert to_huggingface(made) == made.to_files()


def test_tokens_added_to_a_folder_are_written_into_it(made, expected, tmp_path):
  sentinels = 0 if made.sentinels else 3
  more = tokenizers.extend_vocabulary(made, mask=True, sentinels=sentinels)
  again = from_folder(written(more, tmp_path / "out"))
  assert (again.mask_id, again.sentinels, again.vocab_size) == (more.mask_id, more.sentinels, more.vocab_size)
  assert again.names == more.names and again.around == more.around
  assert [again.pad([text])[0][0].tolist() for text in TEXTS] == expected["single"]


def test_a_configuration_that_lists_added_tokens_lists_the_new_ones_too(tmp_path):
  listed = {"405": {"content": "[P]", "special": True}, "406": {"content": "word", "special": False}}
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[P]", "added_tokens_decoder": listed}
  made = from_folder(copy("llama3", tmp_path / "llama3", tokenizer_config__json=config))
  assert (made.pad_id, made.pieces[406], made.encode("word").tolist()) == (405, b"word", [406])
  files = to_huggingface(tokenizers.extend_vocabulary(made, mask=True, sentinels=2))
  config = json.loads(files["tokenizer_config.json"])
  found = {i: token["content"] for i, token in config["added_tokens_decoder"].items()}
  assert found == {"405": "[P]", "406": "word", "407": "<mask>", "408": "<extra_id_1>", "409": "<extra_id_0>"}
  assert config["mask_token"] == "<mask>" and config["additional_special_tokens"] == ["<extra_id_0>", "<extra_id_1>"]


def test_what_cannot_be_written_is_refused(tmp_path):
  words = (FOLDERS / "llama" / "tokenizer.model").read_bytes()
  with pytest.raises(ConfigError, match="this SentencePiece model changes the text"):
    to_huggingface(sentencepiece_from_files({"tokenizer.model": words}))
  lossy = tokenizers.make_tokenizer({**OURS["bpe"], "vocab_size": 90, "byte_fallback": False}, SOURCE, tmp_path)
  with pytest.raises(ConfigError, match="no bytes for unknown characters"):
    to_huggingface(lossy)
  proto = model_proto(tokenizers.make_tokenizer(OURS["unigram"], SOURCE, tmp_path).files["tokenizer.model"])
  proto.pieces[-1].score += 0.001
  with pytest.raises(ConfigError, match="scores whose sums depend on the order"):
    to_huggingface(sentencepiece_from_files({"tokenizer.model": proto.SerializeToString()}))
  own = tokenizers.Tokenizer("my.module:loader", (b"a",), lambda text: [0] * len(text), {})
  with pytest.raises(ConfigError, match=r"kind 'my\.module:loader' cannot be written"):
    to_huggingface(own)


def test_a_vocabulary_with_holes_can_be_written_only_as_it_is(tmp_path):
  vocabulary = json.loads((FOLDERS / "gpt2" / "vocab.json").read_text(encoding="utf-8"))
  vocabulary = {token: i + 5 * (i == 419) for token, i in vocabulary.items()}
  config = {"tokenizer_class": "GPT2Tokenizer"}
  made = from_folder(copy("gpt2", tmp_path / "holes", vocab__json=vocabulary, tokenizer_config__json=config))
  assert made.vocab_size == 425 and to_huggingface(made) == made.to_files()
  with pytest.raises(ConfigError, match="holes in its ids"):
    to_huggingface(tokenizers.extend_vocabulary(made, mask=True))


def test_names_of_bytes_and_special_tokens_are_text_to_a_written_unigram_model(tmp_path):
  """Also where all their characters have pieces, so that they could be found whole."""
  text = "<0x0123456789ABCDEF> </s> <unk>\n"
  made = tokenizers.make_tokenizer(
    {**OURS["unigram"], "vocab_size": 300}, Source(1, lambda i: {"text": text * 9}, "names"), tmp_path
  )
  encode, _ = opened(written(made, tmp_path / "out"))
  for text in hard_texts(100):
    assert encode(text) == made.prompt(text).tolist()


def test_equal_segmentations_are_decided_alike_behind_any_text(tmp_path):
  """Scores of a unigram vocabulary are rounded, so that rounding noise does not decide."""
  made = tokenizers.make_tokenizer(OURS["unigram"], SOURCE, tmp_path)
  alone = [made.encode(" " * n + "\n").tolist() for n in range(1, 24)]
  for before in ("x\n", "the fox\n", "def f(x):\n" * 7):
    for n, ids in enumerate(alone, start=1):
      assert made.encode(before + " " * n + "\n").tolist()[-len(ids) :] == ids
