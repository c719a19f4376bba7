"""The commands whose logic is elsewhere: they read flags, call the library, and print. Heavy imports happen inside."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from llmjax.cli.startup import start_jax
from llmjax.config import ConfigError, find_config_file, load_config, shipped_configs
from llmjax.distributed import processes

MAX_SHOWN = 10  # unreadable lines that `predict` prints


def train_command(arguments: argparse.Namespace, rest: list[str]) -> None:
  config = load_config(rest)
  start_jax(arguments, config)
  if arguments.dry_run:
    from llmjax.diagnostics.dry_run import dry_run

    print(dry_run(config))
    return
  from llmjax.training.loop import run
  from llmjax.training.step_metrics import DivergenceError

  try:
    run(config, arguments.workdir or default_workdir(rest), fresh=arguments.fresh)
  except DivergenceError as error:
    raise ConfigError(str(error)) from error


def default_workdir(rest: list[str]) -> str:
  """Return runs/CONFIG, with the config's argument if it has one."""
  i = next(i for i, flag in enumerate(rest) if re.match(r"--?config(=|$)", flag))
  reference = rest[i].split("=", 1)[1] if "=" in rest[i] else rest[i + 1]
  path, argument = find_config_file(reference)
  return str(Path("runs") / re.sub(r"[^\w=.,+-]+", "_", path.stem + ("-" + argument if argument else "")))


def verify_command(arguments: argparse.Namespace, rest: list[str]) -> int:
  config = load_config(rest)
  if not re.fullmatch(r"(\d+(,\d+)*)?", arguments.processes):
    raise ConfigError(f"--processes={arguments.processes} must be numbers, such as 2,4")
  counts = [int(count) for count in arguments.processes.split(",") if count]
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compilation takes most of the time
  import jax

  jax.config.update("jax_num_cpu_devices", arguments.devices)
  jax.config.update("jax_default_matmul_precision", "highest")
  start_jax()
  from llmjax.diagnostics.local_processes import write_measurement
  from llmjax.diagnostics.verify import verify

  if arguments.worker:
    processes.join_processes()
    write_measurement(config, arguments.meshes, arguments.worker)
    return 0
  meshes = arguments.meshes.split(";") if arguments.meshes else None
  return 0 if verify(config, meshes, counts, rest) else 1


def sweep_command(arguments: argparse.Namespace, rest: list[str]) -> int:
  from llmjax.sweeps.command import run_sweep
  from llmjax.sweeps.preflight import check_request

  if arguments.admit:
    start_jax()
    check_request(arguments.admit, arguments.workdir)
    return 0
  names = ("launcher", "launcher_flags", "max_parallel", "trials_in", "retry", "dry_run")
  return 0 if run_sweep(rest, arguments.workdir, **{name: getattr(arguments, name) for name in names}) else 1


def list_configs(arguments: argparse.Namespace, rest: list[str]) -> None:
  for name, path in shipped_configs().items():
    summary = path.read_text(encoding="utf-8").split('"""')[1].strip().splitlines()[0]
    print(f"{name:<12} {summary}")


def evaluate_command(arguments: argparse.Namespace, rest: list[str]) -> None:
  if arguments.model and arguments.data and not (rest or arguments.workdir):
    config, path = None, arguments.model
  elif rest and arguments.workdir and not (arguments.model or arguments.data):
    config, path = load_config(rest), arguments.workdir
  else:
    raise ConfigError("evaluate takes --config=... --workdir=DIR, or --model=PATH --data=FILE")
  start_jax(arguments, config)
  from llmjax.evaluation.checkpoint import evaluate_checkpoint

  for name, value in evaluate_checkpoint(path, config=config, data=arguments.data, trust=arguments.trust).items():
    print(f"{name:<36} {value:.6g}" if isinstance(value, float) else f"{name}:\n{terminal_text(value)}")


def terminal_text(text: str) -> str:
  """Return a model's text for standard output; a terminal would obey its control characters, so they are replaced."""
  from llmjax.telemetry.progress import replace_control_characters

  return replace_control_characters(text) if sys.stdout.isatty() else text


def embed_command(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax(arguments)
  from llmjax.distributed.sharding import parse_mesh
  from llmjax.inference.batches import BATCH_TOKENS
  from llmjax.inference.embed_file import embed_file

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


def predict_command(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax(arguments)
  from llmjax.distributed.sharding import parse_mesh
  from llmjax.inference.batches import BATCH_TOKENS
  from llmjax.inference.predict_file import predict_file

  names = ("max_new_tokens", "num_beams", "length_penalty")
  num_written, num_lines, errors = predict_file(
    arguments.model,
    arguments.input,
    arguments.output,
    min_confidence=arguments.min_confidence,
    batch_tokens=BATCH_TOKENS if arguments.batch_tokens is None else arguments.batch_tokens,
    mesh=parse_mesh(arguments.mesh),
    generation={name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None},
    trust=arguments.trust,
  )
  print(f"wrote {arguments.output}: {num_written:,} lines")
  for error in errors[:MAX_SHOWN]:
    print(f"llmjax: {error}", file=sys.stderr)
  if errors:
    more = f" ({len(errors) - MAX_SHOWN} more are not shown)" if len(errors) > MAX_SHOWN else ""
    raise ConfigError(f"{len(errors)} of {num_lines} lines of {arguments.input} could not be read{more}")


def import_model(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.checkpoints.convert import import_folder

  changes = {} if arguments.param_dtype is None else {"param_dtype": arguments.param_dtype}
  architecture, count = import_folder(arguments.hf, arguments.output, **changes)
  print(f"wrote {arguments.output}: a {architecture} of {count:,} parameters")


def export_model(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.checkpoints.convert import export_adapter, export_folder

  if arguments.adapter:
    settings = {"family": arguments.family, "trust": arguments.trust}
    architecture, base = export_adapter(arguments.model, arguments.output, **settings)
    print(f"wrote {arguments.output}: adapters of a {architecture}, for {base}")
    return
  architecture, files, missing_tokenizer = export_folder(
    arguments.model,
    arguments.output,
    family=arguments.family,
    dtype=arguments.dtype,
    max_shard_size=arguments.max_shard_size,
    trust=arguments.trust,
  )
  print(f"wrote {arguments.output}: a {architecture} in {', '.join(files)}")
  if missing_tokenizer is not None:
    print(f"llmjax: the folder has no tokenizer: {missing_tokenizer}", file=sys.stderr)


def train_tokenizer(arguments: argparse.Namespace, rest: list[str]) -> None:
  from llmjax.config import build
  from llmjax.data.sources.registry import SOURCES
  from llmjax.data.tokenizers.sentencepiece import train_sentencepiece
  from llmjax.data.tokenizers.training_text import sample_training_texts

  source = build({"name": "text", "files": tuple(arguments.input)}, SOURCES, "--input", split="train")
  Path(arguments.output).write_bytes(train_sentencepiece(sample_training_texts(source), arguments.vocab_size))
  print(f"wrote {arguments.output}: use it with --config.data.tokenizer.path={arguments.output}")


def report_command(arguments: argparse.Namespace, rest: list[str]) -> None:
  from llmjax.reporting.report import summary, write_report

  write_report(arguments.workdir)
  print(summary(arguments.workdir))


def inspect_checkpoint(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.checkpoints.sources.run import open_checkpoint

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
    for name, shape in checkpoints.parameter_shapes(step).items():
      print(f"  {name:<64} {list(shape)}")
  checkpoints.close()
