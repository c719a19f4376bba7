"""The console script: subcommands, errors as one line, exit codes. Heavy imports happen inside commands."""

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

from llmjax.cli.arguments import make_parser
from llmjax.config import ConfigError, values
from llmjax.config import files as cfglib
from llmjax.distributed import processes
from llmjax.distributed.cluster import ENVIRONMENT_VARIABLES
from llmjax.distributed.rendezvous import ProcessGroupError

MAX_SHOWN = 10  # bad lines
# Of the errors of the system, such as a broken connection, those that the user can mend.
USER_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns its exit code: 0, 2 for what the user can mend, 130 when interrupted, and 1 where `verify`
  finds a difference, a trial of a `sweep` has failed, or trying again may help.

  One of several processes that fails ends here, with such a code, or 1 where the user can mend nothing.
  """
  arguments, rest = make_parser().parse_known_args(argv)
  code, said = 0, ""
  try:
    if rest and arguments.command not in ("train", "evaluate", "verify", "sweep"):
      raise ConfigError(f"unknown argument {rest[0]!r}; see `llmjax {arguments.command} --help`")
    code = COMMANDS[arguments.command](arguments, rest) or 0
  except BrokenPipeError:  # the reader, such as `head`, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except ProcessGroupError as error:
    code, said = error.code, str(error) if processes.is_primary_process() else ""
  except (ConfigError, OSError) as error:
    code, said = 2 if isinstance(error, (ConfigError, *USER_ERRORS)) else 1, " ".join(str(error).split())
  except KeyboardInterrupt as error:
    code, said = 130, str(error) or "interrupted"
  except Exception as error:
    if not processes.is_multi_process():
      raise
    code, said = 1, processes.peer_failure_message(error) or traceback.format_exc()
  if code and processes.is_multi_process():
    processes.exit_process(code, said)
  if said:
    print(f"llmjax: {said}", file=sys.stderr)
  return code


def start_jax(arguments: argparse.Namespace | None = None, config: Any = None) -> None:
  """Settings of the process, before JAX is used; joins the other processes of a command that several can run."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import jax
  from absl import flags

  from llmjax.storage.cache import cache_dir

  if not flags.FLAGS.is_parsed():  # grain reads absl's flags
    flags.FLAGS.mark_as_parsed()
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
  if arguments is None:
    return
  processes.join_processes(
    arguments.coordinator,
    arguments.num_processes,
    arguments.process_id,
    timeout=arguments.start_timeout,
    preemptible=arguments.command == "train",
  )

  def facts() -> dict[str, Any]:
    from llmjax.checkpoints.manifest import package_versions

    own = (*ENVIRONMENT_VARIABLES, "start_timeout")
    given = {name: value for name, value in vars(arguments).items() if name not in own}
    return processes.environment_fingerprint() | {
      "versions": package_versions(),
      "flags": given,
      "config": values.to_dict(config or {}),
    }

  processes.preflight(facts)
  if not processes.is_primary_process():
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # what all would say, process 0 says


def run_train(arguments: argparse.Namespace, rest: list[str]) -> None:
  config = cfglib.load_config(rest)
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
  from llmjax.diagnostics import verify

  if arguments.worker:
    processes.join_processes()
    verify.work(config, arguments.meshes, arguments.worker)
    return 0
  meshes = arguments.meshes.split(";") if arguments.meshes else None
  return 0 if verify.verify(config, meshes, counts, rest) else 1


def run_sweep(arguments: argparse.Namespace, rest: list[str]) -> int:
  from llmjax.sweeps import command

  if arguments.admit:
    start_jax()
    command.answer(arguments.admit, arguments.workdir)
    return 0
  names = ("launcher", "launcher_flags", "max_parallel", "trials_in", "retry", "dry_run")
  return 0 if command.sweep(rest, arguments.workdir, **{name: getattr(arguments, name) for name in names}) else 1


def default_workdir(rest: list[str]) -> str:
  """runs/CONFIG, with the config's argument where it has one."""
  i = next(i for i, a in enumerate(rest) if re.match(r"--?config(=|$)", a))
  reference = rest[i].split("=", 1)[1] if "=" in rest[i] else rest[i + 1]
  path, argument = cfglib.find_config_file(reference)
  return str(Path("runs") / re.sub(r"[^\w=.,+-]+", "_", path.stem + ("-" + argument if argument else "")))


def run_configs(arguments: argparse.Namespace, rest: list[str]) -> None:
  for name, path in cfglib.shipped_configs().items():
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
  from llmjax.evaluation.evaluators import evaluate_checkpoint

  for name, value in evaluate_checkpoint(path, config=config, data=arguments.data, trust=arguments.trust).items():
    print(f"{name:<36} {value:.6g}" if isinstance(value, float) else f"{name}:\n{shown(value)}")


def shown(text: str) -> str:
  """What a model writes, as it may go to standard output: a terminal would obey its control characters."""
  from llmjax.telemetry.progress import printable

  return printable(text) if sys.stdout.isatty() else text


