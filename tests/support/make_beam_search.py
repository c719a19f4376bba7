"""Makes testdata/beam_search/transformers.npz: what Transformers' beam search finds, which ours must find too.

  python tests/support/make_beam_search.py            # needs torch and transformers 5, which the tests do not

The model is a table: the logits of the next token are those of the last two. It is also held against `reference`, beam
search step by step in NumPy on lists, for many more random settings than are stored.
"""

import json
import sys
from pathlib import Path

import numpy as np

PATH = Path(__file__).parents[1] / "testdata" / "beam_search" / "transformers.npz"
V, PAD = 9, 8
STORED, CHECKED = 24, 600


def log_softmax(logits):
  logits = logits - logits.max()
  return logits - np.log(np.exp(logits).sum())


def reference(
  next_logits,
  prompt,
  *,
  num_beams,
  max_new_tokens,
  eos_id=(),
  length_penalty=1.0,
  early_stopping=False,
  repetition_penalty=1.0,
):
  """Beam search for one prompt: [(score, new tokens)], best first.

  Args:
    next_logits: list of tokens -> Float[V].
    prompt: list of tokens, without padding.
  """
  live, finished, heuristic = [(0.0, [])], [], True
  for length in range(1, max_new_tokens + 1):
    candidates = []
    for total, tokens in live:
      scores = log_softmax(np.asarray(next_logits(prompt + tokens), np.float64))
      for token in set(prompt + tokens):
        scores[token] *= repetition_penalty  # log-probabilities are negative
      candidates += [(total + score, [*tokens, token]) for token, score in enumerate(scores)]
    candidates = sorted(candidates, key=lambda c: -c[0])[: max(2, 1 + len(eos_id)) * num_beams]
    ends = [tokens[-1] in eos_id or length == max_new_tokens for _, tokens in candidates]
    full = early_stopping is True and len(finished) == num_beams
    if heuristic and not full:
      new = [(total / length**length_penalty, tokens) for (total, tokens), end in zip(candidates, ends) if end]
      inside = [end for end in ends[:num_beams] if end]  # only the best `num_beams` candidates may end
      finished = sorted(finished + new[: len(inside)], key=lambda c: -c[0])[:num_beams]
    live = [c for c, end in zip(candidates, ends) if not end][:num_beams]
    if not live:
      break
    hoped = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
    if len(finished) == num_beams:
      heuristic &= live[0][0] / hoped**length_penalty > finished[-1][0]
      if not heuristic or early_stopping is True:
        break
  return finished


def random_case(rng):
  """Settings of `generate` in our words, a bias of end tokens, prompts [B L] and their mask (padding on the left)."""
  ends = sorted(rng.choice(PAD, rng.integers(0, 4), replace=False).tolist())
  settings = {
    "num_beams": int(rng.integers(2, 6)),
    "max_new_tokens": int(rng.integers(1, 13)),
    "length_penalty": float(rng.choice([1.0, 1.0, 0.0, 2.0, -1.0, 0.6, -0.3])),
    "early_stopping": [False, True, "never"][rng.integers(3)],
    "repetition_penalty": float(rng.choice([1.0, 1.0, 1.3, 0.8])),
    "eos_id": ends,
  }
  rows, length = 3, 5
  mask = (np.arange(length) >= rng.integers(0, 4, (rows, 1))).astype(np.int32)
  prompts = np.where(mask, rng.integers(0, PAD, (rows, length)), PAD).astype(np.int32)
  return settings, float(rng.choice([0.0, 1.0, 2.0, -1.0])), prompts, mask


def logits_of(table, bias, eos_id):
  table = table.copy()
  table[:, :, eos_id] += np.float32(bias)
  return table


def transformers_search(table, settings, prompts, mask):
  """Transformers' own: sequences [B R L] with its padding, scores [B R]."""
  import torch
  from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
  from transformers.modeling_outputs import CausalLMOutput

  class TableModel(PreTrainedModel, GenerationMixin):
    config_class = PretrainedConfig

    def __init__(self):
      super().__init__(PretrainedConfig(vocab_size=V))
      self.table = torch.nn.Parameter(torch.tensor(table), requires_grad=False)

    def forward(self, input_ids, attention_mask=None, **kwargs):
      before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
      return CausalLMOutput(logits=self.table[before, input_ids])

  eos = settings["eos_id"]
  config = GenerationConfig(
    **{**settings, "eos_id": None} | {"eos_token_id": eos or None},
    pad_token_id=PAD,
    do_sample=False,
    use_cache=False,
    num_return_sequences=settings["num_beams"],
    return_dict_in_generate=True,
    output_scores=True,
  )
  model = TableModel().eval()
  out = model.generate(torch.tensor(prompts).long(), attention_mask=torch.tensor(mask).long(), generation_config=config)
  shape = (len(prompts), settings["num_beams"])
  return out.sequences.numpy().reshape(*shape, -1), out.sequences_scores.numpy().reshape(shape)


def main():
  import torch

  torch.set_num_threads(1)
  rng = np.random.default_rng(0)
  tables = rng.normal(size=(4, V, V, V)).astype(np.float32) * np.float32(1.5)
  arrays, compared, ties = {"tables": tables}, 0, 0
  for case in range(CHECKED):
    settings, bias, prompts, mask = random_case(rng)
    which = int(rng.integers(len(tables)))
    table = logits_of(tables[which], bias, settings["eos_id"])
    sequences, scores = transformers_search(table, settings, prompts, mask)
    new = np.full((*scores.shape, settings["max_new_tokens"]), PAD, np.int32)
    new[:, :, : sequences.shape[2] - prompts.shape[1]] = sequences[:, :, prompts.shape[1] :]
    for row, prompt in enumerate(prompts):
      prompt = prompt[mask[row] == 1].tolist()
      found = reference(lambda tokens, table=table: table[tokens[-2], tokens[-1]], prompt, **settings)
      assert len(found) == settings["num_beams"], (case, settings)
      exact = [score for score, _ in found]
      np.testing.assert_allclose(scores[row], exact, rtol=2e-5, err_msg=str((case, row, settings)))
      for beam, (score, tokens) in enumerate(found):
        same = new[row, beam, : len(tokens)].tolist() == tokens
        tie = sum(np.isclose(score, other, rtol=1e-6) for other in exact) > 1  # the same transitions in another order
        assert same or (tie and case >= STORED), (case, row, beam, settings)
        ties += not same
        compared += 1
        new[row, beam, len(tokens) :] = PAD  # Transformers fills with the end token in some cases
    if case < STORED:
      arrays |= {f"{case}/prompts": prompts, f"{case}/mask": mask, f"{case}/new": new, f"{case}/scores": scores}
      arrays[f"{case}/settings"] = np.array(json.dumps({**settings, "table": which, "bias": bias}))
  PATH.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(PATH, **arrays)
  print(
    f"{compared} hypotheses of {CHECKED} settings are those of the reference, {ties} of them in another order of equals"
  )
  print(f"{STORED} settings are in {PATH}")


if __name__ == "__main__":
  sys.exit(main())
