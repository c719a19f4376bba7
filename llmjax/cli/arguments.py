"""Flags and help of every subcommand. Imports nothing heavy."""

from __future__ import annotations

import argparse

from llmjax.distributed import processes

DESCRIPTION = "Train, evaluate and use Transformers in JAX."
EXAMPLES = """\
start here:
  llmjax configs                                        list the configs that can be run
  llmjax train --config=gpt:size=nano                   train on Python's own library, no download
  llmjax train --config=gpt:size=nano,text=my.txt       train on your text
  llmjax generate --model=runs/gpt-size=nano --prompt="def main("
  llmjax report --workdir=runs/gpt-size=nano            curves and samples as one page
  llmjax train --config=classify:init_from=PATH,train=my.csv,text=review,label=stars

`llmjax COMMAND --help` describes each command.
"""

PATH_HELP = "a workdir, WORKDIR/checkpoints/STEP or /best, a Hugging Face folder, or a hub name such as gpt2"

CONFIG_NOTES = """\
The config is --config=FILE.py[:argument,...], or the name of a shipped one. Keys are overridden one by one:
  llmjax train --config=gpt:size=nano --config.optim.lr=3e-3 --config.total_steps='10M tokens'
A value of `none` unsets a key. All keys and their defaults are in llmjax/config/defaults.py, those of the model in
llmjax/config/model.py.
"""

EVALUATE_NOTES = """\
  llmjax evaluate --config=gpt:size=nano --workdir=runs/gpt-size=nano     the run's own evaluations
  llmjax evaluate --model=runs/gpt-size=nano --data=my.txt                any text, JSONL, Parquet or CSV file

"""

GENERATE_NOTES = """\
Without --prompt, the prompt is read from standard input. Settings that are not given are those of the model's
generation config.

  llmjax generate --model=gpt2 --prompt="Once upon a time"
  llmjax generate --model=DIR --chat --prompt="Who wrote Emma?"
"""

IMPORT_NOTES = """\
Every command takes a Hugging Face folder or hub name as --model. Import a model only to keep it as a checkpoint of
llmjax.

  llmjax import --hf=gpt2 --output=runs/gpt2
  llmjax export --model=runs/gpt2 --output=gpt2-again
"""

PREDICT_NOTES = """\
Reads the fields that the model was trained on (text; tokens; question and context; source; messages). Writes labels
with their probabilities, tags with spans, answers with their positions, or texts. A record's field `id` is copied. A
line that cannot be read becomes {"line": its number, "error": why}, and the exit code is 2.

  llmjax predict --model=runs/classify --input=reviews.jsonl --output=labels.jsonl
  llmjax predict --model=runs/classify --input=more.jsonl --output=sure.jsonl --min_confidence=0.95
"""

VERIFY_NOTES = """\
The config, shrunk and in float32, runs on one device and on each mesh. Initial parameters, loss, every gradient,
held-out metrics, and the parameters after three steps of gradient descent are compared. The exit code is 1 if they
differ by more than rounding. A model, objective or optimizer of your own is run as it is.

  llmjax verify --config=gpt:size=nano
  llmjax verify --config=my.py --meshes="data=8;fsdp=2,tensor=4" --processes=2

"""

SWEEP_NOTES = """\
A sweep file has `get_sweep()`, which returns a llmjax.sweeps.trials.Sweep, and `get_config(argument)`, like a config
file. Every trial is a `llmjax train` of its own in WORKDIR/TRIAL; all are checked before any starts. The same command
resumes an interrupted sweep, and writes sweep.html, sweep.png, results.csv and results.parquet.

  llmjax sweep --config=experiments/optimizers/sweep.py --workdir=runs/optimizers --max_parallel=2
  llmjax sweep --config=my_sweep.py --workdir=/shared/x --launcher=slurm --launcher_flags="--gpus_per_node=1"
  llmjax sweep --config=my_sweep.py --workdir=x --launcher=tpu_vm --trials_in=gs://bucket/x \\
    --launcher_flags="--zone=us-central1-a --type=v5litepod-8 --spot" --max_parallel=4

"""

EMBED_NOTES = """\
The array is float32 [texts, width], in the order of the input. Each row has length 1, so that the product of two rows
is their cosine. FILE.ids.txt has one line per text: the record's field `id` if it has one, else its number from 0.
An empty line or text is an error.

  llmjax embed --model=runs/x --input=queries.txt --output=queries.npy
  llmjax embed --model=runs/x --input=docs.jsonl --column=abstract --output=docs.npy
"""


