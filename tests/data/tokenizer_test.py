"""Tokenizers of all kinds: encoding, decoding, special tokens, training, files."""

import itertools
import json
import random

import numpy as np
import pytest

from llmjax.config import ConfigError, build
from llmjax.data.sources.base import Source
from llmjax.data.sources.registry import SOURCES
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.registry import make_tokenizer, tokenizer_from_files
from llmjax.data.tokenizers.sentencepiece import train_sentencepiece
from llmjax.data.tokenizers.training_text import sample_training_texts

TEXTS = [
  "def f(x):\n    if x:\n        return None\n\treturn x\r\n" * 20,
  "The quick brown fox jumps over the lazy dog; naïve café 日本語.\n" * 20,
]
SOURCE = Source(len(TEXTS), lambda i: {"text": TEXTS[i]}, "texts")
KINDS = {
  "bpe": {"name": "sentencepiece", "vocab_size": 400, "path": None},
  "unigram": {"name": "sentencepiece", "vocab_size": 330, "model_type": "unigram"},
  "bytes": {"name": "bytes"},
  "bare bytes": {"name": "bytes", "special": False},
  "byte-level": {"name": "hf", "path": "HF"},
  "bpe with extra tokens": {"name": "sentencepiece", "vocab_size": 411, "mask": True, "sentinels": 10},
  "bytes with extra tokens": {"name": "bytes", "mask": True, "sentinels": 3},
  "byte-level with extra tokens": {"name": "hf", "path": "HF", "sentinels": 5},
}


