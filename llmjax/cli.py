"""The console script: subcommands, flags, errors as one line, exit codes. Heavy imports happen inside commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax import config as cfglib
from llmjax import hosts
from llmjax.config import ConfigError

DESCRIPTION = "Train, evaluate and use Transformers in JAX."
EXAMPLES = """\
begin here:
  llmjax configs                                        what can be run
  llmjax train --config=gpt:size=nano                   trains on Python's own library, no download
  llmjax train --config=gpt:size=nano,text=my.txt       on your text
  llmjax generate --model=runs/gpt-size=nano --prompt="def main("
  llmjax report --workdir=runs/gpt-size=nano            curves and samples as one page
  llmjax train --config=classify:init_from=PATH,train=my.csv,text=review,label=stars

`llmjax COMMAND --help` says more about each.
"""


PATH_HELP = "a workdir, WORKDIR/checkpoints/STEP or /best, a Hugging Face folder, or a hub name such as gpt2"

GENERATE_NOTES = """\
Without --prompt, it is read from standard input. What is not given is as the model's generation config says.

  llmjax generate --model=gpt2 --prompt="Once upon a time"
  llmjax generate --model=DIR --chat --prompt="Who wrote Emma?"
"""

IMPORT_NOTES = """\
Every command takes a Hugging Face folder or hub name as --model, so importing is needed only to keep a model as a
checkpoint of ours.

  llmjax import --hf=gpt2 --output=runs/gpt2
  llmjax export --model=runs/gpt2 --output=gpt2-again
"""

PREDICT_NOTES = """\
Reads what the model was trained to read (text; tokens; question and context; source; messages) and writes labels with
their probabilities, tags with spans, answers with their places, or texts; a record's field `id` is kept. A line that
cannot be read becomes {"line": its number, "error": why}, and the exit code 2.

  llmjax predict --model=runs/classify --input=reviews.jsonl --output=labels.jsonl
  llmjax predict --model=runs/classify --input=more.jsonl --output=sure.jsonl --min_confidence=0.95
"""
SHOWN = 10  # bad lines

VERIFY_NOTES = """\
The config, shrunk and in float32, makes its initial parameters, loss, every gradient, held-out metrics and its
parameters after three steps of gradient descent on one device and on each mesh. The exit code is 1 where anything but
rounding differs. A model, objective or optimizer of your own is run as it is.

  llmjax verify --config=gpt:size=nano
  llmjax verify --config=my.py --meshes="data=8;fsdp=2,tensor=4" --processes=2

"""
SWEEP_NOTES = """\
A sweep file has `get_sweep()`, which gives an llmjax.trials.Sweep, and `get_config(argument)`, as a config has. Every
trial is a `llmjax train` of its own in WORKDIR/TRIAL; all are looked at before any starts. The same command goes on
where an earlier one was cut off, and writes sweep.html, sweep.png, results.csv and results.parquet.

  llmjax sweep --config=experiments/optimizers/sweep.py --workdir=runs/optimizers --max_parallel=2
  llmjax sweep --config=my_sweep.py --workdir=/shared/x --launcher=slurm --launcher_flags="--gpus_per_node=1"
  llmjax sweep --config=my_sweep.py --workdir=x --launcher=tpu_vm --trials_in=gs://bucket/x \\
    --launcher_flags="--zone=us-central1-a --type=v5litepod-8 --spot" --max_parallel=4

