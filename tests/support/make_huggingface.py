"""Tiny random Hugging Face models, and what Hugging Face computes with them: tests/testdata/huggingface/NAME.

  pip install torch==2.13.0 transformers
  python tests/support/make_huggingface.py [NAME ...]      # all of them, without names

The tests read the files and need neither package. A folder holds what `save_pretrained` writes (config.json,
model.safetensors, generation_config.json), expected.npz, and, where Transformers 5 names fields otherwise than the
checkpoints on the Hub do, config_hub.json with their names: loading with it gives the same logits to the last bit.
All is float32 on a CPU with eager attention and without dropout. Matrices are drawn from N(0, 1.6²/width) (T5, which
does not scale its queries: 1.2²), embeddings and biases from N(0, .2²), scales of norms from U(.5, 1.5) (Gemma, which
adds 1 to them: U(-.5, .5)), so that a config or a weight that is read wrongly shows: logits move by 1e-4 or
more (an exact gelu, a tiny epsilon; most by .1 to 10), of which the rounding of float32 is at most 1.5e-5.

expected.npz of a model that trains has (B rows, S tokens, width D, L layers; -100 among labels is no label):
  input_ids [B S], labels       labels are where their token is: of a causal model, Hugging Face shifts them
  attention_mask                of encoders and T5, whose rows have different lengths
  loss, logits [B S V]
  all_hidden [L+1 B S D]        the embeddings, then after each layer; the last one after the final norm
                                (where that is projected to another width, it is not among them but last_hidden)
  grad_names, grad_norms        a tensor of the file, and the L2 norm of the gradient of the loss (a tied one is one)
  adamw_losses [6]              before each of five steps of AdamW and after: rate 1e-3, betas .9 and .999, epsilon
                                1e-8, decay .01 of every weight, no clipping
Causal models further have:
  padded_ids, padded_mask, padded_logits    padded on the right: compare where the mask is 1
  gen_prompt [1 7], gen_sequences           greedy, 12 tokens, which no end of sequence cuts short
  left_ids, left_mask, left_sequences       the same with a batch that is padded on the left, 8 tokens
  input_ids_long, logits_long               where positions depend on the length: one beyond the original length
  router_logits [L B*S E], aux_loss, loss_with_aux, padded_aux_loss    mixtures of experts: the balance as Hugging Face
                                            weighs it, of `input_ids`, the loss with it, and that of `padded_ids`
BERT has token_type_ids, next_sentence_label, nsp_logits [B 2] and pooler_output [B D] (`loss` is the sum of both
losses); T5 decoder_input_ids, encoder_all_hidden, decoder_all_hidden, and gen_sequences, which start with token 0, of
gen_ids and gen_mask.
Heads have input_ids, attention_mask, loss, and labels and logits, or start_positions, end_positions, start_logits and
end_logits.
Beam search: beam_settings (JSON: for each search the arguments of `generate`), beam_ids, beam_mask, and for search
number i beam_{i}_sequences and beam_{i}_scores. Behind the end of a sequence is padding, or, where the padding is
token 0, the end again.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

OUTPUT = Path(__file__).parents[1] / "testdata" / "huggingface"
NEVER = -1  # an end of sequence that no model writes
MARGIN = 2e-3  # between the best and the second best token, for greedy decoding to be the same everywhere
FIELDS_OF_5 = ("dtype", "rope_parameters", "layer_types")  # Transformers 4 wrote none of them
LOGITS = {"prediction_logits": "logits", **{name: name for name in ("logits", "start_logits", "end_logits")}}
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")


@dataclasses.dataclass(frozen=True)
class Case:
  """`hub` are fields as the Hub's configs have them, `not_hub` those of config.json that they do not have."""

  model: str  # a class of transformers
  config: dict
  records: tuple
  hub: dict | None = None
  not_hub: tuple = ()


# What is recorded: functions of a model, a source of random numbers and what the ones before have found.


