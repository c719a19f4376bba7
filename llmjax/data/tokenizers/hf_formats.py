"""What the files of a Hugging Face folder say, whichever they are, in the words of a `tokenizer.json`.

Old folders have the vocabulary of GPT-2, BERT or SentencePiece instead of that file. `read` writes it as the
`tokenizer.json` that Transformers makes of it, with the tokens that the files beside it name. These are plain Python
containers: nothing of Hugging Face is needed here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llmjax.config import ConfigError
from llmjax.data.tokenizers.base import SENTINEL
from llmjax.data.tokenizers.sentencepiece import CONTROL, NORMAL, SPACE, UNIGRAM, USER_DEFINED, model_proto

Json = dict[str, Any]
Files = Mapping[str, bytes]

# Files that hold a vocabulary, the preferred first, and files beside them that say more.
VOCABULARIES = (
  ("tokenizer.json",),
  ("vocab.json", "merges.txt"),
  ("encoder.json", "vocab.bpe"),
  ("vocab.txt",),
  ("spiece.model",),
  ("tokenizer.model",),
)
COMPANIONS = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
)


def read_tokenizer_folder(files: Files) -> tuple[Json, dict[str, str | None]]:
  """(the content of a tokenizer.json, {"bos_token": "<s>", ...}) of a folder's files.

  Raises ConfigError: a file is damaged, or of a kind that none of KINDS is.
  """
  config = configuration(files)
  kind = _kind(files, config)
  if "tokenizer.json" in files:
    settings = parse(files, "tokenizer.json")
    if not {"model", "decoder", "added_tokens"} <= set(settings):
      raise ConfigError("the JSON file is no tokenizer.json: it has no model, decoder, added_tokens")
  else:
    assert kind is not None
    settings = kind.convert(files, config)
  vocabulary = _vocabulary(settings)
  usual = {} if kind is None else {k: v for k, v in kind.tokens.items() if v in vocabulary}
  names: dict[str, str | None] = {**usual, **_declared(config)}
  settings = {**settings, "added_tokens": _added_tokens(settings, vocabulary, names, files, config)}
  if "tokenizer.json" not in files and kind is not None:
    settings["post_processor"] = _frame(settings, vocabulary, names, kind, config)
  return settings, names


def configuration(files: Files) -> Json:
  """tokenizer_config.json, and, where that does not list the added tokens, special_tokens_map.json."""
  config = parse(files, "tokenizer_config.json")
  return config if "added_tokens_decoder" in config else config | parse(files, "special_tokens_map.json")


def parse(files: Files, name: str) -> Json:
  """A JSON file's content; {} for one that is not there."""
  try:
    content = json.loads(files.get(name, b"{}"))
  except ValueError as error:
    raise ConfigError(f"the file is no {name}: {error}") from error
  if not isinstance(content, dict):
    raise ConfigError(f"the file is no {name}: it holds a {type(content).__name__}")
  return content


def tokenizer_json(
  model: Json,
  *,
  normalizer: Json | None = None,
  pre_tokenizer: Json | None = None,
  post_processor: Json | None = None,
  decoder: Json | None = None,
  added_tokens: Sequence[Json] = (),
) -> Json:
  first = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added_tokens)}
  text = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
  return {**first, **text, "post_processor": post_processor, "decoder": decoder, "model": model}


FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def added_token(index: int, content: str, special: bool = True, **options: bool) -> Json:
  plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
  return {"id": index, "content": content, **plain, **options, "special": special}


def bpe(vocabulary: Mapping[str, int], merges: Iterable[Sequence[str]], **options: Any) -> Json:
  plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
  flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
  return {"type": "BPE", **plain, **flags, **options, "vocab": dict(vocabulary), "merges": [list(m) for m in merges]}


