"""The console script: subcommands, flags, errors as one line, exit codes. Heavy imports happen inside commands."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax import config as cfglib
from llmjax.config import ConfigError

DESCRIPTION = "Train, evaluate and use Transformers in JAX."
EXAMPLES = """\
begin here:
  llmjax configs                                        what can be run
  llmjax train --config=gpt:size=nano                   trains on Python's own library, no download
  llmjax train --config=gpt:size=nano,text=my.txt       on your text
  llmjax generate --model=runs/gpt-size=nano --prompt="def main("
  llmjax report --workdir=runs/gpt-size=nano            curves and samples as one page

`llmjax COMMAND --help` says more about each.
"""


EMBED_NOTES = """\
The array is float32 [texts, width] in the order of the input; each row has length 1, so that a product of rows is a
cosine. FILE.ids.txt has a line for each: the record's field `id` where it has one, else its number, from 0.
An empty line or text is an error.

  llmjax embed --model=runs/x --input=queries.txt --output=queries.npy
  llmjax embed --model=runs/x --input=docs.jsonl --column=abstract --output=docs.npy
"""


def parser() -> argparse.ArgumentParser:
  """All subcommands."""
  main = argparse.ArgumentParser(
    prog="llmjax",
    description=DESCRIPTION,
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)

  def add(name: str, summary: str, function: Any, notes: str = "") -> argparse.ArgumentParser:
    command = commands.add_parser(
      name,
      help=summary,
      description=summary,
      epilog=notes,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    command.set_defaults(function=function)
    return command

  config_notes = (
    "The config is --config=FILE.py[:argument,...], or the name of a shipped one, then overridden key by key:\n"
    "  llmjax train --config=gpt:size=nano --config.optim.lr=3e-3 --config.total_steps='10M tokens'\n"
    "A value of `none` unsets a key. All keys and their defaults: configs/base.py.\n"
  )
  train = add("train", "train a config, or resume it", run_train, config_notes)
  train.usage = "llmjax train --config=CONFIG [--config.KEY=VALUE ...] [--workdir=DIR] [--dry_run] [--fresh]"
  train.add_argument("--workdir", help="where the run lives (default: runs/CONFIG)")
  train.add_argument("--dry_run", action="store_true", help="say what would run: parameters, memory, the first batch")
  train.add_argument("--fresh", action="store_true", help="move an earlier run in the workdir aside and start anew")

  add("configs", "list the configs that ship", run_configs)

  evaluate = add(
    "evaluate",
    "held-out loss and metrics of a run or a model",
    run_evaluate,
    "  llmjax evaluate --config=gpt:size=nano --workdir=runs/gpt-size=nano     the run's own evaluations\n"
    "  llmjax evaluate --model=runs/gpt-size=nano --data=my.txt                any text, JSONL, Parquet or CSV file\n\n"
    + config_notes,
  )
  evaluate.add_argument("--workdir", help="a run of --config")
  evaluate.add_argument("--model", help="a workdir or one of its checkpoints")
  evaluate.add_argument("--data", help="a file or glob; of records the field `text`, or those that the objective names")
  evaluate.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  generate = add("generate", "continue a prompt", run_generate, "Without --prompt, it is read from standard input.\n")
  generate.add_argument("--model", required=True, help="a workdir or one of its checkpoints")
  generate.add_argument("--prompt", help="text to continue")
  generate.add_argument("--max_new_tokens", type=int, help="default: 200, or what the model's context has room for")
  generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
  generate.add_argument("--top_k", type=int, help="draw among the k likeliest tokens")
  generate.add_argument("--top_p", type=float, help="draw among the likeliest tokens that sum to p")
  generate.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repetition")
  generate.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
  generate.add_argument("--seed", type=int, default=0)
  generate.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  embed = add("embed", "vectors of texts, as a NumPy file", run_embed, EMBED_NOTES)
  embed.add_argument("--model", required=True, help="a workdir or one of its checkpoints")
  embed.add_argument("--input", required=True, help="text, one a line, or JSONL, CSV, TSV or Parquet")
  embed.add_argument("--output", required=True, help="FILE.npy; ids go to FILE.ids.txt")
  embed.add_argument("--pooling", help="cls, mean, last or pooler (default: the checkpoint's, else mean)")
  embed.add_argument("--column", help="the field of a record that is the text (default: text)")
  embed.add_argument("--max_len", type=int, help="tokens of a text; longer ones lose their end (default: as trained)")
  embed.add_argument("--batch_tokens", type=int, help="rows times length of a batch (default: 16384)")
  embed.add_argument("--mesh", default="data=-1", help="devices, such as data=-1,tensor=2 (default: %(default)s)")
  embed.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  tokenizer = add("tokenizer", "train a SentencePiece vocabulary", run_tokenizer)
  tokenizer.add_argument("--input", required=True, nargs="+", help="text files or globs")
  tokenizer.add_argument("--vocab_size", type=int, required=True)
  tokenizer.add_argument("--output", required=True, help="FILE.model")

  report = add("report", "draw the curves of a run (PNG and one HTML page) and sum it up", run_report)
  report.add_argument("--workdir", required=True)

  checkpoint = add("checkpoint", "look into checkpoints", run_checkpoint)
  checkpoint.add_argument("action", choices=["inspect"], help="inspect: what a checkpoint holds")
  checkpoint.add_argument("path", help="a workdir or one of its checkpoints")
  checkpoint.add_argument("--arrays", action="store_true", help="list every array with its shape")
  return main


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns its exit code: 0, 2 for what the user can mend, 130 when interrupted."""
  arguments, rest = parser().parse_known_args(argv)
  try:
    if rest and arguments.command not in ("train", "evaluate"):
      raise ConfigError(f"unknown argument {rest[0]!r}; see `llmjax {arguments.command} --help`")
    arguments.function(arguments, rest)
  except BrokenPipeError:  # the reader, such as `head`, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ConfigError, OSError) as error:
    print(f"llmjax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt as error:
    print(f"llmjax: {error or 'interrupted'}", file=sys.stderr)
    return 130
  return 0


def start_jax() -> None:
  """Settings of the process, before JAX is used."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import jax
  from absl import flags

  from llmjax.data.source import cache_dir

  if not flags.FLAGS.is_parsed():  # grain reads absl's flags
    flags.FLAGS.mark_as_parsed()
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))


def run_train(arguments: argparse.Namespace, rest: list[str]) -> None:
  config = cfglib.load_config(rest)
  start_jax()
  if arguments.dry_run:
    from llmjax.preview import preview

    print(preview(config))
    return
  from llmjax.train import Diverged, run

  try:
    run(config, arguments.workdir or default_workdir(rest), fresh=arguments.fresh)
  except Diverged as error:
    raise ConfigError(str(error)) from error


def default_workdir(rest: list[str]) -> str:
  """runs/CONFIG, with the config's argument where it has one."""
  i = next(i for i, a in enumerate(rest) if re.match(r"--?config(=|$)", a))
  reference = rest[i].split("=", 1)[1] if "=" in rest[i] else rest[i + 1]
  path, argument = cfglib.find(reference)
  return str(Path("runs") / re.sub(r"[^\w=.,+-]+", "_", path.stem + ("-" + argument if argument else "")))


def run_configs(arguments: argparse.Namespace, rest: list[str]) -> None:
  for name, path in cfglib.shipped().items():
    summary = path.read_text(encoding="utf-8").split('"""')[1].strip().splitlines()[0]
    print(f"{name:<12} {summary}")


def run_evaluate(arguments: argparse.Namespace, rest: list[str]) -> None:
  if arguments.model and arguments.data and not (rest or arguments.workdir):
    config, path = None, arguments.model
  elif rest and arguments.workdir and not (arguments.model or arguments.data):
    config, path = cfglib.load_config(rest), arguments.workdir
  else:
    raise ConfigError("evaluate takes --config=... --workdir=DIR, or --model=PATH --data=FILE")
  start_jax()
  from llmjax.evaluate import evaluate_checkpoint

  for name, value in evaluate_checkpoint(path, config=config, data=arguments.data, trust=arguments.trust).items():
    print(f"{name:<36} {value:.6g}" if isinstance(value, float) else f"{name}:\n{shown(value)}")


def shown(text: str) -> str:
  """What a model writes, as it may go to standard output: a terminal would obey its control characters."""
  from llmjax.metrics import printable

  return printable(text) if sys.stdout.isatty() else text


def run_generate(arguments: argparse.Namespace, rest: list[str]) -> None:
  if "" in arguments.stop:
    raise ConfigError("--stop is empty; give the text to end before, or leave it out")
  start_jax()
  from llmjax.generation import encode_prompt, make_sampling, until
  from llmjax.pretrained import load

  make_sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.repetition_penalty)  # checks
  pretrained = load(arguments.model, trust=arguments.trust)
  prompt = read_prompt(arguments.prompt)
  config = pretrained.model.cfg
  separate = config.stacks == "both"  # the decoder has a text of its own, which does not go on from the prompt
  ids = encode_prompt(pretrained.model, pretrained.tokenizer, prompt)
  ids, count = fit(ids, config.max_len, arguments.max_new_tokens, separate)
  sys.stdout.write("" if separate else shown(prompt))
  for text in until(continuation(pretrained, ids, count, arguments), tuple(arguments.stop)):
    sys.stdout.write(shown(text))
    sys.stdout.flush()
  sys.stdout.write("\n")