"""
DISTRIBUTED = ("train", "evaluate", "generate", "embed", "predict")  # run in several processes

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
    if name in DISTRIBUTED:
      add_hosts(command)
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
  evaluate.add_argument("--model", help=PATH_HELP)
  evaluate.add_argument("--data", help="a file or glob; of records the field `text`, or those that the objective names")
  evaluate.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  generate = add("generate", "continue a prompt", run_generate, GENERATE_NOTES)
  generate.add_argument("--model", required=True, help=PATH_HELP)
  generate.add_argument("--prompt", help="text to continue")
  generate.add_argument(
    "--chat", action="store_true", help="the prompt is what a user says, framed by the chat template"
  )
  generate.add_argument("--system", help="with --chat: what the model is told before it")
  generate.add_argument("--max_new_tokens", type=int, help="default: 200, or what the model's context has room for")
  generate.add_argument("--temperature", type=float, help="0 is greedy (default: 0.8; with --num_beams 0)")
  generate.add_argument("--top_k", type=int, help="draw among the k likeliest tokens")
  generate.add_argument("--top_p", type=float, help="draw among the likeliest tokens that sum to p")
  generate.add_argument("--min_p", type=float, help="never draw what is less likely than p times the likeliest")
  generate.add_argument("--repetition_penalty", type=float, help="above 1 discourages repetition")
  generate.add_argument("--num_beams", type=int, help="above 1: beam search, which writes when it is done")
  generate.add_argument(
    "--length_penalty", type=float, help="of beam search; above 0 favours longer texts (default: 1)"
  )
  generate.add_argument(
    "--early_stopping", choices=["true", "false", "never"], help="of beam search: when it ends (default: false)"
  )
  generate.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
  generate.add_argument("--seed", type=int, default=0)
  generate.add_argument("--mesh", help="devices to share the parameters, such as tensor=4 (default: one device)")
  generate.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  embed = add("embed", "vectors of texts, as a NumPy file", run_embed, EMBED_NOTES)
  embed.add_argument("--model", required=True, help=PATH_HELP)
  embed.add_argument("--input", required=True, help="text, one a line, or JSONL, CSV, TSV or Parquet")
  embed.add_argument("--output", required=True, help="FILE.npy; ids go to FILE.ids.txt")
  embed.add_argument("--pooling", help="cls, mean, last or pooler (default: the checkpoint's, else mean)")
  embed.add_argument("--column", help="the field of a record that is the text (default: text)")
  embed.add_argument("--max_len", type=int, help="tokens of a text; longer ones lose their end (default: as trained)")
  embed.add_argument("--batch_tokens", type=int, help="rows times length of a batch (default: 16384)")
  embed.add_argument("--mesh", default="data=-1", help="devices, such as data=-1,tensor=2 (default: %(default)s)")
  embed.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  predict = add("predict", "answers of a fine-tuned model to the records of a JSONL file", run_predict, PREDICT_NOTES)
  predict.add_argument("--model", required=True, help=PATH_HELP)
  predict.add_argument("--input", required=True, help="FILE.jsonl, with the fields that the model was trained on")
  predict.add_argument("--output", required=True, help="FILE.jsonl, a line for every line of the input")
  predict.add_argument(
    "--min_confidence", type=float, help="write only what is this sure, with its input: data to train on"
  )
  predict.add_argument("--max_new_tokens", type=int, help="of a text that is written (default: as in training)")
  predict.add_argument("--num_beams", type=int, help="search for likely texts with so many beams")
  predict.add_argument(
    "--length_penalty", type=float, help="of beam search: scores are divided by length to this power"
  )
  predict.add_argument("--batch_tokens", type=int, help="rows times length of a batch (default: 16384)")
  predict.add_argument("--mesh", default="data=-1", help="devices, such as data=-1,tensor=2 (default: %(default)s)")
  predict.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  verify = add("verify", "whether a config gives the same on every mesh", run_verify, VERIFY_NOTES + config_notes)
  verify.usage = "llmjax verify --config=CONFIG [--config.KEY=VALUE ...] [--meshes=...] [--processes=...]"
  verify.add_argument(
    "--meshes", help="such as 'data=8;fsdp=2,tensor=4' (default: those that the config can be cut over)"
  )
  verify.add_argument(
    "--processes", default="", help="numbers of processes on this machine to run it in as well, such as 2,4"
  )
  verify.add_argument("--devices", type=int, default=8, help="simulated ones of a CPU (default: %(default)s)")
  verify.add_argument("--worker", help=argparse.SUPPRESS)  # where one of --processes writes what it measured

  sweep = add("sweep", "run the trials of a sweep, or go on with them", run_sweep, SWEEP_NOTES + config_notes)
  sweep.usage = "llmjax sweep --config=FILE [--config.KEY=VALUE ...] --workdir=DIR [--launcher=...] [--max_parallel=N]"
  sweep.add_argument("--workdir", required=True, help="where the sweep lives, with a folder for each trial")
  sweep.add_argument("--launcher", default="local", help="local, slurm, tpu_vm or gke (default: %(default)s)")
  sweep.add_argument("--launcher_flags", default="", help="of launch/LAUNCHER.py, as one text")
  sweep.add_argument("--max_parallel", type=int, default=1, help="trials at a time (default: %(default)s)")
  sweep.add_argument("--trials_in", help="where the workdirs of trials lie instead, such as gs://bucket/x")
  sweep.add_argument("--retry", action="store_true", help="run those that failed once more")
  sweep.add_argument("--dry_run", action="store_true", help="look at all trials and print their commands")
  sweep.add_argument("--admit", help=argparse.SUPPRESS)  # the question of `sweep.admit`, whose answer is the workdir

  import_ = add("import", "a Hugging Face folder to a checkpoint of ours", run_import, IMPORT_NOTES)
  import_.add_argument("--hf", required=True, help="a folder, or a hub name such as gpt2 or org/name@revision")
  import_.add_argument("--output", required=True, help="a folder that does not exist yet")
  import_.add_argument("--param_dtype", help="of the parameters: float32 (default), bfloat16 or float16")

  export = add("export", "any model to a folder that Transformers opens", run_export, IMPORT_NOTES)
  export.add_argument("--model", required=True, help=PATH_HELP)
  export.add_argument("--output", required=True, help="a folder that does not exist yet")
  export.add_argument(
    "--family", help="the model_type, where several have the model's shape (default: where it is from)"
  )
  export.add_argument("--dtype", help="of the tensors: float32, bfloat16 or float16 (default: that of the parameters)")
  export.add_argument(
    "--adapter", action="store_true", help="a run's adapters alone, as PEFT reads them (default: merged into the model)"
  )
  export.add_argument("--max_shard_size", default="5GB", help="of one file (default: %(default)s)")
  export.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

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


def add_hosts(command: argparse.ArgumentParser) -> None:
  """The flags of a command that several processes can run together."""
  group = command.add_argument_group(
    "several processes", "TPU VMs, SLURM and Kubernetes are asked; elsewhere every process is started with these"
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (or LLMJAX_COORDINATOR)")
  group.add_argument("--num_processes", metavar="N", help="1: whatever is found, one (or LLMJAX_NUM_PROCESSES)")
  group.add_argument("--process_id", metavar="I", help="which this is, from 0 (or LLMJAX_PROCESS_ID)")
  group.add_argument(
    "--start_timeout", type=float, default=hosts.TIMEOUT, help="seconds to wait for the others (default: %(default)g)"
  )


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns its exit code: 0, 1 where `verify` finds a difference or a trial of a `sweep` has failed, 2 for what
  the user can mend, 130 when interrupted.

  One of several processes that fails ends here, with such a code, or 1 where the user can mend nothing.
  """
  arguments, rest = parser().parse_known_args(argv)
  code, said = 0, ""
  try:
    if rest and arguments.command not in ("train", "evaluate", "verify", "sweep"):
      raise ConfigError(f"unknown argument {rest[0]!r}; see `llmjax {arguments.command} --help`")
    code = arguments.function(arguments, rest) or 0
  except BrokenPipeError:  # the reader, such as `head`, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except hosts.Disagreement as error:
    code, said = 2, str(error) if hosts.leader() else ""
  except (ConfigError, OSError) as error:
    code, said = 2, " ".join(str(error).split())
  except KeyboardInterrupt as error:
    code, said = 130, str(error) or "interrupted"
  except Exception as error:
    if not hosts.several():
      raise
    code, said = 1, hosts.lost(error) or traceback.format_exc()
  if code and hosts.several():
    hosts.leave(code, said)
  if said:
    print(f"llmjax: {said}", file=sys.stderr)
  return code


