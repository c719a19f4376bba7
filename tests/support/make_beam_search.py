"""Write testdata/beam_search/transformers.npz: results of Transformers' beam search, which ours must equal.

  pip install torch==2.13.0 transformers
  python -m tests.support.make_beam_search

The tests need neither package. The model is a table: the logits of the next token depend on the last two. Transformers
is also compared with `reference_beam_search`, for many more random settings than are stored.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tests.support.beam_search_reference import PAD_ID, VOCAB_SIZE, biased_logits, reference_beam_search

PATH = Path(__file__).parents[1] / "testdata" / "beam_search" / "transformers.npz"
NUM_STORED, NUM_COMPARED = 24, 600


def random_case(rng):
  """Return arguments of `generate`, a bias of end tokens, prompts [B L] and their mask (padding on the left)."""
  ends = sorted(rng.choice(PAD_ID, rng.integers(0, 4), replace=False).tolist())
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
  prompts = np.where(mask, rng.integers(0, PAD_ID, (rows, length)), PAD_ID).astype(np.int32)
  return settings, float(rng.choice([0.0, 1.0, 2.0, -1.0])), prompts, mask


def transformers_search(table, settings, prompts, mask):
  """Return sequences [B R L] and scores [B R] of Transformers."""
  import torch
  from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
  from transformers.modeling_outputs import CausalLMOutput

  class TableModel(PreTrainedModel, GenerationMixin):
    config_class = PretrainedConfig

    def __init__(self):
      super().__init__(PretrainedConfig(vocab_size=VOCAB_SIZE))
      self.table = torch.nn.Parameter(torch.tensor(table), requires_grad=False)

    def forward(self, input_ids, attention_mask=None, **kwargs):
      before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
      return CausalLMOutput(logits=self.table[before, input_ids])

  eos = settings["eos_id"]
  config = GenerationConfig(
    **{**settings, "eos_id": None} | {"eos_token_id": eos or None},
    pad_token_id=PAD_ID,
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
  tables = rng.normal(size=(4, VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32) * np.float32(1.5)
  arrays, compared, ties = {"tables": tables}, 0, 0
  for case in range(NUM_COMPARED):
    settings, bias, prompts, mask = random_case(rng)
    which = int(rng.integers(len(tables)))
    table = biased_logits(tables[which], bias, settings["eos_id"])
    sequences, scores = transformers_search(table, settings, prompts, mask)
    new = np.full((*scores.shape, settings["max_new_tokens"]), PAD_ID, np.int32)
    new[:, :, : sequences.shape[2] - prompts.shape[1]] = sequences[:, :, prompts.shape[1] :]
    for row, prompt in enumerate(prompts):
      prompt = prompt[mask[row] == 1].tolist()
      found = reference_beam_search(lambda tokens, table=table: table[tokens[-2], tokens[-1]], prompt, **settings)
      assert len(found) == settings["num_beams"], (case, settings)
      exact = [score for score, _ in found]
      np.testing.assert_allclose(scores[row], exact, rtol=2e-5, err_msg=str((case, row, settings)))
      for beam, (score, tokens) in enumerate(found):
        same = new[row, beam, : len(tokens)].tolist() == tokens
        tie = sum(np.isclose(score, other, rtol=1e-6) for other in exact) > 1  # the same tokens in another order
        assert same or (tie and case >= NUM_STORED), (case, row, beam, settings)
        ties += not same
        compared += 1
        new[row, beam, len(tokens) :] = PAD_ID  # Transformers fills with the end token in some cases
    if case < NUM_STORED:
      arrays |= {f"{case}/prompts": prompts, f"{case}/mask": mask, f"{case}/new": new, f"{case}/scores": scores}
      arrays[f"{case}/settings"] = np.array(json.dumps({**settings, "table": which, "bias": bias}))
  PATH.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(PATH, **arrays)
  print(f"{compared} hypotheses of {NUM_COMPARED} settings equal the reference, {ties} of them up to the order of ties")
  print(f"{NUM_STORED} settings are in {PATH}")


if __name__ == "__main__":
  sys.exit(main())