def tokens(rng, model, *shape):
  return torch.from_numpy(rng.integers(3, model.config.vocab_size, shape))


def pad(rng, model, lengths, left=False):
  """Random rows of these lengths, and their mask."""
  places = torch.arange(max(lengths))
  mask = (places[None] < torch.tensor(lengths)[:, None]).long()
  mask = mask.flip(1) if left else mask
  return torch.where(mask == 1, tokens(rng, model, *mask.shape), model.config.pad_token_id or 0), mask


def keep(rng, labels, share, where=True):
  """A share of the labels; -100 elsewhere."""
  return torch.where(torch.from_numpy(rng.random(labels.shape) < share) & where, labels, -100)


def run(model, **inputs):
  with torch.no_grad():
    return model(**inputs)


def training(model, inputs):
  learner = copy.deepcopy(model)
  learner(**inputs).loss.backward()
  for weight in learner.parameters():
    weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
  with tempfile.TemporaryDirectory() as folder:  # saved in place of the weights, gradients get the names of the file
    learner.save_pretrained(folder)
    gradients = load_file(f"{folder}/model.safetensors")
  learner = copy.deepcopy(model)
  optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
  losses = []
  for _ in range(5):
    loss = learner(**inputs).loss
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
  losses.append(run(learner, **inputs).loss.item())
  names = sorted(gradients)
  norms = torch.stack([gradients[name].norm() for name in names])
  return {"grad_names": np.array(names), "grad_norms": norms, "adamw_losses": np.array(losses)}


def greedy(model, draw, new):
  """A prompt, its mask and the two continued: of many, that with most different tokens, none of them a near tie."""
  found = []
  for _ in range(30):
    ids, mask = draw()
    out = generate(model, ids, mask, max_new_tokens=new, eos_token_id=NEVER, pad_token_id=0)
    best, second = torch.stack(out.scores).topk(2).values.unbind(-1)
    if (best - second).min() > MARGIN:
      found.append((ids, mask, out.sequences))
  return max(found, key=lambda entry: different(entry[2][:, -new:]))


def different(sequences):
  return sum(len(row.unique()) for row in sequences)


def generate(model, ids, mask, **settings):
  kept = {"return_dict_in_generate": True, "output_scores": True}
  return model.generate(ids, attention_mask=mask, do_sample=False, **settings, **kept)


def hidden(states):
  same = [state for state in states if state.shape == states[0].shape]
  return {"all_hidden": torch.stack(same)} | ({"last_hidden": states[-1]} if len(same) < len(states) else {})


def causal(model, rng, found, length=20):
  ids = tokens(rng, model, 2, length)
  inputs = {"input_ids": ids, "labels": keep(rng, ids, 0.8)}
  out = run(model, **inputs, output_hidden_states=True)
  padded, mask = pad(rng, model, (length, length - 7))
  prompt, _, sequences = greedy(model, lambda: pad(rng, model, (7,)), new=12)
  left, left_mask, left_sequences = greedy(model, lambda: pad(rng, model, (9, 5), left=True), new=8)
  return {
    **inputs,
    "loss": out.loss,
    "logits": out.logits,
    **hidden(out.hidden_states),
    "padded_ids": padded,
    "padded_mask": mask,
    "padded_logits": run(model, input_ids=padded, attention_mask=mask).logits,
    "gen_prompt": prompt,
    "gen_sequences": sequences,
    "left_ids": left,
    "left_mask": left_mask,
    "left_sequences": left_sequences,
    **training(model, inputs),
  }


def beyond(model, rng, found):
  ids = tokens(rng, model, 2, 36)
  return {"input_ids_long": ids, "logits_long": run(copy.deepcopy(model), input_ids=ids).logits}