def start_jax(arguments: argparse.Namespace | None = None, config: Any = None) -> None:
  """Settings of the process, before JAX is used; joins the other processes of a command that several can run."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import jax
  from absl import flags

  from llmjax.data.source import cache_dir

  if not flags.FLAGS.is_parsed():  # grain reads absl's flags
    flags.FLAGS.mark_as_parsed()
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
  if arguments is None:
    return
  hosts.start(
    arguments.coordinator,
    arguments.num_processes,
    arguments.process_id,
    timeout=arguments.start_timeout,
    preemptible=arguments.command == "train",
  )

  def facts() -> dict[str, Any]:
    from llmjax.checkpoint import versions

    own = ("function", *hosts.ASKED, "start_timeout")
    given = {name: value for name, value in vars(arguments).items() if name not in own}
    return hosts.surroundings() | {"versions": versions(), "flags": given, "config": cfglib.to_dict(config or {})}

  hosts.preflight(facts)
  if not hosts.leader():
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # what all would say, process 0 says


def run_train(arguments: argparse.Namespace, rest: list[str]) -> None:
  config = cfglib.load_config(rest)
  start_jax(arguments, config)
  if arguments.dry_run:
    from llmjax.preview import preview

    print(preview(config))
    return
  from llmjax.train import Diverged, run

  try:
    run(config, arguments.workdir or default_workdir(rest), fresh=arguments.fresh)
  except Diverged as error:
    raise ConfigError(str(error)) from error


def run_verify(arguments: argparse.Namespace, rest: list[str]) -> int:
  config = cfglib.load_config(rest)
  if not re.fullmatch(r"(\d+(,\d+)*)?", arguments.processes):
    raise ConfigError(f"--processes={arguments.processes} must be numbers, such as 2,4")
  counts = [int(count) for count in arguments.processes.split(",") if count]
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling is what takes time
  import jax

  jax.config.update("jax_num_cpu_devices", arguments.devices)
  jax.config.update("jax_default_matmul_precision", "highest")
  start_jax()
  from llmjax import verify

  if arguments.worker:
    hosts.start()
    verify.work(config, arguments.meshes, arguments.worker)
    return 0
  meshes = arguments.meshes.split(";") if arguments.meshes else None
  return 0 if verify.verify(config, meshes, counts, rest) else 1


def run_sweep(arguments: argparse.Namespace, rest: list[str]) -> int:
  from llmjax import sweep

  if arguments.admit:
    start_jax()
    sweep.answer(arguments.admit, arguments.workdir)
    return 0
  names = ("launcher", "launcher_flags", "max_parallel", "trials_in", "retry", "dry_run")
  return 0 if sweep.sweep(rest, arguments.workdir, **{name: getattr(arguments, name) for name in names}) else 1


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
  start_jax(arguments, config)
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
  if arguments.system is not None and not arguments.chat:
    raise ConfigError("--system is for --chat; add that, or leave it out")
  start_jax(arguments)
  if arguments.prompt is None and hosts.several():
    raise ConfigError("several processes cannot share standard input; give --prompt")
  from llmjax import sharding
  from llmjax.data import chat
  from llmjax.generation import encode_prompt, until
  from llmjax.objectives.sft import end_tokens
  from llmjax.pretrained import open_path

  with open_path(arguments.model) as source:
    hosts.preflight(lambda: {"model": hosts.digest(source.manifest)})
    settings = generation_settings(source, arguments)
    source.tokenizer(arguments.trust)  # says what is missing
    sizes = arguments.mesh or ("data=-1" if hosts.several() else None)
    mesh = None if sizes is None else sharding.make_mesh(sharding.parse_mesh(sizes))
    rules = {**sharding.RULES, **source.config["rules"]}
    pretrained = source.load(arguments.trust, mesh, rules)
  prompt = read_prompt(arguments.prompt)
  config, tokenizer = pretrained.model.cfg, pretrained.tokenizer
  separate = config.stacks == "both"  # the decoder has a text of its own, which does not go on from the prompt
  if arguments.chat:
    learned = source.config["objective"] or {}
    said = learned.get("system") if arguments.system is None else arguments.system
    system = [] if said is None else [{"role": "system", "content": said}]
    messages = [*system, {"role": "user", "content": prompt}]
    choose = chat.or_default if learned.get("name") == "sft" else chat.choose  # what it has not learned it cannot read
    template = choose(tokenizer.chat_templates, learned.get("template"))
    ids = tokenizer.chat(messages, add_generation_prompt=True, template=template)
    ends = settings.get("eos_id")
    ends = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    settings["eos_id"] = tuple(dict.fromkeys((*ends, *end_tokens(tokenizer, template))))
  else:
    ids = encode_prompt(pretrained.model, tokenizer, prompt)
  ids, count = fit(ids, config.max_len, arguments.max_new_tokens, separate, settings.pop("max_new_tokens", 200))
  settings = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "start_id": tokenizer.pad_id} | settings
  sys.stdout.write("" if separate or arguments.chat else shown(prompt))
  with contextlib.nullcontext() if mesh is None else sharding.use(mesh, rules):
    for text in until(continuation(pretrained, ids, count, settings), tuple(arguments.stop)):
      sys.stdout.write(shown(text))
      sys.stdout.flush()
  sys.stdout.write("\n")


def generation_settings(source: Any, arguments: argparse.Namespace) -> dict[str, Any]:
  """Keywords of `generate`: what the command line says, else the model's generation config, else temperature 0.8."""
  from llmjax.beam_search import make_settings
  from llmjax.interop.generation_config import read_settings
  from llmjax.sampling import make_sampling

  theirs = source.manifest.get("generation") or {}
  model = source.manifest["model"]
  both = bool(model.get("encoder_layers") and model.get("decoder_layers"))
  try:
    settings = read_settings(theirs, {"is_encoder_decoder": both}) if theirs else {}
  except (TypeError, LookupError) as error:
    raise ConfigError(
      f"{arguments.model}: a field of its generation_config.json is of the wrong kind: {error}"
    ) from error
  if "do_sample" not in theirs and settings.get("num_beams", 1) == 1:
    settings["temperature"] = 0.8
  drawing = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
  searching = ("num_beams", "length_penalty", "early_stopping")
  names = (*drawing, *searching, "seed")
  given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
  if "early_stopping" in given:
    given["early_stopping"] = {"true": True, "false": False}.get(given["early_stopping"], given["early_stopping"])
  if given.get("num_beams", 1) > 1:
    given = {"temperature": 0.0} | given
  elif "temperature" in given:
    given = {"num_beams": 1} | given
  settings |= given
  make_sampling(**{k: settings[k] for k in drawing if k in settings})  # these two only check
  make_settings(**{"num_beams": 1} | {k: settings[k] for k in searching if k in settings})
  return settings