def merges(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
  """All pairs of pieces that make a third, in the order of the vocabulary, which is that of learning."""
  pairs = []
  for piece in sorted(vocabulary, key=vocabulary.__getitem__):
    cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    pairs += [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
  return pairs


def sequence(key: str, *parts: Json) -> Json:
  return {"type": "Sequence", key: list(parts)}


def template(before: Mapping[str, int], after: Mapping[str, int], between: Mapping[str, int] | None = None) -> Json:
  """A post-processor that puts special tokens {name: id} around a text; `between` precede the second of a pair."""

  def mark(tokens: Mapping[str, int], which: int) -> list[Json]:
    return [{"SpecialToken": {"id": name, "type_id": which}} for name in tokens]

  between = between or {}
  single = [*mark(before, 0), {"Sequence": {"id": "A", "type_id": 0}}, *mark(after, 0)]
  second = [*mark(between, 1), {"Sequence": {"id": "B", "type_id": 1}}, *mark(after, 1)]
  tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in {**before, **after, **between}.items()}
  return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": tokens}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_BACK = ({"type": "ByteFallback"}, {"type": "Fuse"})
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def replace(old: str, new: str) -> Json:
  return {"type": "Replace", "pattern": {"String": old}, "content": new}


def metaspace(prepend: str, split: bool) -> Json:
  """Spaces become visible, and one stands before a text: before its "first" part, "always", or "never"."""
  return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prepend, "split": split}


# Conversions


def _byte_level(files: Files, config: Mapping[str, Any]) -> Json:
  """GPT-2's vocabulary and merges."""
  vocabulary = parse(files, "vocab.json" if "vocab.json" in files else "encoder.json")
  lines = _text(files, "merges.txt" if "merges.txt" in files else "vocab.bpe").split("\n")
  pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
  strange = next((p for p in pairs if len(p) != 2 or not vocabulary.keys() >= {*p, "".join(p)}), None)
  if strange is not None:
    raise ConfigError(f"the merge {' '.join(strange)!r} is none of two tokens of the vocabulary to a third one")
  space = {"add_prefix_space": bool(config.get("add_prefix_space", False))}
  return tokenizer_json(bpe(vocabulary, pairs), pre_tokenizer=BYTE_LEVEL | space, decoder=BYTE_LEVEL)


def _word_piece(files: Files, config: Mapping[str, Any]) -> Json:
  """BERT's list of words and their parts."""
  lines = _text(files, "vocab.txt").removesuffix("\n").split("\n")
  unknown = {**BERT, **_declared(config)}["unk_token"]
  model = {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##"}
  vocabulary = {line.rstrip(): i for i, line in enumerate(lines)}
  normalizer = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
    "strip_accents": config.get("strip_accents"),
    "lowercase": config.get("do_lower_case", True),
  }
  return tokenizer_json(
    {**model, "max_input_chars_per_word": 100, "vocab": vocabulary},
    normalizer=normalizer,
    pre_tokenizer={"type": "BertPreTokenizer"},
    decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
  )


def _t5(files: Files, config: Mapping[str, Any]) -> Json:
  """A unigram vocabulary for words, with sentinels behind it."""
  proto = _proto(files)
  sentinels = [SENTINEL.format(k) for k in reversed(range(config.get("extra_ids", 100)))]
  pieces = [[piece.piece, piece.score] for piece in proto.pieces] + [[name, 0.0] for name in sentinels]
  rules = proto.normalizer_spec.precompiled_charsmap
  return tokenizer_json(
    {"type": "Unigram", "unk_id": proto.trainer_spec.unk_id, "byte_fallback": False, "vocab": pieces},
    normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(rules).decode()} if rules else None,
    pre_tokenizer=sequence("pretokenizers", {"type": "WhitespaceSplit"}, metaspace("always", split=True)),
    decoder=metaspace("always", split=True),
    added_tokens=[added_token(len(proto.pieces) + i, name) for i, name in enumerate(sentinels)],
  )


def _llama(files: Files, config: Mapping[str, Any]) -> Json:
  """SentencePiece's BPE with bytes for unknown characters, and a space before the text."""
  prefixed = config.get("add_prefix_space") in (True, None)
  prepend = "never" if not prefixed else "always" if config.get("legacy", False) else "first"
  strip = [STRIP] * prefixed
  return _sentencepiece_bpe(
    files,
    pre_tokenizer=metaspace(prepend, split=False),
    decoder=sequence("decoders", replace(SPACE, " "), *BYTES_BACK, *strip),
  )