def routing(model, rng, found):
  inputs = {name: found[name] for name in ("input_ids", "labels")}
  out = run(model, **inputs, output_router_logits=True)
  padded = {"input_ids": found["padded_ids"], "attention_mask": found["padded_mask"]}
  logits = torch.stack(out.router_logits)
  chosen = logits.topk(model.config.num_experts_per_tok + 1).values
  assert (chosen[..., -2] - chosen[..., -1]).min() > MARGIN, "an expert is chosen by a hair's breadth"
  return {
    "router_logits": logits,
    "aux_loss": out.aux_loss,
    "loss_with_aux": out.loss,
    "padded_aux_loss": run(model, **padded, output_router_logits=True).aux_loss,
  }


def beams(model, rng, found):
  """Beam search with every kind of ending, with the prompts and the end of sequence that tell most of them apart."""
  shaken = copy.deepcopy(model)
  for weight in shaken.parameters():
    weight.data *= 1 + 1e-4 * torch.from_numpy(rng.standard_normal(weight.shape)).float()
  drawn = [pad(rng, model, (9, 5), left=not model.config.is_encoder_decoder) for _ in range(20)]
  free = [(prompt, written(model, prompt, generate(model, *prompt, **searches(model, NEVER)[-1]))) for prompt in drawn]
  free.sort(key=lambda entry: -different(entry[1]))
  tried = [
    (prompt, end, [generate(model, *prompt, **settings) for settings in searches(model, end)])
    for prompt, continuation in free[:5]
    for end in sorted(set(continuation.flatten().tolist()) - {0})
  ]
  tried.sort(key=lambda entry: -variety(entry[2]))
  prompt, end, outs = next(entry for entry in tried if stands(model, shaken, *entry))
  print(f"  beams end with {end}: {variety(outs)} results of {len(outs)} searches")
  settings = {"beam_settings": np.array(json.dumps(searches(model, end)))}
  sequences = {f"beam_{i}_sequences": out.sequences for i, out in enumerate(outs)}
  scores = {f"beam_{i}_scores": out.sequences_scores for i, out in enumerate(outs)}
  return {"beam_ids": prompt[0], "beam_mask": prompt[1], **settings, **sequences, **scores}


def searches(model, end):
  shared = {"num_beams": 3, "max_new_tokens": 10, "pad_token_id": model.config.pad_token_id or 0, "eos_token_id": end}
  kinds = itertools.product((1.0, 2.0, -1.0), (False, True, "never"))
  result = [{**shared, "length_penalty": penalty, "early_stopping": stop} for penalty, stop in kinds]
  return [*result, {**result[0], "num_return_sequences": 3}]


def written(model, prompt, out):
  return out.sequences[:, 1 if model.config.is_encoder_decoder else prompt[0].shape[1] :]


def variety(outs):
  return len({json.dumps(out.sequences.tolist()) for out in outs})


def stands(model, shaken, prompt, end, outs):
  """Whether sequences end early, and neither they nor their order hinge on near ties."""
  early = any((written(model, prompt, out)[:, :-1] == end).any() for out in outs)
  gaps = []
  for settings in searches(model, end):
    scores = generate(model, *prompt, **{**settings, "num_return_sequences": 3}).sequences_scores.reshape(2, 3)
    gaps.append((scores[:, :-1] - scores[:, 1:])[:, : settings.get("num_return_sequences", 1)].min())
  again = [generate(shaken, *prompt, **settings) for settings in searches(model, end)]
  return early and min(gaps) > 1e-3 and all(torch.equal(a.sequences, b.sequences) for a, b in zip(outs, again))


def sentences(model, rng):
  """Rows of different lengths, of two sentences each where a model knows of them."""
  ids, mask = pad(rng, model, (24, 15, 7))
  inputs = {"input_ids": ids, "attention_mask": mask}
  if getattr(model.config, "type_vocab_size", 1) > 1:
    inputs["token_type_ids"] = (torch.arange(24)[None] >= torch.tensor([[10], [6], [4]])).long() * mask
  return inputs


