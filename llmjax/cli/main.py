"""The console script: subcommands, errors as one line, exit codes. Heavy imports happen inside commands."""

from __future__ import annotations

import os
import sys
import traceback

from llmjax.cli import commands, generate
from llmjax.cli.arguments import make_parser
from llmjax.config import ConfigError
from llmjax.distributed import processes
from llmjax.distributed.rendezvous import ProcessGroupError

# Errors of the system that the user can fix; others, such as a broken connection, may pass.
USER_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

COMMANDS = {
  "train": commands.train_command,
  "verify": commands.verify_command,
  "sweep": commands.sweep_command,
  "configs": commands.list_configs,
  "evaluate": commands.evaluate_command,
  "generate": generate.generate_command,
  "embed": commands.embed_command,
  "predict": commands.predict_command,
  "import": commands.import_model,
  "export": commands.export_model,
  "tokenizer": commands.train_tokenizer,
  "report": commands.report_command,
  "checkpoint": commands.inspect_checkpoint,
}
CONFIG_COMMANDS = ("train", "evaluate", "verify", "sweep")  # take --config and --config.KEY


def main(argv: list[str] | None = None) -> int:
  """Run a command and return its exit code.

  The code is 0 for success, 2 for an error that the user can fix, and 130 for an interruption. It is 1 if `verify`
  finds a difference, if a trial of a `sweep` has failed, or if trying again may help.

  One of several processes that fails ends here, with such a code, or 1 for an error that the user cannot fix.
  """
  arguments, rest = make_parser().parse_known_args(argv)
  code, message = 0, ""
  try:
    if rest and arguments.command not in CONFIG_COMMANDS:
      raise ConfigError(f"unknown argument {rest[0]!r}; see `llmjax {arguments.command} --help`")
    code = COMMANDS[arguments.command](arguments, rest) or 0
  except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except ProcessGroupError as error:
    code, message = error.code, str(error) if processes.is_primary_process() else ""
  except (ConfigError, OSError) as error:
    code, message = 2 if isinstance(error, (ConfigError, *USER_ERRORS)) else 1, " ".join(str(error).split())
  except KeyboardInterrupt as error:
    code, message = 130, str(error) or "interrupted"
  except Exception as error:
    if not processes.is_multi_process():
      raise
    code, message = 1, processes.peer_failure_message(error) or traceback.format_exc()
  if code and processes.is_multi_process():
    processes.exit_process(code, message)
  if message:
    print(f"llmjax: {message}", file=sys.stderr)
  return code