def run_generate(arguments: argparse.Namespace, rest: list[str]) -> None:
  if "" in arguments.stop:
    raise ConfigError("--stop is empty; give the text to end before, or leave it out")
  if arguments.system is not None and not arguments.chat:
    raise ConfigError("--system is for --chat; add that, or leave it out")
  start_jax(arguments)
  if arguments.prompt is None and processes.is_multi_process():
    raise ConfigError("several processes cannot share standard input; give --prompt")
  from llmjax.checkpoints.sources import open_path
  from llmjax.data.tokenizers import chat
  from llmjax.distributed import sharding
  from llmjax.inference.generation import encode_prompt, until
  from llmjax.objectives.sft import end_tokens

  with open_path(arguments.model) as source:
    processes.preflight(lambda: {"model": processes.short_digest(source.manifest)})
    settings = generation_settings(source, arguments)
    source.tokenizer(arguments.trust)  # says what is missing
    sizes = arguments.mesh or ("data=-1" if processes.is_multi_process() else None)
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
    choose = (
      chat.template_or_default if learned.get("name") == "sft" else chat.choose_template
    )  # what it has not learned it cannot read
    template = choose(tokenizer.chat_templates, learned.get("template"))
    ids = tokenizer.chat(messages, add_generation_prompt=True, template=template)
    ends = settings.get("eos_id")
    ends = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    settings["eos_id"] = tuple(dict.fromkeys((*ends, *end_tokens(tokenizer, template))))
  else:
    ids = encode_prompt(pretrained.model, tokenizer, prompt)
  ids, count = fit_prompt(ids, config.max_len, arguments.max_new_tokens, separate, settings.pop("max_new_tokens", 200))
  settings = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "start_id": tokenizer.pad_id} | settings
  sys.stdout.write("" if separate or arguments.chat else shown(prompt))
  with contextlib.nullcontext() if mesh is None else sharding.use_mesh(mesh, rules):
    for text in until(continuation(pretrained, ids, count, settings), tuple(arguments.stop)):
      sys.stdout.write(shown(text))
      sys.stdout.flush()
  sys.stdout.write("\n")


def generation_settings(source: Any, arguments: argparse.Namespace) -> dict[str, Any]:
  """Keywords of `generate`: what the command line says, else the model's generation config, else temperature 0.8."""
  from llmjax.inference.beam_search import make_settings
  from llmjax.inference.sampling import make_sampling
  from llmjax.interop.generation_config import read_settings

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


def fit_prompt(
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
  from llmjax.inference.generation import generate, stream

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
  from llmjax.distributed.sharding import parse_mesh
  from llmjax.inference.embeddings import BATCH_TOKENS, embed_file

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
  from llmjax.distributed.sharding import parse_mesh
  from llmjax.inference.embeddings import BATCH_TOKENS
  from llmjax.inference.predict import predict_file

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
  for error in bad[:MAX_SHOWN]:
    print(f"llmjax: {error}", file=sys.stderr)
  if bad:
    more = f" ({len(bad) - MAX_SHOWN} more are not shown)" if len(bad) > MAX_SHOWN else ""
    raise ConfigError(f"{len(bad)} of {count} lines of {arguments.input} could not be read{more}")


def run_import(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.checkpoints.convert import import_folder

  changes = {} if arguments.param_dtype is None else {"param_dtype": arguments.param_dtype}
  architecture, count = import_folder(arguments.hf, arguments.output, **changes)
  print(f"wrote {arguments.output}: a {architecture} of {count:,} parameters")


def run_export(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.checkpoints.convert import export_adapter, export_folder

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
  from llmjax.data.sources.base import SOURCES
  from llmjax.data.tokenizers.base import sample_text_lines
  from llmjax.data.tokenizers.sentencepiece import train_sentencepiece

  source = build({"name": "text", "files": tuple(arguments.input)}, SOURCES, "--input", split="train")
  model = train_sentencepiece(sample_text_lines(source), arguments.vocab_size)
  Path(arguments.output).write_bytes(model)
  print(f"wrote {arguments.output}: use it with --config.data.tokenizer.path={arguments.output}")


def run_report(arguments: argparse.Namespace, rest: list[str]) -> None:
  from llmjax.reporting.report import summary, write_report

  write_report(arguments.workdir)
  print(summary(arguments.workdir))


def run_checkpoint(arguments: argparse.Namespace, rest: list[str]) -> None:
  start_jax()
  from llmjax.checkpoints.sources import open_checkpoint

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


COMMANDS = {
  "train": run_train,
  "verify": run_verify,
  "sweep": run_sweep,
  "configs": run_configs,
  "evaluate": run_evaluate,
  "generate": run_generate,
  "embed": run_embed,
  "predict": run_predict,
  "import": run_import,
  "export": run_export,
  "tokenizer": run_tokenizer,
  "report": run_report,
  "checkpoint": run_checkpoint,
}
