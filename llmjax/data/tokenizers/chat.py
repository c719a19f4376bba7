"""Chat templates: Jinja sources of Hugging Face folders that format messages as the text a model was trained on.

A template is untrusted code. It runs in Jinja's immutable sandbox: it gets only the messages and its variables, and can
neither change them nor reach Python.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from llmjax.config import ConfigError

if TYPE_CHECKING:
  import jinja2

Message: TypeAlias = Mapping[str, Any]  # {"role": ..., "content": ..., ...}

# Keys of a message's reasoning in different data sets; templates use the first, some the second.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# For tokenizers without a template. Everything but bos and eos is plain text, which any vocabulary can encode. Each
# message follows its role, an answer ends with eos: "<|user|>\nHello\n<|assistant|>\nHi!</s>\n".
DEFAULT_TEMPLATE = (
  "{{ bos_token or '' }}{% for message in messages %}"
  "{{ '<|' + message.role + '|>\n' + message.content }}"
  "{{ (eos_token or '') if message.role == 'assistant' else '' }}{{ '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def render_chat(
  templates: Mapping[str, str],
  messages: Sequence[Message],
  *,
  template: str | None = None,
  add_generation_prompt: bool = False,
  tools: Sequence[Mapping[str, Any]] | None = None,
  **variables: object,
) -> str:
  """Return the text of a chat, equal to that of Transformers' `apply_chat_template`.

  Args:
    templates: {name: Jinja source}.
    messages: each has a "role" and usually a "content"; keys with value None are removed.
    template: a name in `templates`, or a Jinja source; None: see `choose_template`.
    add_generation_prompt: whether to append the start of an answer.
    tools: JSON schemas of functions, for templates that support them.
    variables: further variables of the template, such as bos_token.

  Raises:
    ConfigError: the template does not exist or is not valid, there are no messages, or the template refuses them.
  """
  import jinja2

  source = choose_template(templates, template, has_tools=tools is not None)
  if not messages:
    raise ConfigError("messages: empty. A chat needs at least one, such as {'role': 'user', 'content': 'Hello'}")
  for number, message in enumerate(messages):
    if not isinstance(message, Mapping) or "role" not in message:
      raise ConfigError(f"message {number} (from 0): must be a dict with 'role' and 'content', got {message!r}")
  given = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **variables}
  try:
    return _compile_template(source).render(messages=list(map(_prepare_message, messages)), **given)
  except jinja2.TemplateSyntaxError as error:
    raise ConfigError(
      f"chat template: not valid Jinja, line {error.lineno}: {error.message}. Fix the template"
    ) from error
  except Exception as error:  # a template may raise anything
    reason = " ".join(str(error).split())
    raise ConfigError(
      f"chat template: refuses these messages: {reason}. Change the messages or the template"
    ) from error


def choose_template(templates: Mapping[str, str], template: str | None = None, has_tools: bool = False) -> str:
  """Return the Jinja source of a template.

  Args:
    templates: {name: Jinja source}.
    template: a name in `templates`, or a Jinja source. None: with tools "tool_use" if it exists, else "default", else
      the only template.
    has_tools: whether the chat has tools.

  Raises:
    ConfigError: the template does not exist, or several may be meant.
  """
  if template is not None:
    if template not in templates and "{" not in template:
      raise ConfigError(
        f"chat template: must be Jinja or one of {', '.join(templates) or 'none'}, got {template!r}. Choose one of them"
      )
    return templates.get(template, template)
  if not templates:
    raise ConfigError("chat template: the tokenizer has none. Give one in Jinja as `template`, or write plain text")
  for name in ("tool_use", "default") if has_tools else ("default",):
    if name in templates:
      return templates[name]
  if len(templates) > 1:
    raise ConfigError(f"chat template: the tokenizer has several. Name one as `template`: {', '.join(templates)}")
  return next(iter(templates.values()))


def template_or_default(templates: Mapping[str, str], template: str | None = None) -> str:
  """Return the result of `choose_template`; without templates, DEFAULT_TEMPLATE is the one named "default"."""
  return choose_template(templates or {"default": DEFAULT_TEMPLATE}, template)


def read_chat_templates(files: Mapping[str, bytes], declared: object) -> dict[str, str]:
  """Return {name: Jinja source} of a Hugging Face folder.

  Args:
    files: files of the folder, of which chat_template.jinja and additional_chat_templates/NAME.jinja are used.
    declared: value of "chat_template" in the folder's configuration, used if there are no such files: None, a source,
      or a list of {"name", "template"}.
  """
  names = {
    file: file.removesuffix(".jinja").partition("/")[2] or "default" for file in files if file.endswith(".jinja")
  }
  if names:
    return {name: files[file].decode(errors="replace") for file, name in names.items()}
  if declared is None or isinstance(declared, str):
    return {} if declared is None else {"default": declared}
  try:
    return {entry["name"]: entry["template"] for entry in declared}  # type: ignore[attr-defined]
  except (TypeError, KeyError) as error:
    raise ConfigError(
      f"chat_template: must be a text, or a list of names and templates, got {declared!r}. Fix the folder's files"
    ) from error


def _prepare_message(message: Message) -> dict[str, Any]:
  """Remove keys of value None, and give reasoning under both names that templates use."""
  prepared = {key: value for key, value in message.items() if value is not None}
  reasoning = next((prepared[key] for key in REASONING_KEYS if key in prepared), None)
  return prepared if reasoning is None else {"thinking": reasoning, **prepared, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=32)
def _compile_template(source: str) -> jinja2.Template:
  """Compile a template with the extensions and functions that Transformers provides."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """Support {% generation %}, which marks the text of the assistant, as a block without effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Scope:
      line = next(parser.stream).lineno
      return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

  def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    """Return JSON; Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = tojson
  environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
  return environment.from_string(source)
