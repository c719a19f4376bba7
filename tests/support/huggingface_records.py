"""Recorders of reference models: functions (model, random generator, earlier records) -> {name: array}.

make_huggingface.py describes the arrays.
"""

import copy
import itertools
import json
import tempfile

import numpy as np
import torch
from safetensors.torch import load_file

NEVER = -1  # an eos that no model generates
MARGIN = 2e-3  # minimum gap between the best two tokens, so that greedy decoding is the same on all machines


def random_tokens(rng, model, *shape):
  return torch.from_numpy(rng.integers(3, model.config.vocab_size, shape))


def random_rows(rng, model, lengths, left=False):
  """Return ids of random rows with these lengths [B S], and their mask."""
  positions = torch.arange(max(lengths))
  mask = (positions[None] < torch.tensor(lengths)[:, None]).long()
  mask = mask.flip(1) if left else mask
  return torch.where(mask == 1, random_tokens(rng, model, *mask.shape), model.config.pad_token_id or 0), mask


def sample_labels(rng, labels, share, where=True):
  """Return a share of the labels, and -100 elsewhere."""
  return torch.where(torch.from_numpy(rng.random(labels.shape) < share) & where, labels, -100)


def forward(model, **inputs):
  with torch.no_grad():
    return model(**inputs)


def record_training(model, inputs):
  trained = copy.deepcopy(model)
  trained(**inputs).loss.backward()
  for weight in trained.parameters():
    weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
  with tempfile.TemporaryDirectory() as folder:  # saved as if they were weights, gradients get the names in the file
    trained.save_pretrained(folder)
    gradients = load_file(f"{folder}/model.safetensors")
  trained = copy.deepcopy(model)
  optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
  losses = []
  for _ in range(5):
    loss = trained(**inputs).loss
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
  losses.append(forward(trained, **inputs).loss.item())
  names = sorted(gradients)
  norms = torch.stack([gradients[name].norm() for name in names])
  return {"grad_names": np.array(names), "grad_norms": norms, "adamw_losses": np.array(losses)}


def choose_greedy(model, draw, new):
  """Return a prompt, its mask and the greedy continuation.

  Of many prompts, it is the one with the most different new tokens among those without a near tie.
  """
  candidates = []
  for _ in range(30):
    ids, mask = draw()
    out = search_tokens(model, ids, mask, max_new_tokens=new, eos_token_id=NEVER, pad_token_id=0)
    best, second = torch.stack(out.scores).topk(2).values.unbind(-1)
    if (best - second).min() > MARGIN:
      candidates.append((ids, mask, out.sequences))
  return max(candidates, key=lambda entry: count_different(entry[2][:, -new:]))


def count_different(sequences):
  return sum(len(row.unique()) for row in sequences)


def search_tokens(model, ids, mask, **settings):
  outputs = {"return_dict_in_generate": True, "output_scores": True}
  return model.generate(ids, attention_mask=mask, do_sample=False, **settings, **outputs)


def record_hidden(states):
  same = [state for state in states if state.shape == states[0].shape]
  return {"all_hidden": torch.stack(same)} | ({"last_hidden": states[-1]} if len(same) < len(states) else {})


def record_causal(model, rng, earlier, length=20):
  ids = random_tokens(rng, model, 2, length)
  inputs = {"input_ids": ids, "labels": sample_labels(rng, ids, 0.8)}
  out = forward(model, **inputs, output_hidden_states=True)
  padded, mask = random_rows(rng, model, (length, length - 7))
  prompt, _, sequences = choose_greedy(model, lambda: random_rows(rng, model, (7,)), new=12)
  left, left_mask, left_sequences = choose_greedy(model, lambda: random_rows(rng, model, (9, 5), left=True), new=8)
  return {
    **inputs,
    "loss": out.loss,
    "logits": out.logits,
    **record_hidden(out.hidden_states),
    "padded_ids": padded,
    "padded_mask": mask,
    "padded_logits": forward(model, input_ids=padded, attention_mask=mask).logits,
    "gen_prompt": prompt,
    "gen_sequences": sequences,
    "left_ids": left,
    "left_mask": left_mask,
    "left_sequences": left_sequences,
    **record_training(model, inputs),
  }


def record_long_text(model, rng, earlier):
  ids = random_tokens(rng, model, 2, 36)
  return {"input_ids_long": ids, "logits_long": forward(copy.deepcopy(model), input_ids=ids).logits}


def record_routing(model, rng, earlier):
  inputs = {name: earlier[name] for name in ("input_ids", "labels")}
  out = forward(model, **inputs, output_router_logits=True)
  padded = {"input_ids": earlier["padded_ids"], "attention_mask": earlier["padded_mask"]}
  logits = torch.stack(out.router_logits)
  chosen = logits.topk(model.config.num_experts_per_tok + 1).values
  assert (chosen[..., -2] - chosen[..., -1]).min() > MARGIN, "a near tie decides which expert is chosen"
  return {
    "router_logits": logits,
    "aux_loss": out.aux_loss,
    "loss_with_aux": out.loss,
    "padded_aux_loss": forward(model, **padded, output_router_logits=True).aux_loss,
  }