def byte_level(folder):
  """Write a tokenizer.json and a configuration like those of GPT-2, and return the folder."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

  model = Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  model.post_processor = processors.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
  )
  model.train_from_iterator(TEXTS, trainer)
  folder.mkdir()
  model.save(str(folder / "tokenizer.json"))
  config = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return str(folder)


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request, tmp_path_factory):
  spec, folder = dict(KINDS[request.param]), tmp_path_factory.mktemp("tokenizers")
  if spec.get("path") == "HF":
    spec["path"] = byte_level(folder / "hf")
  return make_tokenizer(spec, SOURCE, folder)


def difficult_texts(count=300):
  """Return texts of all of Unicode, with many characters that are difficult for tokenizers."""
  rng = random.Random(0)
  difficult = [
    *" \t\n\r\0\u2581\u2585\ufffd\ufeff\u2028",
    "  ",
    "\r\n",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<mask>",
    "<extra_id_0>",
    "🙂",
    "e\u0301",
  ]
  difficult += [" ⁇ ", "<|endoftext|>", "\U0010ffff", "日本"]
  draw = [
    lambda: rng.choice(difficult),
    lambda: chr(rng.randrange(32, 127)),
    lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
  ]
  return ["", *difficult, *("".join(rng.choice(draw)() for _ in range(rng.randrange(30))) for _ in range(count))]


def stream_all(tokenizer, ids):
  stream = tokenizer.stream()
  return [*(stream.push(int(i)) for i in ids), stream.finish()]


def test_decode_inverts_encode_and_byte_lengths_are_exact(tokenizer):
  lengths = tokenizer.byte_lengths()
  assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
  for text in difficult_texts():
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert lengths[ids].sum() == len(text.encode())


def test_stream_equals_decode_and_returns_whole_characters(tokenizer):
  for text in difficult_texts(100):
    pieces = stream_all(tokenizer, tokenizer.document(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
  rng = np.random.default_rng(0)
  for _ in range(100):  # as from an untrained model: broken UTF-8, special tokens, ids beyond the vocabulary
    ids = rng.integers(0, tokenizer.vocab_size + 9, 20)
    assert "".join(stream_all(tokenizer, ids)) == tokenizer.decode(ids)


def test_offsets_are_the_characters_of_a_token(tokenizer):
  """Tokens with parts of characters have the fewest whole characters that contain them."""
  for text in difficult_texts():
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids.dtype == offsets.dtype == np.int32 and offsets.shape == (len(ids), 2)
    assert ids.tolist() == tokenizer.encode(text).tolist()
    owners = [i for i, character in enumerate(text) for _ in character.encode()]  # character of each byte of the text
    stops = np.cumsum([len(tokenizer.pieces[i]) for i in ids])
    for token, (start, stop), end in zip(ids, offsets.tolist(), stops):
      own = owners[end - len(tokenizer.pieces[token]) : end]
      assert (start, stop) == (own[0], own[-1] + 1)


def test_document_has_bos_and_eos_and_prompt_bos_only(tokenizer):
  ids = tokenizer.encode("a b").tolist()
  bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
  assert tokenizer.document("a b").tolist() == bos + ids + eos
  assert tokenizer.prompt("a b").tolist() == tokenizer.single[0].tolist() + ids
  assert tokenizer.single[0].tolist() in (bos, []) and tokenizer.single[1].tolist() == []
  assert tokenizer.document("").dtype == np.int32
  assert all(tokenizer.byte_lengths()[bos + eos] == 0)


def test_pad_adds_padding_on_either_side(tokenizer):
  texts = ["a", "a longer text", ""]
  for side in ("left", "right"):
    ids, mask = tokenizer.pad(texts, side=side)
    assert ids.shape == mask.shape and (ids[mask == 0] == tokenizer.pad_id).all()
    for row, real, text in zip(ids, mask, texts):
      assert row[real == 1].tolist() == tokenizer.prompt(text).tolist()
      assert (np.diff(real) >= 0).all() if side == "left" else (np.diff(real) <= 0).all()
  with pytest.raises(ConfigError, match="side: must be 'right' or 'left', got 'both'"):
    tokenizer.pad(texts, side="both")


def test_files_rebuild_the_tokenizer(tokenizer):
  spec = json.loads(json.dumps(tokenizer.spec()))
  again = tokenizer_from_files(spec, tokenizer.to_files())
  for text in difficult_texts(50):
    assert again.document(text).tolist() == tokenizer.document(text).tolist()
  assert again.to_files() == tokenizer.to_files() and again.byte_lengths().tolist() == tokenizer.byte_lengths().tolist()
  assert again.special.tolist() == tokenizer.special.tolist() and again.names == tokenizer.names
  assert (again.mask_id, again.sentinels) == (tokenizer.mask_id, tokenizer.sentinels)


def test_special_tokens_have_no_text_and_are_never_encoded(tokenizer):
  special = tokenizer.special
  assert special.shape == (tokenizer.vocab_size,) and special.dtype == bool
  assert (tokenizer.byte_lengths()[special] == 0).all() and tokenizer.decode(np.flatnonzero(special)) == ""
  roles = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id, *tokenizer.sentinels} - {None}
  assert special[list(roles)].all() and set(tokenizer.names) == set(np.flatnonzero(special))
  for text in difficult_texts(50):
    assert not special[tokenizer.encode(text)].any() and tokenizer.show(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mask", "sentinels"), [(False, 0), (True, 0), (False, 2), (True, 100)])
def test_extra_tokens_have_the_ids_of_t5(tmp_path, kind, mask, sentinels):
  spec = {k: v for k, v in KINDS[kind].items() if k not in ("mask", "sentinels")}
  if spec.get("path") == "HF":
    spec["path"] = byte_level(tmp_path / "hf")
  plain = make_tokenizer(spec, SOURCE, tmp_path)
  if spec["name"] == "sentencepiece":
    spec["vocab_size"] += mask + sentinels  # includes the extra tokens
  tokenizer = make_tokenizer({**spec, "mask": mask, "sentinels": sentinels}, SOURCE, tmp_path)
  size = tokenizer.vocab_size
  assert size == plain.vocab_size + mask + sentinels and tokenizer.pieces[: plain.vocab_size] == plain.pieces
  assert tokenizer.mask_id == (plain.vocab_size if mask else None)
  assert tokenizer.sentinels == tuple(size - 1 - k for k in range(sentinels))
  assert [tokenizer.names[token] for token in tokenizer.sentinels] == [f"<extra_id_{k}>" for k in range(sentinels)]
  if not mask and not sentinels:
    assert tokenizer.to_files() == plain.to_files()  # as in checkpoints from before there were extra tokens


def test_show_writes_special_tokens_by_name(tmp_path):
  tokenizer = make_tokenizer({"name": "bytes", "mask": True, "sentinels": 2}, SOURCE)
  a, b = tokenizer.sentinels
  ids = [*tokenizer.prompt("né"), a, *tokenizer.encode("d"), tokenizer.mask_id, b, tokenizer.eos_id, 999]
  assert tokenizer.show(ids) == "<s>né<extra_id_0>d<mask><extra_id_1></s><999>" and tokenizer.decode(ids) == "néd"
  assert tokenizer.show(tokenizer.encode("é")[:1]) == "\ufffd"
  known = make_tokenizer({"name": "characters", "special": True, "unknown": True}, SOURCE, tmp_path)
  assert known.show(known.document("aЖb")) == "<s>a<unk>b</s>" and known.special.sum() == 3


def test_chat_reads_the_longer_of_two_special_names():
  names = {97: "<x", 98: "<x>"}
  tokenizer = Tokenizer("own", tuple(bytes([i]) for i in range(128)), lambda t: list(t.encode()), {}, names=names)
  assert tokenizer.chat([{"role": "user"}], template="{{ '<x><x' }}").tolist() == [98, 97]


def test_training_is_deterministic_cached_and_quiet(tmp_path, capfd):
  one = make_tokenizer(KINDS["bpe"], SOURCE, tmp_path / "1")
  same = make_tokenizer(KINDS["bpe"], SOURCE, tmp_path / "2")
  assert one.to_files() == same.to_files()
  unread = Source(2, lambda i: pytest.fail("the cache was not used"), "texts")
  assert make_tokenizer(KINDS["bpe"], unread, tmp_path / "1").to_files() == one.to_files()
  assert make_tokenizer({**KINDS["bpe"], "vocab_size": 390}, SOURCE, tmp_path / "1").vocab_size == 390
  assert capfd.readouterr() == ("", "")


def test_indentation_and_line_ends_become_pieces(tmp_path):
  tokenizer = make_tokenizer(KINDS["bpe"], SOURCE, tmp_path)
  assert b"    " in tokenizer.pieces and any(b"\n" in p and len(p) > 1 for p in tokenizer.pieces)
  assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 3


def test_sampled_training_texts_are_evenly_spaced():
  texts = [f"{i:04d}" * 25 for i in range(1000)]
  found = list(sample_training_texts(Source(1000, lambda i: {"text": texts[i]}, "many"), max_bytes=10_000))
  assert len(found) == 100 and found[0] == texts[0] and found[-1] == texts[-1]
  assert list(sample_training_texts(SOURCE)) == TEXTS


def test_training_text_may_have_other_fields_than_text(tmp_path):
  source = Source(2, lambda i: {"tokens": ["né", "日本"], "tags": ["O", "B"], "n": i}, "tokens")
  assert list(sample_training_texts(source)) == ["né 日本\nO B"] * 2
  tokenizer = make_tokenizer({"name": "characters"}, source, tmp_path)
  assert tokenizer.decode(tokenizer.encode("né\n本")) == "né\n本"


def test_characters_tokenizer_has_the_alphabet_of_the_text(tmp_path):
  tokenizer = make_tokenizer({"name": "characters"}, SOURCE, tmp_path)
  alphabet = sorted(set("".join(TEXTS)))
  assert tokenizer.vocab_size == len(alphabet) and (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
  assert tokenizer.encode("é日a").tolist() == [alphabet.index(c) for c in "é日a"]
  assert (
    tokenizer.decode(tokenizer.encode(TEXTS[1]))
    == "".join(stream_all(tokenizer, tokenizer.encode(TEXTS[1])))
    == TEXTS[1]
  )
  assert tokenizer.byte_lengths()[tokenizer.encode(TEXTS[1])].sum() == len(TEXTS[1].encode())
  with pytest.raises(ConfigError, match=r"'Ж' \(U\+0416, 2 times.*unknown=True"):
    tokenizer.encode("aЖaЖ")
  known = make_tokenizer({"name": "characters", "special": True, "unknown": True}, SOURCE, tmp_path)
  assert known.decode(known.document("aЖb")) == "ab" and known.vocab_size == len(alphabet) + 3
  assert tokenizer_from_files(known.spec(), known.to_files()).document("aЖ").tolist() == known.document("aЖ").tolist()
  ids, offsets = known.encode_with_offsets("日Жb")
  assert ids.tolist() == known.encode("日Жb").tolist() and offsets.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_alphabet_of_a_slice_is_that_of_the_whole_text(home):
  (home / "a.txt").write_text("aaaaaaaaab")
  spec = {"name": "text", "files": str(home / "a.txt"), "records": "chunk", "chunk": 4}
  train = build(spec, SOURCES, "data.corpus", split="[:90%]")
  assert make_tokenizer({"name": "characters"}, train).decode([0, 1]) == "ab"


def test_word_piece_decodes_by_the_library_in_windows(tmp_path):
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "un", "##happy", "fox", ",", "##s", "[MASK]"]
  model = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
  model.add_special_tokens([*words[:4], "[MASK]"])
  model.normalizer, model.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
  model.decoder = decoders.WordPiece()
  model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = make_tokenizer({"name": "hf", "path": str(tmp_path / "tokenizer.json")})
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.single_template) == (2, 3, 0, ((2,), (3,)))
  assert tokenizer.document("The unhappy foxs").tolist() == [2, 4, 5, 6, 7, 9, 3]
  assert tokenizer.decode(tokenizer.document("The unhappy foxs")) == "the unhappy foxs"
  for ids in itertools.product(range(len(words)), repeat=4):
    assert "".join(stream_all(tokenizer, ids)) == tokenizer.decode(ids)
  assert tokenizer.byte_lengths().tolist() == [0, 0, 0, 0, 3, 2, 5, 3, 1, 1, 0]
  assert (tokenizer.unk_id, tokenizer.mask_id, tokenizer.sentinels) == (1, 10, ())
  assert np.flatnonzero(tokenizer.special).tolist() == [0, 1, 2, 3, 10]
  assert tokenizer.show([2, 4, 10, 6, 9, 3, 0]) == "[CLS]the[MASK]happys[SEP][PAD]"

  more = make_tokenizer({"name": "hf", "path": str(tmp_path / "tokenizer.json"), "mask": True, "sentinels": 2})
  assert (more.mask_id, more.sentinels, more.vocab_size) == (10, (12, 11), 13)
  assert more.decode([12, 4, 11, 5, 6, 10]) == "".join(stream_all(more, [12, 4, 11, 5, 6, 10])) == "the unhappy"
  again = tokenizer_from_files(more.spec(), more.to_files())
  assert (again.mask_id, again.sentinels, again.vocab_size) == (10, (12, 11), 13)


def test_vocabulary_with_own_sentinels_is_not_extended(tmp_path):
  """The vocabulary is like that of T5."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  pieces = ["<pad>", "</s>", "<unk>", "▁Thank", "▁you", "▁me", "▁", "<", ">", "_", *"extraid0"]
  model = Tokenizer(models.Unigram([(piece, -1.0) for piece in dict.fromkeys(pieces)], unk_id=2))
  model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  model.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{k}>" for k in (2, 1, 0))])
  model.save(str(tmp_path / "tokenizer.json"))
  roles = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
  (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
  spec = {"name": "hf", "path": str(tmp_path)}
  tokenizer = make_tokenizer({**spec, "sentinels": 3})
  size = tokenizer.vocab_size
  assert (
    tokenizer.sentinels == (size - 1, size - 2, size - 3) and tokenizer.to_files() == make_tokenizer(spec).to_files()
  )
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (
    None,
    1,
    0,
    2,
    None,
  )
  ids = [*tokenizer.encode("Thank you"), tokenizer.sentinels[0], *tokenizer.encode("me"), 1]
  assert tokenizer.show(ids) == "Thank you<extra_id_0> me</s>" and tokenizer.decode(ids) == "Thank you me"
  assert not tokenizer.special[tokenizer.encode("<extra_id_0>")].any()
  masked = make_tokenizer({**spec, "mask": True, "sentinels": 2})
  assert masked.mask_id == size and masked.sentinels == tokenizer.sentinels
  with pytest.raises(ConfigError, match="sentinels: the vocabulary has only 3, got 4"):
    make_tokenizer({**spec, "sentinels": 4})


def test_sentencepiece_model_that_inserts_a_space(tmp_path):
  """The models of T5 and Llama insert a space before the first word."""
  import io

  import sentencepiece as spm

  out = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS[1].splitlines()), model_writer=out, vocab_size=320, model_type="bpe",
    byte_fallback=True, minloglevel=2, hard_vocab_limit=False, pad_id=3,
  )  # fmt: skip
  (tmp_path / "words.model").write_bytes(out.getvalue())
  tokenizer = make_tokenizer({"name": "sentencepiece", "path": str(tmp_path / "words.model")})
  text = "The quick 🙂 café  fox"
  assert (
    tokenizer.decode(tokenizer.document(text))
    == "".join(stream_all(tokenizer, tokenizer.document(text)))
    == "The quick 🙂 café fox"
  )
  assert tokenizer.pad_id == 3 and tokenizer.special[:4].all() and tokenizer.special.sum() == 4

  text = "日  ﬁ…🙂 The\u2581fox "  # normalised: spaces that are dropped, one character that becomes two, or three
  ids, offsets = tokenizer.encode_with_offsets(text)
  assert ids.tolist() == tokenizer.encode(text).tolist()
  stood = [(tokenizer.pieces[i].decode(errors="replace").strip(), text[a:b].strip()) for i, (a, b) in zip(ids, offsets)]
  expected = [("日", "日"), ("f", "ﬁ"), ("i", "ﬁ"), *[(".", "…")] * 3, *[("\ufffd", "🙂")] * 4, ("fox", "fox")]
  assert [pair for pair in stood if pair in expected] == expected
  assert (np.diff(offsets, axis=0) >= 0).all() and tokenizer.encode_with_offsets("")[1].shape == (0, 2)

  more = make_tokenizer({"name": "sentencepiece", "path": str(tmp_path / "words.model"), "sentinels": 2})
  assert more.vocab_size == tokenizer.vocab_size + 2
  ids = [*more.encode("The quick"), more.sentinels[0], *more.encode("fox"), more.eos_id, more.sentinels[1]]
  assert more.decode(ids) == "".join(stream_all(more, ids)) == "The quick fox"
  assert more.show(ids) == "The quick<extra_id_0> fox</s><extra_id_1>"


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"name": "sentencepeice"}, "did you mean `sentencepiece`"),
    ({"name": "sentencepiece", "vocab": 3}, r"tokenizer\.vocab: .*`vocab_size`"),
    ({"name": "sentencepiece", "vocab_size": 100}, "vocab_size: .*smaller than required_chars.*got 100"),
    ({"name": "sentencepiece", "model_type": "word"}, "model_type: must be 'bpe' or 'unigram', got 'word'"),
    ({"name": "sentencepiece", "path": "none.model"}, "path: cannot be read: No such file.*got 'none.model'"),
    ({"name": "sentencepiece", "path": __file__}, "not a SentencePiece model"),
    ({"name": "sentencepiece", "vocab_size": 300, "sentinels": 100}, "vocab_size: .*got 300 with 100 added tokens"),
    ({"name": "sentencepiece", "vocab_size": 90, "sentinels": 100}, "vocab_size: leaves no tokens for text .*got 90"),
    ({"name": "bytes", "sentinels": -1}, "sentinels: must be a number of tokens.*got -1"),
    ({"name": "bytes", "sentinels": True}, "sentinels: must be a number of tokens.*got True"),
    ({"name": "bytes", "mask": 1}, "mask: must be True or False, got 1"),
    ({"name": "hf", "path": "nowhere"}, "path: there is no such file.*got 'nowhere'"),
    ({"name": "hf", "path": __file__}, r"tokenizer\.json: not JSON"),
  ],
)
def test_wrong_tokenizer_spec_is_one_line_error(tmp_path, capfd, spec, message):
  with pytest.raises(ConfigError, match=message) as caught:
    make_tokenizer(spec, SOURCE, tmp_path)
  assert "\n" not in str(caught.value)


def test_tokenizer_without_offsets_is_one_line_error():
  own = Tokenizer("own", (b"a",), lambda text: [0] * len(text), {})
  with pytest.raises(ConfigError, match=r"no character offsets, got kind 'own'\. Set `to_offsets`"):
    own.encode_with_offsets("a")


def test_missing_training_text_is_refused():
  with pytest.raises(ConfigError, match="is trained on the training text"):
    make_tokenizer({"name": "sentencepiece"})
  with pytest.raises(ConfigError, match="the text is empty"):
    train_sentencepiece([], 300)
  with pytest.raises(ConfigError, match="--trust"):
    tokenizer_from_files({"name": "os:system"}, {})