def read_prompt(given: str | None) -> str:
  """The prompt of the command line, or standard input."""
  try:
    prompt = sys.stdin.read() if given is None else given
    prompt.encode()  # bytes of another encoding may have come in as lone surrogates
  except UnicodeError as error:
    raise ConfigError(f"the prompt is not UTF-8: {error}") from error
  return prompt


def fit(ids: Any, context: int, max_new_tokens: int | None, separate: bool = False) -> tuple[Any, int]:
  """Prompt and number of new tokens that a context holds; a prompt too long loses its beginning, with a word about it.

  Where `max_new_tokens` is not given, it is at most 200, and the prompt may fill half of the context at least; all of
  it where an encoder has a `separate` context for it.
  """
  if len(ids) == 0:
    raise ConfigError("the prompt is empty, and the model knows no token that begins a text; give a prompt")
  if max_new_tokens is not None and not 1 <= max_new_tokens < context:
    reason = "must be at least 1" if max_new_tokens < 1 else f"leaves no room in a context of {context}"
    raise ConfigError(f"--max_new_tokens={max_new_tokens} {reason}")
  room = max(context - 200, (context + 1) // 2) if max_new_tokens is None else context - max_new_tokens
  room = context if separate else room
  if len(ids) > room:
    print(f"llmjax: the prompt has {len(ids)} tokens; only its last {room} are read", file=sys.stderr)
    ids = ids[-room:]
  left = context - (1 if separate else len(ids))
  return ids, min(200, left) if max_new_tokens is None else max_new_tokens


def continuation(pretrained: Any, ids: Any, count: int, arguments: argparse.Namespace) -> Iterator[str]:
  """The text of each new token."""
  from llmjax.generation import stream

  model, params, tokenizer = pretrained
  text = tokenizer.stream(special=model.cfg.stacks == "both")  # sentinels say which span is written
  for token in stream(
    model,
    params,
    ids[None],
    max_new_tokens=count,
    start_id=tokenizer.pad_id,
    seed=arguments.seed,
    temperature=arguments.temperature,
    top_k=arguments.top_k,
    top_p=arguments.top_p,
    repetition_penalty=arguments.repetition_penalty,
  ):
    if tokenizer.eos_id is not None and token[0] == tokenizer.eos_id:
      break
    yield text.push(int(token[0]))
  yield text.finish()


def run_embed(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.embeddings import BATCH_TOKENS, embed_file
  from llmjax.sharding import parse_mesh

  ids, (count, width) = embed_file(
    arguments.model,
    arguments.input,
    arguments.output,
    pooling=arguments.pooling,
    column=arguments.column,
    max_len=arguments.max_len,
    batch_tokens=BATCH_TOKENS if arguments.batch_tokens is None else arguments.batch_tokens,
    mesh=parse_mesh(arguments.mesh),
    trust=arguments.trust,
  )
  print(f"wrote {arguments.output}: {count:,} vectors of {width}, their ids to {ids}")


def run_tokenizer(arguments: argparse.Namespace, rest: list[str]) -> None:
  from llmjax.config import build
  from llmjax.data.sentencepiece_tokenizer import train_sentencepiece
  from llmjax.data.source import SOURCES
  from llmjax.data.tokenizer import sample

  source = build({"name": "text", "files": tuple(arguments.input)}, SOURCES, "--input", split="train")
  model = train_sentencepiece(sample(source), arguments.vocab_size)
  Path(arguments.output).write_bytes(model)
  print(f"wrote {arguments.output}: use it with --config.data.tokenizer.path={arguments.output}")


def run_report(arguments: argparse.Namespace, rest: list[str]) -> None:
  from llmjax.report import summary, write_report

  write_report(arguments.workdir)
  print(summary(arguments.workdir))


def run_checkpoint(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.pretrained import open_checkpoint

  checkpoints, step, manifest = open_checkpoint(arguments.path)
  print(f"{checkpoints.folder}/{step}  (there are {checkpoints.steps()})")
  print(f"step          {step:,} of {manifest['total_steps']:,}")
  print(f"parameters    {manifest['num_params']:,} ({manifest['layout']}{', with average' if manifest['ema'] else ''})")
  print(f"model         {json.dumps(manifest['model'])}")
  print(f"objective     {json.dumps(manifest['objective'])}")
  print(f"tokenizer     {json.dumps(manifest['tokenizer']['spec'])}")
  print(f"metrics       {json.dumps(manifest['metrics'])}")
  print(f"versions      {json.dumps(manifest['versions'])}")
  if arguments.arrays:
    for name, shape in checkpoints.shapes(step).items():
      print(f"  {name:<64} {list(shape)}")
  checkpoints.close()