def masked(model, rng, found):
  inputs = sentences(model, rng)
  mask = inputs["attention_mask"]
  inputs["labels"] = keep(rng, tokens(rng, model, *mask.shape), 0.3, mask == 1)
  out = run(model, **inputs, output_hidden_states=True)
  result = {"loss": out.loss, "logits": out.logits, "all_hidden": torch.stack(out.hidden_states)}
  return {**inputs, **result, **training(model, inputs)}


def masked_pairs(model, rng, found):
  inputs = sentences(model, rng)
  mask = inputs["attention_mask"]
  labels = keep(rng, tokens(rng, model, *mask.shape), 0.3, mask == 1)
  learned = {**inputs, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1])}
  out = run(model, **learned, output_hidden_states=True)
  return {
    **learned,
    "loss": out.loss,
    "logits": out.prediction_logits,
    "nsp_logits": out.seq_relationship_logits,
    "all_hidden": torch.stack(out.hidden_states),
    "pooler_output": run(model.base_model, **inputs).pooler_output,
    **training(model, learned),
  }


def sequence_to_sequence(model, rng, found):
  ids, mask = pad(rng, model, (18, 11, 6))
  targets, target_mask = pad(rng, model, (12, 9, 5))
  inputs = {"input_ids": ids, "attention_mask": mask, "labels": keep(rng, targets, 1, target_mask == 1)}
  out = run(model, **inputs, output_hidden_states=True)
  gen_ids, gen_mask, sequences = greedy(model, lambda: pad(rng, model, (14, 8)), new=12)
  return {
    **inputs,
    "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(inputs["labels"]),
    "loss": out.loss,
    "logits": out.logits,
    "encoder_all_hidden": torch.stack(out.encoder_hidden_states),
    "decoder_all_hidden": torch.stack(out.decoder_hidden_states),
    "gen_ids": gen_ids,
    "gen_mask": gen_mask,
    "gen_sequences": sequences,
    **training(model, inputs),
  }


def sequence_head(model, rng, found):
  inputs = sentences(model, rng)
  labels = rng.standard_normal(3).astype(np.float32) if model.config.num_labels == 1 else np.array([2, 0, 1])
  inputs["labels"] = torch.from_numpy(labels)
  out = run(model, **inputs)
  return {**inputs, "loss": out.loss, "logits": out.logits}


def token_head(model, rng, found):
  inputs = sentences(model, rng)
  labels = torch.from_numpy(rng.integers(0, model.config.num_labels, inputs["input_ids"].shape))
  inputs["labels"] = keep(rng, labels, 0.8, inputs["attention_mask"] == 1)
  out = run(model, **inputs)
  return {**inputs, "loss": out.loss, "logits": out.logits}


def qa_head(model, rng, found):
  inputs = sentences(model, rng)
  inputs |= {"start_positions": torch.tensor([3, 0, 2]), "end_positions": torch.tensor([9, 0, 5])}
  out = run(model, **inputs)
  return {**inputs, "loss": out.loss, "start_logits": out.start_logits, "end_logits": out.end_logits}


# The models: widths that differ from each other wherever a family lets them.

