"""What each subcommand takes: flags, help and notes. Imports nothing heavy."""

from __future__ import annotations

import argparse

from llmjax.distributed import processes

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

VERIFY_NOTES = """\
The config, shrunk and in float32, makes its initial parameters, loss, every gradient, held-out metrics and its
parameters after three steps of gradient descent on one device and on each mesh. The exit code is 1 where anything but
rounding differs. A model, objective or optimizer of your own is run as it is.

  llmjax verify --config=gpt:size=nano
  llmjax verify --config=my.py --meshes="data=8;fsdp=2,tensor=4" --processes=2

"""
SWEEP_NOTES = """\
A sweep file has `get_sweep()`, which gives an llmjax.sweeps.trials.Sweep, and `get_config(argument)`, as a config has.
Every trial is a `llmjax train` of its own in WORKDIR/TRIAL; all are checked before any starts. The same command resumes
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


def make_parser() -> argparse.ArgumentParser:
  """All subcommands."""
  main = argparse.ArgumentParser(
    prog="llmjax",
    description=DESCRIPTION,
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)

  def add(name: str, summary: str, notes: str = "") -> argparse.ArgumentParser:
    command = commands.add_parser(
      name,
      help=summary,
      description=summary,
      epilog=notes,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    if name in DISTRIBUTED:
      add_hosts(command)
    return command

  config_notes = (
    "The config is --config=FILE.py[:argument,...], or the name of a shipped one, then overridden key by key:\n"
    "  llmjax train --config=gpt:size=nano --config.optim.lr=3e-3 --config.total_steps='10M tokens'\n"
    "A value of `none` unsets a key. All keys and their defaults: configs/base.py.\n"
  )
  train = add("train", "train a config, or resume it", config_notes)
  train.usage = "llmjax train --config=CONFIG [--config.KEY=VALUE ...] [--workdir=DIR] [--dry_run] [--fresh]"
  train.add_argument("--workdir", help="where the run lives (default: runs/CONFIG)")
  train.add_argument("--dry_run", action="store_true", help="say what would run: parameters, memory, the first batch")
  train.add_argument("--fresh", action="store_true", help="move an earlier run in the workdir aside and start anew")

  add("configs", "list the configs that ship")

  evaluate = add(
    "evaluate",
    "held-out loss and metrics of a run or a model",
    "  llmjax evaluate --config=gpt:size=nano --workdir=runs/gpt-size=nano     the run's own evaluations\n"
    "  llmjax evaluate --model=runs/gpt-size=nano --data=my.txt                any text, JSONL, Parquet or CSV file\n\n"
    + config_notes,
  )
  evaluate.add_argument("--workdir", help="a run of --config")
  evaluate.add_argument("--model", help=PATH_HELP)
  evaluate.add_argument("--data", help="a file or glob; of records the field `text`, or those that the objective names")
  evaluate.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  generate = add("generate", "continue a prompt", GENERATE_NOTES)
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

  embed = add("embed", "vectors of texts, as a NumPy file", EMBED_NOTES)
  embed.add_argument("--model", required=True, help=PATH_HELP)
  embed.add_argument("--input", required=True, help="text, one a line, or JSONL, CSV, TSV or Parquet")
  embed.add_argument("--output", required=True, help="FILE.npy; ids go to FILE.ids.txt")
  embed.add_argument("--pooling", help="cls, mean, last or pooler (default: the checkpoint's, else mean)")
  embed.add_argument("--column", help="the field of a record that is the text (default: text)")
  embed.add_argument("--max_len", type=int, help="tokens of a text; longer ones lose their end (default: as trained)")
  embed.add_argument("--batch_tokens", type=int, help="rows times length of a batch (default: 16384)")
  embed.add_argument("--mesh", default="data=-1", help="devices, such as data=-1,tensor=2 (default: %(default)s)")
  embed.add_argument("--trust", action="store_true", help="allow the checkpoint to run code outside llmjax")

  predict = add("predict", "answers of a fine-tuned model to the records of a JSONL file", PREDICT_NOTES)
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

  verify = add("verify", "whether a config gives the same on every mesh", VERIFY_NOTES + config_notes)
  verify.usage = "llmjax verify --config=CONFIG [--config.KEY=VALUE ...] [--meshes=...] [--processes=...]"
  verify.add_argument(
    "--meshes", help="such as 'data=8;fsdp=2,tensor=4' (default: those that the config can be cut over)"
  )
  verify.add_argument(
    "--processes", default="", help="numbers of processes on this machine to run it in as well, such as 2,4"
  )
  verify.add_argument("--devices", type=int, default=8, help="simulated ones of a CPU (default: %(default)s)")
  verify.add_argument("--worker", help=argparse.SUPPRESS)  # where one of --processes writes what it measured

  sweep = add("sweep", "run the trials of a sweep, or go on with them", SWEEP_NOTES + config_notes)
  sweep.usage = "llmjax sweep --config=FILE [--config.KEY=VALUE ...] --workdir=DIR [--launcher=...] [--max_parallel=N]"
  sweep.add_argument("--workdir", required=True, help="where the sweep lives, with a folder for each trial")
  sweep.add_argument("--launcher", default="local", help="local, slurm, tpu_vm or gke (default: %(default)s)")
  sweep.add_argument("--launcher_flags", default="", help="of launch/LAUNCHER.py, as one text")
  sweep.add_argument("--max_parallel", type=int, default=1, help="trials at a time (default: %(default)s)")
  sweep.add_argument("--trials_in", help="where the workdirs of trials lie instead, such as gs://bucket/x")
  sweep.add_argument("--retry", action="store_true", help="run those that failed once more")
  sweep.add_argument("--dry_run", action="store_true", help="look at all trials and print their commands")
  sweep.add_argument("--admit", help=argparse.SUPPRESS)  # the question of `sweep.admit`, whose answer is the workdir

  import_ = add("import", "a Hugging Face folder to a checkpoint of ours", IMPORT_NOTES)
  import_.add_argument("--hf", required=True, help="a folder, or a hub name such as gpt2 or org/name@revision")
  import_.add_argument("--output", required=True, help="a folder that does not exist yet")
  import_.add_argument("--param_dtype", help="of the parameters: float32 (default), bfloat16 or float16")

  export = add("export", "any model to a folder that Transformers opens", IMPORT_NOTES)
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

  tokenizer = add("tokenizer", "train a SentencePiece vocabulary")
  tokenizer.add_argument("--input", required=True, nargs="+", help="text files or globs")
  tokenizer.add_argument("--vocab_size", type=int, required=True)
  tokenizer.add_argument("--output", required=True, help="FILE.model")

  report = add("report", "draw the curves of a run (PNG and one HTML page) and sum it up")
  report.add_argument("--workdir", required=True)

  checkpoint = add("checkpoint", "look into checkpoints")
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
    "--start_timeout",
    type=float,
    default=processes.START_TIMEOUT,
    help="seconds to wait for the others (default: %(default)g)",
  )
