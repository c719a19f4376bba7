"""Chat templates: messages to the text that a model was trained to read, as Hugging Face folders write them in Jinja.

A template is a stranger's program. It runs in Jinja's immutable sandbox, sees only the messages and what is given
beside them, and can neither change them nor reach Python.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.config import ConfigError

# What a message's reasoning is called; templates read the first name, some the second.
REASONING = ("reasoning_content", "thinking", "reasoning")

# For tokenizers without a template, in plain text that any vocabulary has; only bos and eos are special tokens. Every
# message stands below its role, an answer ends with eos: "<|user|>\nHello\n<|assistant|>\nHi!</s>\n".
DEFAULT = (
  "{{ bos_token or '' }}{% for message in messages %}"
  "{{ '<|' + message.role + '|>\n' + message.content }}"
  "{{ (eos_token or '') if message.role == 'assistant' else '' }}{{ '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def render_chat(
  templates: Mapping[str, str],
  messages: Sequence[Mapping[str, Any]],
  *,
  template: str | None = None,
  add_generation_prompt: bool = False,
  tools: Sequence[Mapping[str, Any]] | None = None,
  **variables: Any,
) -> str:
  """The text of a chat, as Transformers' `apply_chat_template` writes it.

  Args:
    templates: {name: Jinja source}. Without `template`, "tool_use" is taken for `tools` where there is one, else
      "default", else the only one.
    messages: {"role": ..., "content": ..., ...} each; keys of value None count as absent.
    template: a name in `templates`, or a Jinja source.
    add_generation_prompt: whether the beginning of the answer follows the messages.
    tools: JSON schemas of functions, for templates that know them.
    variables: what else the template may name, such as bos_token.
  Raises:
    ConfigError: no such template; no messages, or none of the kind; the template refuses them or is none.
  """
  import jinja2

  source = choose_template(templates, template, tools is not None)
  if not messages:
    raise ConfigError("a chat needs at least one message, such as {'role': 'user', 'content': 'Hello'}")
  for number, message in enumerate(messages):
    if not isinstance(message, Mapping) or "role" not in message:
      raise ConfigError(f"message {number} (from 0) must be a dict with 'role' and 'content', got {message!r}")
  given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **variables}
  try:
    return _compile(source).render(messages=[_plain(message) for message in messages], **given)
  except jinja2.TemplateSyntaxError as error:
    raise ConfigError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from error
  except Exception as error:  # a stranger's program may raise any
    raise ConfigError(f"the chat template does not take these messages: {' '.join(str(error).split())}") from error


def choose_template(templates: Mapping[str, str], template: str | None = None, with_tools: bool = False) -> str:
  """The Jinja source that `render` takes."""
  if template is not None:
    if template not in templates and "{" not in template:
      raise ConfigError(f"chat template {template!r} is neither Jinja nor one of: {', '.join(templates) or 'none'}")
    return templates.get(template, template)
  if not templates:
    raise ConfigError(
      "the tokenizer has no chat template; give one as `template`, in Jinja, or write the text yourself"
    )
  wanted = ("tool_use", "default") if with_tools else ("default",)
  found = next((templates[name] for name in wanted if name in templates), None)
  if found is None and len(templates) > 1:
    raise ConfigError(f"the tokenizer has several chat templates; name one as `template`: {', '.join(templates)}")
  return next(iter(templates.values())) if found is None else found


def template_or_default(templates: Mapping[str, str], template: str | None = None) -> str:
  """The Jinja source that `choose` takes, or DEFAULT, as "default", where there are no templates."""
  return choose_template(templates or {"default": DEFAULT}, template)


def token_names(tokenizer: Any) -> dict[str, str]:
  """What templates call a tokenizer's special tokens: {"bos_token": "<s>", ...}."""
  roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "mask": tokenizer.mask_id}
  ours = {f"{role}_token": tokenizer.names[i] for role, i in roles.items() if i is not None and i in tokenizer.names}
  return dict(tokenizer.token_names or ours)


def read_templates(files: Mapping[str, bytes], declared: Any) -> dict[str, str]:
  """{name: Jinja source} of a Hugging Face folder.

  Args:
    files: those of its files that are named chat_template.jinja or additional_chat_templates/NAME.jinja count.
    declared: what its configuration says where there is no such file: a source, or a list of {"name", "template"}.
  """
  names = {
    file: file.removesuffix(".jinja").partition("/")[2] or "default" for file in files if file.endswith(".jinja")
  }
  if names:
    return {name: files[file].decode(errors="replace") for file, name in names.items()}
  if declared is None or isinstance(declared, str):
    return {} if declared is None else {"default": declared}
  try:
    return {entry["name"]: entry["template"] for entry in declared}
  except (TypeError, KeyError) as error:
    raise ConfigError(f"chat_template must be a text, or a list of names and templates, got {declared!r}") from error


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
  said = {key: value for key, value in message.items() if value is not None}
  reasoning = next((said[name] for name in REASONING if name in said), None)
  return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
  """The template, with what Transformers lends to templates."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """{% generation %}, which marks what the assistant wrote, stands for its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

  def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = tojson
  environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
  return environment.from_string(source)