HUB = {"torch_dtype": "float32"}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 1, "layer_norm_epsilon": 1e-3}
OPT = {"vocab_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "max_position_embeddings": 40}
OPT_HUB = {**HUB, "prefix": "</s>"}
NOT_OPT_HUB = ("enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm")
NEOX = {
  "vocab_size": 48,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 64,
  "layer_norm_eps": 1e-3,
}
NEOX_HUB = {**HUB, "rotary_emb_base": 50}
LLAMA = {
  "vocab_size": 48,
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 20,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-3,
  **ENDS,
}
WIDE = {**LLAMA, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of width 8


def rope(theta, kind="default", **fields):
  return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def theta(value, **fields):
  return {**HUB, "rope_theta": value, **fields}


EXPERTS = {**LLAMA, "num_experts_per_tok": 2}
QWEN_EXPERTS = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 12}
GEMMA = {**LLAMA, "hidden_size": 16, "head_dim": 6, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
GEMMA_HUB = {**HUB, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
NOT_GEMMA_HUB = ("use_bidirectional_attention",)
LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.2, 2.5, 4.5, 7.0]}
LONGROPE_PARTIAL = {name: factors[:3] for name, factors in LONGROPE.items()}
PHI3 = {**WIDE, "original_max_position_embeddings": 24, "pad_token_id": 0}

BERT = {
  "vocab_size": 48,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 32,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
DISTILBERT = {"vocab_size": 48, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 32}
MODERNBERT = {
  "vocab_size": 48,
  "hidden_size": 16,
  "num_hidden_layers": 4,
  "num_attention_heads": 2,
  "intermediate_size": 20,
  "max_position_embeddings": 64,
  "norm_eps": 1e-3,
  "local_attention": 8,
  "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
  "rope_parameters": {
    "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
  },
  "pad_token_id": 0,
  "bos_token_id": 1,
  "cls_token_id": 1,
  "eos_token_id": 2,
  "sep_token_id": 2,
}
MODERNBERT_HUB = {
  **HUB,
  "global_rope_theta": 1000.0,
  "local_rope_theta": 50.0,
  "global_attn_every_n_layers": 3,
  "position_embedding_type": "absolute",
}
T5 = {
  "vocab_size": 48,
  "d_model": 16,
  "d_kv": 6,
  "d_ff": 24,
  "num_heads": 4,
  "relative_attention_num_buckets": 8,
  "decoder_start_token_id": 0,
}
NOT_T5_HUB = ("classifier_dropout", "dense_act_fn", "is_gated_act", "is_decoder", "scale_decoder_outputs")
THREE = {"num_labels": 3}

MIXTURE = (causal, routing)
LONG = (causal, beyond)
T5_RECORDS = (sequence_to_sequence, beams)

CASES = {
  "gpt2": Case("GPT2LMHeadModel", GPT2, (causal, beams)),
  "llama": Case(
    "LlamaForCausalLM",
    {**LLAMA, **rope(5000.0)},
    (causal, beams),
    theta(5000.0, rope_scaling=None),
    ("head_dim",),
  ),
  "bert": Case("BertForPreTraining", BERT, (masked_pairs,)),
  "t5": Case(
    "T5ForConditionalGeneration",
    {**T5, "num_layers": 2},
    T5_RECORDS,
    {"n_positions": 512},
    (
      *NOT_T5_HUB,
      "feed_forward_proj",
      "num_decoder_layers",
      "relative_attention_max_distance",
      "tie_word_embeddings",
    ),
  ),
  "t5_v1_1": Case(
    "T5ForConditionalGeneration",
    {
      **T5,
      "num_layers": 3,  # Transformers 5.24 cannot generate where the decoder has more layers than the encoder
      "num_decoder_layers": 2,
      "relative_attention_max_distance": 12,
      "feed_forward_proj": "gated-gelu",
      "layer_norm_epsilon": 1e-3,
      "tie_word_embeddings": False,
    },
    T5_RECORDS,
    {"tie_word_embeddings": False},
    NOT_T5_HUB,
  ),
  "opt": Case(
    "OPTForCausalLM",
    {**OPT, "hidden_size": 16},
    (causal,),
    OPT_HUB,
    NOT_OPT_HUB,
  ),
  "opt_350m_like": Case(
    "OPTForCausalLM",
    {**OPT, "hidden_size": 16, "word_embed_proj_dim": 12, "do_layer_norm_before": False},
    (causal,),
    OPT_HUB,
    NOT_OPT_HUB,
  ),
  "gpt_neox": Case(
    "GPTNeoXForCausalLM",
    {**NEOX, **rope(50.0, partial_rotary_factor=0.25)},
    (causal,),
    {**NEOX_HUB, "rotary_pct": 0.25},
    ("attention_bias",),
  ),
  "gpt_neox_sequential": Case(
    "GPTNeoXForCausalLM",
    {**NEOX, **rope(50.0, partial_rotary_factor=0.5), "hidden_size": 16, "use_parallel_residual": False},
    (causal,),
    {**NEOX_HUB, "rotary_pct": 0.5},
    ("attention_bias",),
  ),
  "llama_linear": Case(
    "LlamaForCausalLM",
    {**WIDE, **rope(100.0, "linear", factor=4.0)},
    (causal,),
    theta(100.0, rope_scaling={"type": "linear", "factor": 4.0}),
    ("head_dim",),
  ),
  "llama_dynamic": Case(
    "LlamaForCausalLM",
    {**WIDE, **rope(100.0, "dynamic", factor=3.0), "max_position_embeddings": 24},
    LONG,
    theta(100.0, rope_scaling={"type": "dynamic", "factor": 3.0}),
    ("head_dim",),
  ),
  "llama_yarn": Case(
    "LlamaForCausalLM",
    {**WIDE, **rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=32)},
    (causal,),
    theta(100.0, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ("head_dim",),
  ),
  "llama3": Case(
    "LlamaForCausalLM",
    {
      **WIDE,
      **rope(
        500.0,
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
      ),
    },
    (causal,),
    theta(
      500.0,
      rope_scaling={
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
      },
    ),
    ("head_dim",),
  ),
  "mistral": Case(
    "MistralForCausalLM",
    {**LLAMA, **rope(5000.0), "sliding_window": 8},
    (functools.partial(causal, length=28),),
    theta(5000.0),
    ("head_dim",),
  ),
  "mixtral": Case(
    "MixtralForCausalLM",
    {**EXPERTS, **rope(5000.0), "num_local_experts": 4, "intermediate_size": 12},
    MIXTURE,
    theta(5000.0),
    ("head_dim",),
  ),
  "qwen2": Case(
    "Qwen2ForCausalLM",
    {**LLAMA, **rope(5000.0), "sliding_window": 8, "max_window_layers": 1},
    (causal,),
    theta(5000.0, sliding_window=8, max_window_layers=1),
  ),
  "qwen2_moe": Case(
    "Qwen2MoeForCausalLM",
    {**QWEN_EXPERTS, **rope(5000.0), "shared_expert_intermediate_size": 16},
    MIXTURE,
    theta(5000.0, sliding_window=8),
    ("mlp_only_layers", "qkv_bias"),
  ),
  "qwen3": Case(
    "Qwen3ForCausalLM",
    {**LLAMA, **rope(5000.0), "hidden_size": 16, "head_dim": 6, "tie_word_embeddings": True},
    (causal,),
    theta(5000.0, rope_scaling=None),
  ),
  "qwen3_moe": Case(
    "Qwen3MoeForCausalLM",
    {**QWEN_EXPERTS, **rope(5000.0), "hidden_size": 16, "head_dim": 6, "norm_topk_prob": True},
    MIXTURE,
    theta(5000.0, rope_scaling=None, max_window_layers=48, num_experts=4),
    ("num_local_experts",),
  ),
  "gemma": Case(
    "GemmaForCausalLM",
    {**GEMMA, **rope(5000.0), "num_key_value_heads": 1},
    (causal,),
    theta(5000.0, rope_scaling=None, hidden_act="gelu", hidden_activation=None),
    NOT_GEMMA_HUB,
  ),
  "gemma2": Case(
    "Gemma2ForCausalLM",
    {
      **GEMMA,
      **rope(5000.0),
      "sliding_window": 8,
      "query_pre_attn_scalar": 9,
      "attn_logit_softcapping": 5.0,
      "final_logit_softcapping": 6.0,
    },
    (causal,),
    {**GEMMA_HUB, **theta(5000.0), "cache_implementation": "hybrid"},
    NOT_GEMMA_HUB,
  ),
  "gemma3": Case(
    "Gemma3ForCausalLM",
    {
      **GEMMA,
      "num_hidden_layers": 4,
      "sliding_window": 8,
      "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
      "query_pre_attn_scalar": 9,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
      },
    },
    (causal,),
    {
      **HUB,
      "rope_theta": 5000.0,
      "rope_local_base_freq": 100.0,
      "rope_scaling": {"factor": 4.0, "rope_type": "linear"},
      "sliding_window_pattern": 3,
      "cache_implementation": "hybrid",
    },
    NOT_GEMMA_HUB,
  ),
  "phi3": Case(
    "Phi3ForCausalLM",
    {**PHI3, **rope(100.0, "longrope", **LONGROPE), "sliding_window": 12},
    LONG,
    theta(100.0, rope_scaling={**LONGROPE, "type": "longrope"}),
  ),
  "phi3_partial": Case(
    "Phi3ForCausalLM",
    {**PHI3, **rope(100.0, "longrope", **LONGROPE_PARTIAL, partial_rotary_factor=0.75)},
    LONG,
    theta(100.0, rope_scaling={**LONGROPE_PARTIAL, "type": "longrope"}, partial_rotary_factor=0.75),
  ),
  "roberta": Case("RobertaForMaskedLM", ROBERTA, (masked,)),
  "distilbert": Case("DistilBertForMaskedLM", DISTILBERT, (masked,)),
  "modernbert": Case("ModernBertForMaskedLM", MODERNBERT, (masked,), MODERNBERT_HUB),
}

RECORDS = {"SequenceClassification": sequence_head, "TokenClassification": token_head, "QuestionAnswering": qa_head}
PADDED = {"pad_token_id": 0}  # without it, Hugging Face does not know which token of a row is the last
SMALL_LLAMA = {**LLAMA, **PADDED, **rope(5000.0), "hidden_size": 16, "intermediate_size": 12}
SMALL_MODERNBERT = {**MODERNBERT, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
HEADS = {
  "bert_sequence": ("BertForSequenceClassification", {**BERT, **THREE}),
  "bert_regression": ("BertForSequenceClassification", {**BERT, "num_labels": 1}),
  "bert_token": ("BertForTokenClassification", {**BERT, **THREE}),
  "bert_qa": ("BertForQuestionAnswering", BERT),
  "roberta_sequence": ("RobertaForSequenceClassification", {**ROBERTA, **THREE}),
  "roberta_token": ("RobertaForTokenClassification", {**ROBERTA, **THREE}),
  "roberta_qa": ("RobertaForQuestionAnswering", ROBERTA),
  "distilbert_sequence": ("DistilBertForSequenceClassification", {**DISTILBERT, **THREE}),
  "distilbert_token": ("DistilBertForTokenClassification", {**DISTILBERT, **THREE}),
  "distilbert_qa": ("DistilBertForQuestionAnswering", DISTILBERT),
  "modernbert_sequence": ("ModernBertForSequenceClassification", {**SMALL_MODERNBERT, **THREE}),
  "modernbert_sequence_mean": (
    "ModernBertForSequenceClassification",
    {**SMALL_MODERNBERT, **THREE, "classifier_pooling": "mean"},
  ),
  "modernbert_token": ("ModernBertForTokenClassification", {**SMALL_MODERNBERT, **THREE}),
  "modernbert_qa": ("ModernBertForQuestionAnswering", SMALL_MODERNBERT),
  "gpt2_sequence": ("GPT2ForSequenceClassification", {**GPT2, **PADDED, **THREE}),
  "gpt2_token": ("GPT2ForTokenClassification", {**GPT2, **PADDED, **THREE}),
  "llama_sequence": ("LlamaForSequenceClassification", {**SMALL_LLAMA, **THREE}),
  "llama_token": ("LlamaForTokenClassification", {**SMALL_LLAMA, **THREE}),
  "llama_qa": ("LlamaForQuestionAnswering", SMALL_LLAMA),
  "mistral_sequence": ("MistralForSequenceClassification", {**SMALL_LLAMA, **THREE, "sliding_window": 8}),
  "qwen2_sequence": ("Qwen2ForSequenceClassification", {**SMALL_LLAMA, **THREE}),
}
CASES |= {name: Case(model, config, (RECORDS[model.partition("For")[2]],)) for name, (model, config) in HEADS.items()}


def randomize(model, rng):
  matrix = (1.2 if model.config.model_type == "t5" else 1.6) / math.sqrt(model.config.hidden_size)
  center = 0 if model.config.model_type.startswith("gemma") else 1
  owners = dict(model.named_modules())
  for name, weight in sorted(model.named_parameters()):
    if weight.ndim == 1 and name.endswith("weight"):
      values = center + rng.uniform(-0.5, 0.5, weight.shape)
    elif weight.ndim == 1 or isinstance(owners[name.rpartition(".")[0]], torch.nn.Embedding):
      values = rng.normal(0, 0.2, weight.shape)
    else:
      values = rng.normal(0, matrix, weight.shape)
    weight.data = torch.from_numpy(values).float()


def build(case, rng):
  kind = getattr(transformers, case.model)
  model = kind(kind.config_class(**case.config))
  if case.config.get("tie_word_embeddings") is False:  # which a T5Config of Transformers 5 takes for something else
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.all_tied_weights_keys.clear()
  randomize(model, rng)
  return model


def load(case, folder):
  kind = getattr(transformers, case.model)
  settings = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
  model, report = kind.from_pretrained(folder, **settings, output_loading_info=True)
  assert not any(report.values()), report
  return model.eval()


def write_hub_config(case, folder):
  config = json.loads((folder / "config.json").read_text())
  kept = {name: value for name, value in config.items() if name not in (*FIELDS_OF_5, *case.not_hub)}
  (folder / "config_hub.json").write_text(
    json.dumps({**kept, "transformers_version": "4.44.0", **case.hub}, indent=2, sort_keys=True) + "\n"
  )


def check(case, folder, expected, config):
  """Loaded with this config, the model gives the recorded logits to the last bit."""
  with tempfile.TemporaryDirectory() as copied:
    shutil.copy(folder / config, f"{copied}/config.json")
    shutil.copy(folder / "model.safetensors", copied)
    transformers.AutoConfig.from_pretrained(copied)
    for ending in ("", "_long"):
      inputs = {name: torch.from_numpy(expected[name + ending]).long() for name in INPUTS if name + ending in expected}
      out = run(load(case, copied), **inputs) if inputs else {}
      for name, key in LOGITS.items():
        assert name not in out or np.array_equal(out[name].numpy(), expected[key + ending]), (folder, config, key)


def stored(value):
  """Numbers as float32 or int32, text as it is."""
  value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
  return value.astype({"f": np.float32, "i": np.int32}.get(value.dtype.kind, value.dtype))


def make(name):
  case = CASES[name]
  seeds = itertools.count(zlib.crc32(name.encode()))
  torch.manual_seed(next(seeds))
  with tempfile.TemporaryDirectory() as made:
    folder = Path(made) / name
    build(case, np.random.default_rng(next(seeds))).save_pretrained(folder)
    model, found = load(case, folder), {}
    for record in case.records:
      found |= record(model, np.random.default_rng(next(seeds)), found)
    expected = {key: stored(value) for key, value in found.items()}
    assert all(np.isfinite(value).all() for value in expected.values() if value.dtype.kind == "f")
    np.savez_compressed(folder / "expected.npz", **expected)
    if case.hub:
      write_hub_config(case, folder)
    for config in folder.glob("config*.json"):
      check(case, folder, expected, config.name)
    shutil.rmtree(OUTPUT / name, ignore_errors=True)
    shutil.copytree(folder, OUTPUT / name)
  sizes = {file.name: file.stat().st_size for file in sorted((OUTPUT / name).iterdir())}
  print(name, sum(sizes.values()), sizes)


def main(names):
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for name in names or CASES:
    make(name)


if __name__ == "__main__":
  main(sys.argv[1:])