def _gemma(files: Files, config: Mapping[str, Any]) -> Json:
  """The same without a space before the text."""
  made = _sentencepiece_bpe(
    files, normalizer=replace(" ", SPACE), decoder=sequence("decoders", replace(SPACE, " "), *BYTES_BACK)
  )
  return made | {"model": made["model"] | {"unk_token": {**GEMMA, **_declared(config)}["unk_token"]}}


def _sentencepiece_bpe(files: Files, **parts: Any) -> Json:
  pieces = _proto(files).pieces
  vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
  text = {piece.piece: i for i, piece in enumerate(pieces) if piece.type in (NORMAL, USER_DEFINED)}
  fixed = {i: piece for i, piece in enumerate(pieces) if piece.type in (CONTROL, USER_DEFINED)}
  added = [added_token(i, p.piece, special=p.type == CONTROL, normalized=False) for i, p in fixed.items()]
  return tokenizer_json(bpe(vocabulary, merges(text), fuse_unk=True, byte_fallback=True), added_tokens=added, **parts)


def _proto(files: Files) -> Any:
  name = "spiece.model" if "spiece.model" in files else "tokenizer.model"
  return model_proto(files[name], name)


def _text(files: Files, name: str) -> str:
  try:
    return files[name].decode()
  except UnicodeDecodeError as error:
    raise ConfigError(f"the file is no {name}: it is not UTF-8 text") from error


class Kind(NamedTuple):
  """What Transformers makes of files.

  Attributes:
    tokens: what its special tokens are called where the folder does not say.
    convert: files and configuration -> tokenizer.json.
    frame: the tokens before a single text, behind it, and before the second of a pair.
    adds: whether there are bos and eos in the frame where the folder does not say; None where it has no choice.
  """

  tokens: Mapping[str, str]
  convert: Callable[[Files, Mapping[str, Any]], Json]
  frame: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
  adds: tuple[bool, bool] | None = None