class _Commands:
  """The subcommands of a parser."""

  def __init__(self, parser: argparse.ArgumentParser) -> None:
    self._commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

  def add(self, name: str, summary: str, notes: str = "") -> argparse.ArgumentParser:
    return self._commands.add_parser(
      name,
      help=summary,
      description=summary,
      epilog=notes,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of all subcommands."""
  parser = argparse.ArgumentParser(
    prog="llmjax",
    description=DESCRIPTION,
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = _Commands(parser)
  _add_train(commands)
  commands.add("configs", "list the configs that ship with llmjax")
  _add_evaluate(commands)
  _add_generate(commands)
  _add_embed(commands)
  _add_predict(commands)
  _add_verify(commands)
  _add_sweep(commands)
  _add_import_and_export(commands)
  _add_tokenizer(commands)
  report = commands.add("report", "draw the curves of a run (PNG and one HTML page) and summarise it")
  report.add_argument("--workdir", required=True)
  checkpoint = commands.add("checkpoint", "inspect checkpoints")
  checkpoint.add_argument("action", choices=["inspect"], help="inspect: print what a checkpoint contains")
  checkpoint.add_argument("path", help="a workdir or one of its checkpoints")
  checkpoint.add_argument("--arrays", action="store_true", help="list every array with its shape")
  return parser


def _add_train(commands: _Commands) -> None:
  train = commands.add("train", "train a config, or resume it", CONFIG_NOTES)
  train.usage = "llmjax train --config=CONFIG [--config.KEY=VALUE ...] [--workdir=DIR] [--dry_run] [--fresh]"
  train.add_argument("--workdir", help="folder of the run (default: runs/CONFIG)")
  train.add_argument("--dry_run", action="store_true", help="only print parameters, memory and the first batch")
  train.add_argument("--fresh", action="store_true", help="archive an earlier run in the workdir, and start a new one")
  _add_process_flags(train)


def _add_evaluate(commands: _Commands) -> None:
  evaluate = commands.add("evaluate", "held-out loss and metrics of a run or a model", EVALUATE_NOTES + CONFIG_NOTES)
  evaluate.add_argument("--workdir", help="a run of --config")
  evaluate.add_argument("--model", help=PATH_HELP)
  evaluate.add_argument("--data", help="a file or glob; records have the field `text`, or those of the objective")
  _add_trust(evaluate)
  _add_process_flags(evaluate)


def _add_generate(commands: _Commands) -> None:
  generate = commands.add("generate", "continue a prompt", GENERATE_NOTES)
  add = generate.add_argument
  _add_model(generate)
  add("--prompt", help="text to continue")
  add("--chat", action="store_true", help="the prompt is a user's message, formatted by the chat template")
  add("--system", help="with --chat: the system message")
  add("--max_new_tokens", type=int, help="default: 200, or what the model's context has room for")
  add("--temperature", type=float, help="0 is greedy (default: 0.8; with --num_beams 0)")
  add("--top_k", type=int, help="sample from the k most probable tokens")
  add("--top_p", type=float, help="sample from the most probable tokens that sum to p")
  add("--min_p", type=float, help="exclude tokens with less than p times the highest probability")
  add("--repetition_penalty", type=float, help="above 1 discourages repetition")
  add("--num_beams", type=int, help="above 1: beam search, which prints its text at the end")
  add("--length_penalty", type=float, help="of beam search; above 0 favours longer texts (default: 1)")
  add("--early_stopping", choices=["true", "false", "never"], help="when beam search ends (default: false)")
  add("--stop", action="append", default=[], help="end before this text; may be repeated")
  add("--seed", type=int, default=0)
  add("--mesh", help="devices that share the parameters, such as tensor=4 (default: one device)")
  _add_trust(generate)
  _add_process_flags(generate)


def _add_embed(commands: _Commands) -> None:
  embed = commands.add("embed", "embeddings of texts, as a NumPy file", EMBED_NOTES)
  _add_model(embed)
  embed.add_argument("--input", required=True, help="text, one per line, or JSONL, CSV, TSV or Parquet")
  embed.add_argument("--output", required=True, help="FILE.npy; ids are written to FILE.ids.txt")
  embed.add_argument("--pooling", help="cls, mean, last or pooler (default: the checkpoint's, else mean)")
  embed.add_argument("--column", help="field of a record that is the text (default: text)")
  embed.add_argument("--max_len", type=int, help="tokens of a text; longer ones are truncated (default: as trained)")
  _add_batch_and_mesh(embed)
  _add_trust(embed)
  _add_process_flags(embed)


def _add_predict(commands: _Commands) -> None:
  predict = commands.add("predict", "answers of a fine-tuned model to the records of a JSONL file", PREDICT_NOTES)
  add = predict.add_argument
  _add_model(predict)
  add("--input", required=True, help="FILE.jsonl, with the fields that the model was trained on")
  add("--output", required=True, help="FILE.jsonl, one line for every line of the input")
  add("--min_confidence", type=float, help="write only answers with at least this confidence, with their input")
  add("--max_new_tokens", type=int, help="of a generated text (default: as in training)")
  add("--num_beams", type=int, help="beam search with this many beams")
  add("--length_penalty", type=float, help="of beam search: scores are divided by length to this power")
  _add_batch_and_mesh(predict)
  _add_trust(predict)
  _add_process_flags(predict)


def _add_verify(commands: _Commands) -> None:
  verify = commands.add(
    "verify", "check that a config gives the same results on every mesh", VERIFY_NOTES + CONFIG_NOTES
  )
  verify.usage = "llmjax verify --config=CONFIG [--config.KEY=VALUE ...] [--meshes=...] [--processes=...]"
  verify.add_argument("--meshes", help="such as 'data=8;fsdp=2,tensor=4' (default: all that divide the config)")
  verify.add_argument("--processes", default="", help="also run in this many processes on this machine, such as 2,4")
  verify.add_argument("--devices", type=int, default=8, help="simulated devices of a CPU (default: %(default)s)")
  verify.add_argument("--worker", help=argparse.SUPPRESS)  # where one of --processes writes its measurements


def _add_sweep(commands: _Commands) -> None:
  sweep = commands.add("sweep", "run the trials of a sweep, or resume it", SWEEP_NOTES + CONFIG_NOTES)
  sweep.usage = "llmjax sweep --config=FILE [--config.KEY=VALUE ...] --workdir=DIR [--launcher=...] [--max_parallel=N]"
  sweep.add_argument("--workdir", required=True, help="folder of the sweep, with a folder for each trial")
  sweep.add_argument("--launcher", default="local", help="local, slurm, tpu_vm or gke (default: %(default)s)")
  sweep.add_argument("--launcher_flags", default="", help="flags of launch/LAUNCHER.py, as one text")
  sweep.add_argument("--max_parallel", type=int, default=1, help="trials at a time (default: %(default)s)")
  sweep.add_argument("--trials_in", help="folder for the workdirs of trials instead, such as gs://bucket/x")
  sweep.add_argument("--retry", action="store_true", help="run trials that failed once more")
  sweep.add_argument("--dry_run", action="store_true", help="check all trials and print their commands")
  sweep.add_argument("--admit", help=argparse.SUPPRESS)  # file with the trials to check; the answer goes to --workdir


def _add_import_and_export(commands: _Commands) -> None:
  importer = commands.add("import", "convert a Hugging Face folder to a checkpoint of llmjax", IMPORT_NOTES)
  importer.add_argument("--hf", required=True, help="a folder, or a hub name such as gpt2 or org/name@revision")
  importer.add_argument("--output", required=True, help="a folder that does not exist yet")
  importer.add_argument("--param_dtype", help="of the parameters: float32 (default), bfloat16 or float16")

  export = commands.add("export", "convert any model to a folder that Transformers opens", IMPORT_NOTES)
  add = export.add_argument
  _add_model(export)
  add("--output", required=True, help="a folder that does not exist yet")
  add("--family", help="the model_type, if several have the model's shape (default: that of its origin)")
  add("--dtype", help="of the tensors: float32, bfloat16 or float16 (default: that of the parameters)")
  add("--adapter", action="store_true", help="only the adapters, as PEFT reads them (default: merged into the model)")
  add("--max_shard_size", default="5GB", help="maximum size of a file (default: %(default)s)")
  _add_trust(export)


def _add_tokenizer(commands: _Commands) -> None:
  tokenizer = commands.add("tokenizer", "train a SentencePiece vocabulary")
  tokenizer.add_argument("--input", required=True, nargs="+", help="text files or globs")
  tokenizer.add_argument("--vocab_size", type=int, required=True)
  tokenizer.add_argument("--output", required=True, help="FILE.model")


def _add_model(command: argparse.ArgumentParser) -> None:
  command.add_argument("--model", required=True, help=PATH_HELP)


def _add_trust(command: argparse.ArgumentParser) -> None:
  command.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")


def _add_batch_and_mesh(command: argparse.ArgumentParser) -> None:
  command.add_argument("--batch_tokens", type=int, help="rows times length of a batch (default: 16384)")
  command.add_argument("--mesh", default="data=-1", help="devices, such as data=-1,tensor=2 (default: %(default)s)")


def _add_process_flags(command: argparse.ArgumentParser) -> None:
  """Add the flags of a command that several processes can run together."""
  group = command.add_argument_group(
    "several processes", "detected on TPU VMs, SLURM and Kubernetes; elsewhere each process is started with these flags"
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (or LLMJAX_COORDINATOR)")
  group.add_argument("--num_processes", metavar="N", help="1: a single process in any case (or LLMJAX_NUM_PROCESSES)")
  group.add_argument("--process_id", metavar="I", help="index of this process, from 0 (or LLMJAX_PROCESS_ID)")
  group.add_argument(
    "--start_timeout",
    type=float,
    default=processes.START_TIMEOUT,
    help="seconds to wait for the other processes (default: %(default)g)",
  )
