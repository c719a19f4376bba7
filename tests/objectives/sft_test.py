"""Instruction tuning: which tokens of a chat have loss, with real templates and vocabularies."""

from pathlib import Path

import jax
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.data.row_streams import make_row_filler
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.huggingface import tokenizer_from_folder
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.examples import RowLengths
from llmjax.objectives import sft
from llmjax.objectives.sft import InstructionTuning
from tests.support.cases import GPT, TOKENIZER, Case, gradients, pack_batch, parameters, record_examples, with_dropout

FOLDERS = Path(__file__).parents[1] / "testdata" / "tokenizers"
BOS, EOS, LENGTH = TOKENIZER.bos_id, TOKENIZER.eos_id, 64
CHAT = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hi there!"},
  {"role": "assistant", "content": "\n\nit's 日本 🙂"},
  {"role": "user", "content": "2+2?\n"},
  {"role": "assistant", "content": "4, or five"},
]
ENDS = {"gpt2": "<|im_end|>\n", "llama": " </s>\n", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>\n", None: "</s>\n"}


def open_tokenizer(name):
  return TOKENIZER if name is None else tokenizer_from_folder(FOLDERS / name)


def encoded(objective, messages=CHAT, labelled=True):
  record = {"messages": messages}
  objective.check_record(record, labelled=labelled)
  [example] = objective.encode_record(record, labelled=labelled)
  return example


def labels_with_loss(example):
  """Return the labels with loss, as one array for each consecutive run."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights["nll"], [0]])))
  return [example.labels["nll"][start:stop] for start, stop in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", ENDS)
def test_loss_weights_cover_each_answer_and_its_end(name):
  """Answers follow the tokens of the inference prompt."""
  made = open_tokenizer(name)
  objective = InstructionTuning(made, 300)
  example = encoded(objective)
  ids = np.append(example.inputs.ids, example.labels["nll"][-1])
  assert ids.tolist() == made.chat(CHAT, template=objective.template_source).tolist()
  shown = [made.show(run) for run in labels_with_loss(example)]
  # Its template has no generation prompt, so the header belongs to the answer.
  header = "<|start_header_id|>assistant<|end_header_id|>\n\n" if name == "llama3" else ""
  contents = [m["content"] if name in ("gpt2", None) else m["content"].strip() for m in CHAT[2::2]]
  assert [text.removeprefix(" ") for text in shown] == [header + content + ENDS[name] for content in contents]
  for count, run in zip((2, 4), labels_with_loss(example)):
    prompt = encoded(objective, CHAT[:count], labelled=False).inputs.ids
    start = len(prompt)
    if name != "gpt2" or count == 4:  # its "\n\n" is one token across the first answer's beginning
      assert ids[:start].tolist() == prompt.tolist() and ids[start : start + len(run)].tolist() == run.tolist()
  again = encoded(objective, labelled=False).inputs.ids  # without the known answer
  assert again.tolist() == prompt.tolist()
  [last] = labels_with_loss(encoded(InstructionTuning(made, 300, last_only=True)))
  assert last.tolist() == run.tolist()


def test_token_across_the_start_of_an_answer_is_trained():
  """The template's newline and the answer's first newline are one token, and the prompt ends with another token."""
  made = open_tokenizer("gpt2")
  messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}]
  ids, [(start, stop)] = sft.encode_chat(made, messages, sft.chat.template_or_default(made.chat_templates))
  prompt = made.chat(messages[:1], add_generation_prompt=True)
  assert sft.common_prefix_length(prompt, ids) == start and stop == len(ids)
  assert made.decode(ids[start:]).strip("\n") == "b"


@pytest.mark.parametrize("name", ENDS)
def test_answer_ends_follow_the_chat_template(name):
  made = open_tokenizer(name)
  ends = [made.names[i] for i in InstructionTuning(made, LENGTH).end_ids]
  assert made.names[made.eos_id] in ends and set(ends) - {ENDS[name].strip()} <= {made.names[made.eos_id]}


def test_prompt_and_completion_fields_form_one_turn():
  objective = InstructionTuning(TOKENIZER, LENGTH, prompt="ask", response="say", system="S")
  record = {"ask": "a", "say": "b"}
  [example] = objective.encode_record(record, labelled=True)
  text = "<|system|>\nS\n<|user|>\na\n<|assistant|>\n"
  assert example.inputs.ids.tolist() == [BOS, *TOKENIZER.encode(text + "b"), EOS]
  assert [run.tolist() for run in labels_with_loss(example)] == [[*TOKENIZER.encode("b"), EOS, *TOKENIZER.encode("\n")]]
  [prompt] = InstructionTuning(TOKENIZER, 80, prompt="ask", response="say", system="S").encode_record(
    record, labelled=False
  )
  assert prompt.inputs.ids.tolist() == [BOS, *TOKENIZER.encode(text)]
  messages = encoded(InstructionTuning(TOKENIZER, 300, system="S")).inputs.ids
  assert TOKENIZER.decode(messages).count("<|system|>") == 1  # the chat's own message has precedence


def count_tokens(messages, **settings):
  return len(TOKENIZER.chat(messages, template=sft.chat.DEFAULT_TEMPLATE, **settings))


def test_long_chat_drops_first_turns():
  whole = count_tokens(CHAT)
  shortened = encoded(InstructionTuning(TOKENIZER, whole - 2))
  assert TOKENIZER.decode(shortened.inputs.ids).startswith("<|system|>\nBe brief.\n<|user|>\n2+2?")
  [answer] = labels_with_loss(shortened)
  assert TOKENIZER.decode(answer) == "4, or five\n"
  assert len(labels_with_loss(encoded(InstructionTuning(TOKENIZER, whole - 1)))) == 2


def test_long_last_turn_drops_its_end():
  seq_len = count_tokens([CHAT[0], CHAT[3]], add_generation_prompt=True) + 3
  truncated = encoded(InstructionTuning(TOKENIZER, seq_len))
  [answer] = labels_with_loss(truncated)
  assert len(truncated.inputs.ids) == seq_len and TOKENIZER.decode(answer) == "4, o"


def test_chat_without_room_for_an_answer_is_skipped():
  objective = InstructionTuning(TOKENIZER, 20)
  assert objective.encode_record({"messages": CHAT}, labelled=True) == []
  chats = Source(3, lambda index: {"messages": CHAT}, "chats")
  filler = make_row_filler(chats, TOKENIZER, objective, pack=True, num_streams=1, seq_len=20, seed=0)
  with pytest.raises(ConfigError, match=r"none of 3 records gives examples; they are too long: .* seq_len=20 tokens"):
    filler.count_skipped()


def test_long_prompt_drops_its_beginning_but_not_bos():
  prompt = encoded(InstructionTuning(TOKENIZER, 40, response_len=10), CHAT[:2], labelled=False).inputs.ids
  assert len(prompt) == 30 and prompt[0] == BOS
  assert TOKENIZER.decode(prompt).endswith("Hi there!\n<|assistant|>\n")


def test_gradients_packed_or_accumulated_equal_the_whole_batch():
  case = Case(GPT, InstructionTuning(TOKENIZER, LENGTH, template="{% for m in messages %}{{ m.content }}{% endfor %}"))
  params, _ = parameters(GPT)
  records = [
    {"messages": [{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "a" * (9 - n)}]}
    for n in range(1, 8)
  ]
  examples, row_lengths = record_examples(case.objective, records), RowLengths(32)

  def same(got, want):
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got, want)

  packed = pack_batch(examples, row_lengths, 8, shared=True)
  want, metrics = gradients(case, params, packed)
  assert metrics["loss"][1] == sum(range(2, 9))  # letters of the answers
  got, separate = gradients(case, params, pack_batch(examples, row_lengths, 8))
  same(got, want)
  same(separate, metrics)
  packed.labels["nll"][packed.weights["nll"] == 0] = 7
  same(gradients(case, params, packed)[0], want)
  dropped = with_dropout(case)
  same(gradients(dropped, params, packed, accum=4)[0], gradients(dropped, params, packed)[0])


def test_predictions_stop_at_the_template_end_and_are_scored():
  pytest.importorskip("rouge_score")
  objective = InstructionTuning(open_tokenizer("gpt2"), LENGTH)
  [end] = set(objective.end_ids) - {objective.tokenizer.eos_id}
  tokens = np.append(objective.tokenizer.encode("x y"), [end, 5, 5])
  result = objective.make_result({}, [], [{"tokens": tokens}])
  assert result == {"response": "x y"}
  unanswered = {"messages": CHAT[:4]}
  found = objective.compute_metrics(
    [{"messages": CHAT}, unanswered, {"messages": CHAT}], [{"response": "4, or five "}, result, result]
  )
  assert found["exact_match"] == found["rouge1"] == 0.5


@pytest.mark.parametrize(
  ("messages", "message"),
  [
    ([], "'messages': must be a list of messages"),
    ("Hi", "must be a list of messages"),
    ([{"from": "human", "value": "x"}], r"message 0 \(from 0\): must be {'role'"),
    ([{"role": "usr", "content": "x"}], "the role 'usr' is unknown; did you mean `user`"),
    ([CHAT[1], {"role": "assistant"}], r"message 1 \(from 0\): 'content' must be text, got None"),
    ([CHAT[1], {"role": "assistant", "content": " "}], "the assistant's 'content' is empty"),
    (CHAT[:2], "got no answer"),
    (CHAT[2:3], "got no answer"),
  ],
)
def test_bad_chat_is_one_line(messages, message):
  with pytest.raises(ConfigError, match=message) as caught:
    InstructionTuning(TOKENIZER, LENGTH).check_record({"messages": messages}, labelled=True)
  assert "\n" not in str(caught.value)


def test_template_without_answers_after_its_prompt_is_refused():
  for source, message in (
    (
      "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
      "generation prompt",
    ),
    (
      "{% for m in messages %}{{ m.content[: 1 if m.role == 'assistant' and not loop.last else 9] }}|{% endfor %}",
      "last_only=True",
    ),
  ):
    with pytest.raises(ConfigError, match=message):
      encoded(InstructionTuning(TOKENIZER, LENGTH, template=source))
  encoded(InstructionTuning(TOKENIZER, LENGTH, template=source, last_only=True))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"prompt": "a"}, "must be set together"),
    ({"response_len": LENGTH}, "must be at least 1 and less than"),
    ({"template": "chatml"}, "must be Jinja or one of default"),
  ],
)
def test_invalid_sft_setting_is_rejected(settings, message):
  with pytest.raises(ConfigError, match=message):
    InstructionTuning(TOKENIZER, LENGTH, **settings)


def test_chat_without_an_eos_token_is_plain_text():
  made = make_tokenizer({"name": "bytes", "special": False})
  objective = InstructionTuning(made, 300)
  assert [made.decode(run) for run in labels_with_loss(encoded(objective))] == ["\n\nit's 日本 🙂\n", "4, or five\n"]
  assert objective.end_ids == ()