def read_prompt(given: str | None) -> str:
  """The prompt of the command line, or standard input."""
  try:
    prompt = sys.stdin.read() if given is None else given
    prompt.encode()  # bytes of another encoding may have come in as lone surrogates
  except UnicodeError as error:
    raise ConfigError(f"the prompt is not UTF-8: {error}") from error
  return prompt


def fit(
  ids: Any, context: int, max_new_tokens: int | None, separate: bool = False, usual: int = 200
) -> tuple[Any, int]:
  """Prompt and number of new tokens that a context holds; a prompt too long loses its beginning, with a word about it.

  Where `max_new_tokens` is not given, it is at most `usual`, and the prompt may fill half of the context at least; all
  of it where an encoder has a `separate` context for it.
  """
  if len(ids) == 0:
    raise ConfigError("the prompt is empty, and the model knows no token that begins a text; give a prompt")
  if max_new_tokens is not None and not 1 <= max_new_tokens < context:
    reason = "must be at least 1" if max_new_tokens < 1 else f"leaves no room in a context of {context}"
    raise ConfigError(f"--max_new_tokens={max_new_tokens} {reason}")
  room = max(context - usual, (context + 1) // 2) if max_new_tokens is None else context - max_new_tokens
  room = context if separate else room
  if len(ids) > room:
    print(f"llmjax: the prompt has {len(ids)} tokens; only its last {room} are read", file=sys.stderr)
    ids = ids[-room:]
  left = context - (1 if separate else len(ids))
  return ids, min(usual, left) if max_new_tokens is None else max_new_tokens


def continuation(pretrained: Any, ids: Any, count: int, settings: dict[str, Any]) -> Iterator[str]:
  """The text of each new token; of beam search, all of it at once."""
  from llmjax.generation import generate, stream

  model, params, tokenizer = pretrained
  text = tokenizer.stream(special=model.cfg.stacks == "both")  # sentinels say which span is written
  settings = dict(settings)
  ends = settings.pop("eos_id")
  ends = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
  if settings.get("num_beams", 1) > 1:
    found = generate(model, params, ids[None], max_new_tokens=count, eos_id=ends, **settings)
    tokens = iter(found[:, -count:].T)
  else:
    drawn = {k: v for k, v in settings.items() if k not in ("num_beams", "length_penalty", "early_stopping", "pad_id")}
    tokens = stream(model, params, ids[None], max_new_tokens=count, **drawn)
  for token in tokens:
    if int(token[0]) in ends:
      break
    yield text.push(int(token[0]))
  yield text.finish()


def run_embed(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax(arguments)
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


def run_predict(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax(arguments)
  from llmjax.embeddings import BATCH_TOKENS
  from llmjax.predict import predict_file
  from llmjax.sharding import parse_mesh

  names = ("max_new_tokens", "num_beams", "length_penalty")
  written, count, bad = predict_file(
    arguments.model,
    arguments.input,
    arguments.output,
    min_confidence=arguments.min_confidence,
    batch_tokens=BATCH_TOKENS if arguments.batch_tokens is None else arguments.batch_tokens,
    mesh=parse_mesh(arguments.mesh),
    generation={name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None},
    trust=arguments.trust,
  )
  print(f"wrote {arguments.output}: {written:,} lines")
  for error in bad[:SHOWN]:
    print(f"llmjax: {error}", file=sys.stderr)
  if bad:
    more = f" ({len(bad) - SHOWN} more are not shown)" if len(bad) > SHOWN else ""
    raise ConfigError(f"{len(bad)} of {count} lines of {arguments.input} could not be read{more}")


def run_import(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.convert import import_folder

  changes = {} if arguments.param_dtype is None else {"param_dtype": arguments.param_dtype}
  architecture, count = import_folder(arguments.hf, arguments.output, **changes)
  print(f"wrote {arguments.output}: a {architecture} of {count:,} parameters")


def run_export(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.convert import export_adapter, export_folder

  if arguments.adapter:
    settings = {"family": arguments.family, "trust": arguments.trust}
    architecture, base = export_adapter(arguments.model, arguments.output, **settings)
    print(f"wrote {arguments.output}: adapters of a {architecture}, for {base}")
    return
  architecture, files, untokenized = export_folder(
    arguments.model,
    arguments.output,
    family=arguments.family,
    dtype=arguments.dtype,
    max_shard_size=arguments.max_shard_size,
    trust=arguments.trust,
  )
  print(f"wrote {arguments.output}: a {architecture} in {', '.join(files)}")
  if untokenized is not None:
    print(f"llmjax: the folder has no tokenizer: {untokenized}", file=sys.stderr)


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
  print(f"tokenizer     {json.dumps(manifest['tokenizer'] and manifest['tokenizer']['spec'])}")
  print(f"metrics       {json.dumps(manifest['metrics'])}")
  print(f"versions      {json.dumps(manifest['versions'])}")
  if arguments.arrays:
    for name, shape in checkpoints.shapes(step).items():
      print(f"  {name:<64} {list(shape)}")
  checkpoints.close()
