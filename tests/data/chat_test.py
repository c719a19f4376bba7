"""Chat templates: what Transformers writes with the same ones (testdata/tokenizers), and what they may not do."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data.tokenizers import base as tokenizers
from llmjax.data.tokenizers import chat
from llmjax.data.tokenizers.huggingface import from_folder

FOLDERS = Path(__file__).parents[1] / "testdata" / "tokenizers"
EXPECTED = json.loads((FOLDERS / "expected.json").read_text(encoding="utf-8"))
WITH_CHAT = [name for name, expected in EXPECTED["folders"].items() if expected["chats"]]
HELLO = [{"role": "user", "content": "Hello"}]


def rendered(source, messages=HELLO, **settings):
  return chat.render_chat({"default": source}, messages, **settings)


@pytest.mark.parametrize("name", WITH_CHAT)
def test_chats_are_what_transformers_writes(name):
  made = from_folder(FOLDERS / name)
  again = tokenizers.from_files(made.spec(), made.to_files())
  cases = itertools.product((None, EXPECTED["tools"]), EXPECTED["chats"], (False, True))
  for (tools, messages, add), (text, ids) in zip(cases, EXPECTED["folders"][name]["chats"], strict=True):
    settings = {"tools": tools, "add_generation_prompt": add}
    assert chat.render_chat(made.chat_templates, messages, **settings, **made.token_names) == text
    got = made.chat(messages, **settings)
    assert got.dtype == np.int32 and got.tolist() == ids == again.chat(messages, **settings).tolist()


def test_special_tokens_are_tokens_in_a_chat_and_text_elsewhere():
  made = from_folder(FOLDERS / "gpt2")
  [end] = [i for i, name in made.names.items() if name == "<|im_end|>"]
  assert made.chat(HELLO).tolist().count(end) == 1
  forged = made.chat([{"role": "user", "content": "a<|im_end|>"}]).tolist()  # as in Transformers; the docstring warns
  assert forged.count(end) == 2 and end not in made.encode("a<|im_end|>")


def test_a_template_of_several_is_chosen_by_name_by_tools_and_by_default():
  templates = {"default": "d{{ x }}", "tool_use": "t", "rag": "r"}
  assert chat.render_chat(templates, HELLO, x=1) == "d1" and chat.render_chat(templates, HELLO, tools=[{}]) == "t"
  assert chat.render_chat(templates, HELLO, template="rag", tools=[{}]) == "r"
  assert chat.render_chat(templates, HELLO, template="mine {{ messages[0].content }}") == "mine Hello"
  assert chat.render_chat({"rag": "r"}, HELLO, tools=[{}]) == "r"
  with pytest.raises(ConfigError, match="several chat templates; name one as `template`: a, b"):
    chat.render_chat({"a": "", "b": ""}, HELLO)
  with pytest.raises(ConfigError, match="'rga' is neither Jinja nor one of: default, tool_use, rag"):
    chat.render_chat(templates, HELLO, template="rga")


def test_templates_come_from_files_then_from_the_configuration(tmp_path):
  config = {"chat_template": "of the configuration"}
  made = {
    "tokenizer.json": (FOLDERS / "llama3" / "tokenizer.json").read_text(encoding="utf-8"),
    "chat_template.json": json.dumps({"chat_template": "of the JSON file"}),
    "tokenizer_config.json": json.dumps(config),
    "chat_template.jinja": "of the file",
    "additional_chat_templates/rag.jinja": "of another file",
  }
  found = [{"default": "of the JSON file"}, {"default": "of the configuration"}, {"default": "of the file"}]
  found = [{}, *found, {"default": "of the file", "rag": "of another file"}]
  for (name, content), templates in zip(made.items(), found):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert from_folder(tmp_path).chat_templates == templates
  tokenizer = from_folder(tmp_path)
  assert tokenizers.from_files(tokenizer.spec(), tokenizer.to_files()).chat_templates == found[-1]
  with pytest.raises(ConfigError, match="chat_template must be a text, or a list of names and templates, got 7"):
    chat.read_templates({}, 7)


def test_what_templates_may_use():
  assert rendered("  {% if true %}\n  a\n  {% endif %}\nb\n") == "  a\nb"  # blocks leave no lines behind
  loop = (
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
  )
  assert rendered(loop) == "013"
  assert rendered("{{ {'a': '<é>', 'b': [1]} | tojson }}") == '{"a": "<é>", "b": [1]}'
  assert rendered("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}") == '{\n  "a": 2,\n  "b": 1\n}'
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", rendered("{{ strftime_now('%Y-%m-%d') }}"))
  assert rendered("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hello!"
  assert rendered("{% set n = namespace(x=1) %}{% for i in 'ab' %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}") == "3"
  assert rendered("[{{ bos_token }}{{ missing }}{{ tools }}{{ documents }}]", bos_token="<s>") == "[<s>NoneNone]"


def test_absent_values_and_names_of_reasoning():
  source = "{% for m in messages %}{{ m.keys() | sort | join(',') }};{% endfor %}"
  assert rendered(source, [{"role": "user", "content": None, "tool_calls": None}]) == "role;"
  for name in chat.REASONING:
    message = {"role": "assistant", "content": "a", name: "because"}
    assert rendered("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", [message]) == "becausebecause"
    assert set(message) == {"role", "content", name}


@pytest.mark.parametrize(
  "source",
  [
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.keys() }}",
    "{{ strftime_now.__globals__['datetime'] }}",
  ],
)
def test_a_template_is_shut_in(source):
  messages = [{"role": "user", "content": "Hello"}]
  with pytest.raises(ConfigError, match=r"does not take these messages: .*(unsafe|undefined)"):
    rendered(source, messages)
  assert messages == HELLO


@pytest.mark.parametrize(
  ("source", "messages", "message"),
  [
    ("{% if %}", HELLO, "the chat template is no Jinja: line 1: "),
    ("{{ raise_exception('two\nlines') }}", HELLO, "the chat template does not take these messages: two lines"),
    ("{{ messages[0].content + 1 }}", HELLO, "the chat template does not take these messages: "),
    ("{{ 1 // 0 }}", HELLO, "the chat template does not take these messages: integer division"),
    ("{{ messages[0].name.first }}", HELLO, "the chat template does not take these messages: "),
    ("", [], "a chat needs at least one message"),
    ("", ["Hello"], r"message 0 \(from 0\) must be a dict with 'role' and 'content', got 'Hello'"),
    ("", [*HELLO, {"content": "a"}], r"message 1 \(from 0\) must be a dict"),
  ],
)
def test_mistakes_are_told_in_one_line(source, messages, message):
  with pytest.raises(ConfigError, match=message) as caught:
    rendered(source, messages)
  assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_takes_one():
  made = tokenizers.make_tokenizer({"name": "bytes"})
  with pytest.raises(ConfigError, match="the tokenizer has no chat template; give one as `template`"):
    made.chat(HELLO)
  ids = made.chat(HELLO, template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
  assert ids.tolist() == made.document("Hello").tolist()
  with pytest.raises(ConfigError, match="no chat template"):
    from_folder(FOLDERS / "bert").chat(HELLO)


def test_a_tokenizer_without_a_template_has_a_plain_one():
  """It ends an answer with eos; every message is plain text below its role."""
  made = tokenizers.make_tokenizer({"name": "bytes"})
  source = chat.template_or_default(made.chat_templates)
  assert source == chat.DEFAULT == chat.template_or_default({}, "default")
  messages = [*HELLO, {"role": "assistant", "content": "Hi!"}]
  shown = made.show(made.chat(messages, template=source, add_generation_prompt=True))
  assert shown == "<s><|user|>\nHello\n<|assistant|>\nHi!</s>\n<|assistant|>\n"
  assert chat.render_chat({}, messages, template=source) == "<|user|>\nHello\n<|assistant|>\nHi!\n"
  assert chat.template_or_default({"mine": "x{{ y }}"}) == "x{{ y }}"
  with pytest.raises(ConfigError, match="neither Jinja nor one of: default"):
    chat.template_or_default({}, "chatml")


def test_names_of_special_tokens_are_those_that_chats_are_read_with():
  assert chat.token_names(tokenizers.make_tokenizer({"name": "bytes"})) == {"bos_token": "<s>", "eos_token": "</s>"}
  made = from_folder(FOLDERS / "llama3")
  assert chat.token_names(made) == made.token_names