def record_beams(model, rng, earlier):
  """Record beam searches with every stopping rule, for the prompts and the eos that give the most different results."""
  perturbed = copy.deepcopy(model)
  for weight in perturbed.parameters():
    weight.data *= 1 + 1e-4 * torch.from_numpy(rng.standard_normal(weight.shape)).float()
  prompts = [random_rows(rng, model, (9, 5), left=not model.config.is_encoder_decoder) for _ in range(20)]
  free = [
    (prompt, new_tokens(model, prompt, search_tokens(model, *prompt, **beam_settings(model, NEVER)[-1])))
    for prompt in prompts
  ]
  free.sort(key=lambda entry: -count_different(entry[1]))
  tried = [
    (prompt, end, [search_tokens(model, *prompt, **settings) for settings in beam_settings(model, end)])
    for prompt, continuation in free[:5]
    for end in sorted(set(continuation.flatten().tolist()) - {0})
  ]
  tried.sort(key=lambda entry: -count_results(entry[2]))
  prompt, end, outs = next(entry for entry in tried if is_robust(model, perturbed, *entry))
  print(f"  beams end with {end}: {count_results(outs)} results of {len(outs)} searches")
  settings = {"beam_settings": np.array(json.dumps(beam_settings(model, end)))}
  sequences = {f"beam_{i}_sequences": out.sequences for i, out in enumerate(outs)}
  scores = {f"beam_{i}_scores": out.sequences_scores for i, out in enumerate(outs)}
  return {"beam_ids": prompt[0], "beam_mask": prompt[1], **settings, **sequences, **scores}


def beam_settings(model, end):
  shared = {"num_beams": 3, "max_new_tokens": 10, "pad_token_id": model.config.pad_token_id or 0, "eos_token_id": end}
  kinds = itertools.product((1.0, 2.0, -1.0), (False, True, "never"))
  result = [{**shared, "length_penalty": penalty, "early_stopping": stop} for penalty, stop in kinds]
  return [*result, {**result[0], "num_return_sequences": 3}]


def new_tokens(model, prompt, out):
  return out.sequences[:, 1 if model.config.is_encoder_decoder else prompt[0].shape[1] :]


def count_results(outs):
  return len({json.dumps(out.sequences.tolist()) for out in outs})


def is_robust(model, perturbed, prompt, end, outs):
  """Whether sequences end early, and neither they nor their order depend on near ties."""
  ends_early = any((new_tokens(model, prompt, out)[:, :-1] == end).any() for out in outs)
  gaps = []
  for settings in beam_settings(model, end):
    scores = search_tokens(model, *prompt, **{**settings, "num_return_sequences": 3}).sequences_scores.reshape(2, 3)
    gaps.append((scores[:, :-1] - scores[:, 1:])[:, : settings.get("num_return_sequences", 1)].min())
  again = [search_tokens(perturbed, *prompt, **settings) for settings in beam_settings(model, end)]
  return ends_early and min(gaps) > 1e-3 and all(torch.equal(a.sequences, b.sequences) for a, b in zip(outs, again))


def random_sentences(model, rng):
  """Return rows of different lengths, each with two sentences if the model has token types."""
  ids, mask = random_rows(rng, model, (24, 15, 7))
  inputs = {"input_ids": ids, "attention_mask": mask}
  if getattr(model.config, "type_vocab_size", 1) > 1:
    inputs["token_type_ids"] = (torch.arange(24)[None] >= torch.tensor([[10], [6], [4]])).long() * mask
  return inputs


def record_masked_lm(model, rng, earlier):
  inputs = random_sentences(model, rng)
  mask = inputs["attention_mask"]
  inputs["labels"] = sample_labels(rng, random_tokens(rng, model, *mask.shape), 0.3, mask == 1)
  out = forward(model, **inputs, output_hidden_states=True)
  result = {"loss": out.loss, "logits": out.logits, "all_hidden": torch.stack(out.hidden_states)}
  return {**inputs, **result, **record_training(model, inputs)}


def record_masked_lm_pairs(model, rng, earlier):
  inputs = random_sentences(model, rng)
  mask = inputs["attention_mask"]
  labels = sample_labels(rng, random_tokens(rng, model, *mask.shape), 0.3, mask == 1)
  inputs_and_labels = {**inputs, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1])}
  out = forward(model, **inputs_and_labels, output_hidden_states=True)
  return {
    **inputs_and_labels,
    "loss": out.loss,
    "logits": out.prediction_logits,
    "nsp_logits": out.seq_relationship_logits,
    "all_hidden": torch.stack(out.hidden_states),
    "pooler_output": forward(model.base_model, **inputs).pooler_output,
    **record_training(model, inputs_and_labels),
  }


def record_seq2seq(model, rng, earlier):
  ids, mask = random_rows(rng, model, (18, 11, 6))
  targets, target_mask = random_rows(rng, model, (12, 9, 5))
  inputs = {"input_ids": ids, "attention_mask": mask, "labels": sample_labels(rng, targets, 1, target_mask == 1)}
  out = forward(model, **inputs, output_hidden_states=True)
  gen_ids, gen_mask, sequences = choose_greedy(model, lambda: random_rows(rng, model, (14, 8)), new=12)
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
    **record_training(model, inputs),
  }


def record_sequence_head(model, rng, earlier):
  inputs = random_sentences(model, rng)
  labels = rng.standard_normal(3).astype(np.float32) if model.config.num_labels == 1 else np.array([2, 0, 1])
  inputs["labels"] = torch.from_numpy(labels)
  out = forward(model, **inputs)
  return {**inputs, "loss": out.loss, "logits": out.logits}


def record_token_head(model, rng, earlier):
  inputs = random_sentences(model, rng)
  labels = torch.from_numpy(rng.integers(0, model.config.num_labels, inputs["input_ids"].shape))
  inputs["labels"] = sample_labels(rng, labels, 0.8, inputs["attention_mask"] == 1)
  out = forward(model, **inputs)
  return {**inputs, "loss": out.loss, "logits": out.logits}


def record_span_head(model, rng, earlier):
  inputs = random_sentences(model, rng)
  inputs |= {"start_positions": torch.tensor([3, 0, 2]), "end_positions": torch.tensor([9, 0, 5])}
  out = forward(model, **inputs)
  return {**inputs, "loss": out.loss, "start_logits": out.start_logits, "end_logits": out.end_logits}