END = "<|endoftext|>"
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ROBERTA = {**LLAMA, "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
BERT = {k: f"[{k[:-6].upper()}]" for k in ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")}
T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
GEMMA = {**T5, "bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
BOS_EOS = (("bos_token",), ("eos_token",), ("bos_token",))

KINDS = {
  "gpt2": Kind(GPT2, _byte_level, BOS_EOS, (False, False)),
  "roberta": Kind(ROBERTA, _byte_level, (("cls_token",), ("sep_token",), ("sep_token",))),
  "bert": Kind(BERT, _word_piece, (("cls_token",), ("sep_token",), ())),
  "t5": Kind(T5, _t5, ((), ("eos_token",), ())),
  "llama": Kind(LLAMA, _llama, BOS_EOS, (True, False)),
  "gemma": Kind(GEMMA, _gemma, BOS_EOS, (True, False)),
}

# The class that a folder names, without "Tokenizer" and "Fast".
CLASSES = {
  "GPT2": "gpt2",
  "Roberta": "roberta",
  "Bart": "roberta",
  "Longformer": "roberta",
  "Bert": "bert",
  "DistilBert": "bert",
  "Electra": "bert",
  "MobileBert": "bert",
  "T5": "t5",
  "MT5": "t5",
  "Llama": "llama",
  "Gemma": "gemma",
}


def _kind(files: Files, config: Mapping[str, Any]) -> Kind | None:
  """By the class that the folder names, else by how its vocabulary looks; None: its tokenizer.json says all."""
  named = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
  if named in CLASSES:
    return KINDS[CLASSES[named]]
  if "tokenizer.json" in files:
    return None
  kind = None if named else _looks(files)
  if kind is None:
    what = f"tokenizer_class={config['tokenizer_class']!r}" if named else "a vocabulary of unknown kind"
    raise ConfigError(
      f"{what} can only be read from a tokenizer.json (without one: {', '.join(CLASSES)}); write it with Transformers: "
      "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
  return KINDS[kind]


def _looks(files: Files) -> str | None:
  """The key of KINDS."""
  if "vocab.txt" in files:
    return "bert" if BERT["cls_token"] in _text(files, "vocab.txt").split() else None
  if "spiece.model" in files or "tokenizer.model" in files:
    proto = _proto(files)
    first, model = [piece.piece for piece in proto.pieces[:3]], proto.trainer_spec.model_type
    if model == UNIGRAM:
      return "t5" if first == ["<pad>", "</s>", "<unk>"] else None
    return {"<unk> <s> </s>": "llama", "<pad> <eos> <bos>": "gemma"}.get(" ".join(first))
  vocabulary = parse(files, "vocab.json" if "vocab.json" in files else "encoder.json")
  if any(token.endswith("</w>") for token in vocabulary):  # CLIP's and GPT's, whose words end visibly
    return None
  return "roberta" if {"<s>", "</s>", "<mask>"} <= set(vocabulary) else "gpt2"


# Special tokens


def _declared(config: Mapping[str, Any]) -> dict[str, str | None]:
  """{"bos_token": "<s>", ...}; None where the folder says that there is none."""
  tokens = {k: v for k, v in config.items() if k.endswith("_token") and (v is None or isinstance(v, (str, dict)))}
  return {k: None if v is None else _content(v) for k, v in tokens.items()}


def _content(token: str | Mapping[str, Any]) -> str:
  return token if isinstance(token, str) else token["content"]


def _vocabulary(settings: Json) -> dict[str, int]:
  """{token: id} of the model, without added tokens."""
  vocabulary = settings["model"]["vocab"]
  return {piece: i for i, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary


def _added_tokens(
  settings: Json,
  vocabulary: Mapping[str, int],
  names: Mapping[str, str | None],
  files: Files,
  config: Mapping[str, Any],
) -> list[Json]:
  """Those of the settings, then what else the folder names: listed ones in the order of their ids, special ones."""
  more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
  more = list(more.values()) if isinstance(more, dict) else more
  named = [token for token in names.values() if token is not None]
  special = dict.fromkeys([*named, *map(_content, more)])

  wanted: dict[str, Mapping[str, Any]]  # {token: its flags}
  if "added_tokens_decoder" in config:
    listed = config["added_tokens_decoder"]
    ordered = [listed[index] for index in sorted(listed, key=int)]
    wanted = {t["content"]: {**t, "special": t.get("special", False) or t["content"] in named} for t in ordered}
  else:
    old = parse(files, "added_tokens.json")
    wanted = {token: {"special": token in special} for token in sorted(old, key=old.__getitem__)}
  described = {t["content"]: t for t in (*config.values(), *more) if isinstance(t, dict) and "content" in t}
  for token in special:
    wanted.setdefault(token, {**described.get(token, {}), "special": True})

  known = {t["content"]: {**t, "special": t["special"] or t["content"] in named} for t in settings["added_tokens"]}
  behind = max([len(vocabulary), *(token["id"] + 1 for token in known.values())])
  for content, flags in wanted.items():
    if content not in known:
      index = vocabulary.get(content, behind)
      behind += index == behind
      known[content] = added_token(index, content, **{k: bool(v) for k, v in flags.items() if k in FLAGS})
  return sorted(known.values(), key=lambda token: token["id"])


def _frame(
  settings: Json, vocabulary: Mapping[str, int], names: Mapping[str, str | None], kind: Kind, config: Mapping[str, Any]
) -> Json:
  """The post-processor of a folder without a tokenizer.json."""
  ids = {**vocabulary, **{token["content"]: token["id"] for token in settings["added_tokens"]}}
  before, after, between = kind.frame
  if kind.adds is not None:
    begins, ends = (config.get(f"add_{role}_token", adds) for role, adds in zip(("bos", "eos"), kind.adds))
    before, after, between = before * bool(begins), after * bool(ends), between * bool(begins)

  def found(roles: Sequence[str]) -> dict[str, int]:
    return {token: ids[token] for token in map(names.get, roles) if token is not None}

  return template(found(before), found(after), found(between))
