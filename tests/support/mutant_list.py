"""The mistakes that `mutants.py` plants, by subject, each with tests of the default tier that fail on it."""

from tests.support.mutants import Mutant

BEAMS = "tests/inference/beam_search_test.py::"
CONTRASTIVE = "tests/objectives/contrastive_test.py::"
CRF = "tests/objectives/crf_test.py::"
FINETUNE = "tests/training/trainable_test.py::"
GENERATION = "tests/inference/generation_test.py::"
FAMILIES = "tests/interop/families_test.py::"
INVARIANTS = "tests/training/invariants_test.py::"
KERNELS = "tests/models/attention_test.py::"
LAYERS = "tests/models/layers_test.py::"
MASKS = "tests/models/masks_test.py::"
MUP = "tests/models/mup_test.py::"
MASKED_LM = "tests/objectives/masked_lm_test.py::"
OBJECTIVES = "tests/objectives/objectives_test.py::"
OPTIM = "tests/training/optimizers_test.py::"
PACKING = "tests/data/packing_test.py::"
PEFT = "tests/interop/peft_test.py::"
PIPELINE = "tests/data/pipeline_test.py::"
PREFERENCE = "tests/objectives/preference_test.py::"
ROTARY = "tests/models/rotary_test.py::"
SAMPLING = "tests/inference/sampling_test.py::"
SEQ2SEQ = "tests/objectives/seq2seq_test.py::"
SFT = "tests/objectives/sft_test.py::"
STEP = "tests/training/step_test.py::"
VERIFY = "tests/diagnostics/verify_test.py::"

LOSSES = (
  Mutant(
    "tiled-logits-average-the-gradient",
    "training/step.py",
    "return function(self.unembed(parts[0]), *parts[1:])",
    "hidden = jax.lax.stop_gradient(parts[0])\n"
    "      return function(self.unembed(hidden + (parts[0] - hidden) / self.tiles), *parts[1:])",
    (INVARIANTS + "test_tiled_logits_give_the_untiled_loss_and_gradients[gpt causal_lm-4]",),
    "with logit_tiles the loss is right, and the body of the model learns at a fraction of the rate",
  ),
  Mutant(
    "tiled-logits-permute-the-tokens",
    "training/step.py",
    "jnp.moveaxis(x, 0, 2).reshape(x.shape[1], length), each)",
    "jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length), each)",
    (INVARIANTS + "test_tiled_logits_give_the_untiled_loss_and_gradients[gpt causal_lm-4]",),
    "with logit_tiles losses are multiplied by the weights of other tokens",
  ),
  Mutant(
    "accumulation-means-of-microbatch-means",
    "training/step.py",
    "value = objective_value(sums, weights, objective)",
    "value = objective_value(sums, objective.weights(microbatch), objective) / accum",
    (STEP + "test_gradient_with_dropout_accumulated_on_mesh_equals_one_device[gpt causal_lm]",),
    "tokens in a microbatch with much padding count more",
  ),
  Mutant(
    "one-denominator-for-all-terms",
    "training/step.py",
    "scale = jnp.where(weights[term] > 0, coefficient / jnp.maximum(weights[term], 1e-30), 0.0)",
    "weight = next(iter(weights.values()))\n"
    "    scale = jnp.where(weight > 0, coefficient / jnp.maximum(weight, 1e-30), 0.0)",
    (STEP + "test_gradient_is_the_sum_of_gradients_of_single_terms[bert masked_lm]",),
    "the sentence loss of BERT is divided by the number of masked tokens",
  ),
  Mutant(
    "denominator-counts-padding",
    "objectives/losses.py",
    "return dict.fromkeys(self.coefficients, jnp.sum(batch.weights[self.term]))",
    "return dict.fromkeys(self.coefficients, jnp.float32(batch.weights[self.term].size))",
    (STEP + "test_causal_lm_metrics_equal_their_formula",),
    "the more padding a batch has, the smaller its gradient",
  ),
  Mutant(
    "mean-of-local-means",
    "objectives/losses.py",
    "sums = {self.term: jnp.sum(smoothed * weight)}",
    "from llmjax.distributed import sharding\n\n"
    '    axes = sharding.mesh_axes_of("act_batch") + sharding.mesh_axes_of("act_len")\n\n'
    "    def local(loss, weight):\n"
    "      count = jnp.sum(weight)\n"
    "      total = jnp.sum(loss * weight)\n"
    "      return jax.lax.pmean(total / count, axes) * jax.lax.psum(count, axes) if axes else total\n\n"
    '    names = ("act_batch", "act_len")\n'
    "    sums = {self.term: sharding.per_device(local, (names, names), ())(smoothed, weight)}",
    (STEP + "test_gradient_with_dropout_accumulated_on_mesh_equals_one_device[gpt causal_lm]",),
    "on several devices, tokens of a device with much padding count more",
  ),
  Mutant(
    "label-smoothing-without-the-normaliser",
    "objectives/losses.py",
    "uniform = log_z - jnp.mean(logits, axis=-1)",
    "uniform = -jnp.mean(logits, axis=-1)",
    (STEP + "test_causal_lm_metrics_equal_their_formula",),
  ),
  Mutant(
    "balance-loss-without-number-of-experts",
    "objectives/losses.py",
    "jnp.mean(routing.counts.shape[1] * jnp.sum(shares * probabilities, axis=1))",
    "jnp.mean(jnp.sum(shares * probabilities, axis=1))",
    (FAMILIES + "test_routing_and_balance_loss_equal_transformers[mixtral]",),
    "objective.balance means something else for every number of experts",
  ),
  Mutant(
    "balance-loss-counts-padding",
    "models/moe.py",
    "is_token = (segments.reshape(-1) > 0).astype(jnp.float32)",
    "is_token = jnp.ones(segments.size, jnp.float32)",
    (FAMILIES + "test_routing_with_padding_counts_real_tokens_only",),
  ),
  Mutant(
    "label-is-the-input-token",
    "objectives/causal_lm.py",
    "labels = ids[1:]",
    "labels = ids[:-1]",
    (INVARIANTS + "test_causal_labels_are_the_next_tokens",),
    "the model learns to copy, and its loss falls to zero",
  ),
  Mutant(
    "windows-of-a-document-overlap",
    "objectives/causal_lm.py",
    "range(0, len(ids) - 1, seq_len)]",
    "range(0, len(ids) - 1, seq_len - 1)]",
    (PIPELINE + "test_evaluation_has_every_token_once[1-3]",),
    "some tokens of long documents are learned, and evaluated, twice",
  ),
  Mutant(
    "masked-lm-learns-unmasked-tokens",
    "objectives/masked_lm.py",
    'weights["mlm"] = np.where(selected, ids, 0), selected',
    'weights["mlm"] = np.where(selected, ids, 0), ~self.tokenizer.special[ids]',
    (MASKED_LM + "test_masked_lm_masks_the_configured_shares_of_ordinary_tokens",),
  ),
  Mutant(
    "prefix-lm-learns-the-prefix",
    "objectives/prefix_lm.py",
    'weights={"nll": position >= prefix_length - 1}',
    'weights={"nll": position >= 0}',
    (OBJECTIVES + "test_prefix_lm_prefixes_are_uniform_and_the_rest_has_weights",),
  ),
  Mutant(
    "seq2seq-learns-the-prompt",
    "objectives/seq2seq.py",
    'weights={"nll": has_loss[1:].astype(np.float32)},',
    'weights={"nll": has_loss[:-1].astype(np.float32)},',
    (
      SEQ2SEQ + "test_loss_of_a_decoder_covers_targets_only",
      PREFERENCE + "test_preference_losses_equal_their_formulas[sigmoid]",
    ),
    "the weights are one token late: the first token of an answer is not learned, a token after it is",
  ),
  Mutant(
    "chat-answers-without-their-end",
    "objectives/sft.py",
    "spans.append((common_prefix_length(prompt, ids), common_prefix_length(answered, ids)))",
    "spans.append((common_prefix_length(prompt, ids), common_prefix_length(answered, ids) - 1))",
    (SFT + "test_loss_weights_cover_each_answer_and_its_end[None]",),
    "a tuned model never ends its answer",
  ),
  Mutant(
    "preference-trains-the-reference",
    "objectives/preference.py",
    'jax.lax.stop_gradient(answer_log_probs(forward.auxiliary["reference"], batch, {}))',
    'answer_log_probs(forward.auxiliary["reference"], batch, {})',
    (PREFERENCE + "test_reference_model_gets_no_gradient",),
  ),
  Mutant(
    "contrastive-padding-is-a-negative",
    "objectives/contrastive.py",
    "scores = jnp.where(real[None], scores, float(np.finfo(np.float32).min))",
    "scores = scores + 0.0 * real[None]",
    (CONTRASTIVE + "test_info_nce_counts_ties_as_right_and_ignores_padding_rows",),
  ),
  Mutant(
    "contrastive-negatives-of-a-microbatch",
    "objectives/contrastive.py",
    "whole_batch = True",
    "whole_batch = False",
    (STEP + "test_gradient_unrolled_remat_accumulated_on_mesh_equals_scanned[bert contrastive]",),
    "with accum each text is told apart from fewer others",
  ),
  Mutant(
    "contrastive-temperature-multiplies",
    "objectives/contrastive.py",
    "scores = constrain(cosines / temperature,",
    "scores = constrain(cosines * temperature,",
    (CONTRASTIVE + "test_contrastive_loss_equals_its_formula[False-None]",),
  ),
)

ATTENTION = (
  Mutant(
    "packed-documents-see-each-other",
    "models/attention/masks.py",
    "same = query.segments[:, :, None] == key.segments[:, None, :]",
    "same = query.segments[:, :, None] > 0",
    (
      MASKS + "test_attention_mask_equals_its_definition[causal]",
      STEP + "test_gradient_of_a_document_ignores_other_documents_in_the_row[gpt causal_lm]",
      STEP + "test_token_attends_to_exactly_the_tokens_of_its_mask[encoder]",
    ),
  ),
  Mutant(
    "causal-mask-shows-the-next-token",
    "models/attention/masks.py",
    "visible &= ahead <= 0 if key.prefix is None else (ahead <= 0) | (key.prefix[:, None, :] > 0)",
    "visible &= ahead <= 1 if key.prefix is None else (ahead <= 1) | (key.prefix[:, None, :] > 0)",
    (
      MASKS + "test_attention_mask_equals_its_definition[causal]",
      STEP + "test_token_attends_to_exactly_the_tokens_of_its_mask[decoder]",
    ),
    "the label of every token can be read by the model",
  ),
  Mutant(
    "causal-mask-forgotten",
    "models/attention/masks.py",
    "  if causal:\n    visible &=",
    "  if False:\n    visible &=",
    (STEP + "test_token_attends_to_exactly_the_tokens_of_its_mask[decoder]",),
  ),
  Mutant(
    "prefix-forgotten",
    "models/attention/masks.py",
    "visible &= ahead <= 0 if key.prefix is None else (ahead <= 0) | (key.prefix[:, None, :] > 0)",
    "visible &= ahead <= 0",
    (
      MASKS + "test_attention_mask_equals_its_definition[prefix]",
      STEP + "test_token_attends_to_exactly_the_tokens_of_its_mask[prefix decoder]",
    ),
    "a bidirectional prompt is read causally",
  ),
  Mutant(
    "window-one-token-too-wide",
    "models/attention/masks.py",
    "visible &= jnp.abs(ahead) < window if causal",
    "visible &= jnp.abs(ahead) <= window if causal",
    (
      MASKS + "test_attention_mask_equals_its_definition[causal window]",
      STEP + "test_token_attends_to_exactly_the_tokens_of_its_mask[windowed decoder]",
    ),
  ),
  Mutant(
    "encoder-window-not-halved",
    "models/attention/masks.py",
    "else jnp.abs(ahead) <= window // 2",
    "else jnp.abs(ahead) <= window",
    (
      MASKS + "test_attention_mask_equals_its_definition[local]",
      STEP + "test_token_attends_to_exactly_the_tokens_of_its_mask[local encoder]",
    ),
    "local layers of ModernBERT see twice as far",
  ),
  Mutant(
    "encoder-is-causal",
    "models/transformer.py",
    'c, causal = self.cfg, stack.cross or self.cfg.stacks == "decoder"',
    "c, causal = self.cfg, True",
    (STEP + "test_token_attends_to_exactly_the_tokens_of_its_mask[encoder]",),
  ),
  Mutant(
    "cross-attention-sees-other-documents",
    "models/transformer.py",
    'masks["cross"] = attention_mask(tokens, memory_tokens, causal=False)',
    "shape = (*tokens.segments.shape, memory_tokens.segments.shape[1])\n"
    '      masks["cross"] = jnp.broadcast_to(memory_tokens.segments[:, None] > 0, shape)',
    (STEP + "test_target_attends_to_its_whole_input_and_earlier_targets",),
    "with packing, a target reads the inputs of its neighbours in the row",
  ),
  Mutant(
    "query-heads-grouped-in-turn",
    "models/attention/masks.py",
    "grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)",
    "grouped = query.reshape(batch, length, heads // kv_heads, kv_heads, width).swapaxes(2, 3)",
    (MASKS + "test_xla_attention_equals_softmax_of_masked_scores_in_float64[causal-2]",),
    "with grouped-query attention, query head h reads key head h % K: checkpoints give other logits",
  ),
  Mutant(
    "softcap-not-scaled-back",
    "models/attention/masks.py",
    "scores = settings.softcap * jnp.tanh(scores / settings.softcap)",
    "scores = jnp.tanh(scores / settings.softcap)",
    (MASKS + "test_xla_attention_equals_softmax_of_masked_scores_in_float64[causal-2]",),
  ),
  Mutant(
    "relative-positions-reversed",
    "models/attention/masks.py",
    "ahead = key[:, None, :] - query[:, :, None]",
    "ahead = query[:, :, None] - key[:, None, :]",
    (MASKS + "test_relative_buckets_equal_the_formula_of_t5[True-32-128]",),
  ),
  Mutant(
    "relative-buckets-begin-one-late",
    "models/attention/masks.py",
    "bucket += distance >= exact + int(np.argmax(wide >= number))",
    "bucket += distance > exact + int(np.argmax(wide >= number))",
    (MASKS + "test_relative_buckets_equal_the_formula_of_t5[True-32-128]",),
  ),
  Mutant(
    "rotary-pairs-interleaved",
    "models/rotary.py",
    "first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)",
    "first, second = x[..., 0 : 2 * half : 2].astype(jnp.float32), x[..., 1 : 2 * half : 2].astype(jnp.float32)",
    (ROTARY + "test_rotary_embedding_equals_complex_rotation",),
    "pairs (2i, 2i + 1) are rotated, the layout of GPT-J: Llama checkpoints give other logits",
  ),
  Mutant(
    "rotary-turns-backwards",
    "models/rotary.py",
    "[first * cos - second * sin, second * cos + first * sin]",
    "[first * cos + second * sin, second * cos - first * sin]",
    (ROTARY + "test_rotary_embedding_equals_complex_rotation",),
  ),
  Mutant(
    "local-layers-use-the-global-rotary-base",
    "models/transformer.py",
    'if kind == "local" and c.local_rotary_base is not None:',
    'if kind == "global" and c.local_rotary_base is not None:',
    (FAMILIES + "test_forward_of_each_family_equals_transformers[modernbert]",),
  ),
)

# Each attention kernel, and its backward pass.
ATTENTION_KERNELS = (
  Mutant(
    "chunked-softmax-is-not-rescaled",
    "models/attention/blockwise.py",
    "return rescale[..., None] * out + new_out, new_max, total",
    "return out + new_out, new_max, total",
    (KERNELS + "test_chunked_attention_equals_reference[packed]",),
    "long sequences attend to the wrong tokens whenever a later block holds the highest score",
  ),
  Mutant(
    "chunked-dropout-by-position-in-document",
    "models/attention/blockwise.py",
    "inputs.heads, query_tokens.ids, key_tokens.ids, settings.dropout",
    "inputs.heads, query_tokens.positions, key_tokens.positions, settings.dropout",
    (KERNELS + "test_chunked_attention_equals_reference[all]",),
    "documents of a row drop the same weights; the kernels give different losses",
  ),
  Mutant(
    "dropout-missing-from-dv",
    "models/attention/blockwise.py",
    "(weights * keep).astype(d_out.dtype)",
    "weights.astype(d_out.dtype)",
    (KERNELS + "test_chunked_attention_equals_reference[all]",),
    "gradients of values are wrong with attention dropout",
  ),
  Mutant(
    "softmax-gradient-without-delta",
    "models/attention/blockwise.py",
    "pull(weights * (d_weights * keep - per_score(delta)))",
    "pull(weights * d_weights * keep)",
    (KERNELS + "test_chunked_attention_equals_reference[packed]",),
    "gradients of queries and keys are wrong",
  ),
  Mutant(
    "dk-of-the-last-query-block-alone",
    "models/attention/blockwise.py",
    "jax.tree.map(jnp.add, gradients, (new_query",
    "jax.tree.map(jnp.add, (*gradients[:2], jnp.zeros_like(gradients[2]), gradients[3]), (new_query",
    (KERNELS + "test_chunked_attention_equals_reference[packed]",),
    "gradients of keys are wrong for sequences longer than a block",
  ),
  Mutant(
    "ring-dq-of-the-last-device-alone",
    "models/attention/blockwise.py",
    "lax.scan(visit_key_block, (d_query, d_table), (key_blocks, d_key_blocks))",
    "lax.scan(visit_key_block, (jnp.zeros_like(d_query), d_table), (key_blocks, d_key_blocks))",
    (KERNELS + "test_ring_attention_equals_reference[c8-left padding]",),
    "context parallelism alone: a query's gradient comes from the keys of one device",
  ),
  Mutant(
    "ring-dk-of-the-last-device-alone",
    "models/attention/blockwise.py",
    "    key_blocks, d_key_blocks = rotating\n",
    "    key_blocks, (d_key, d_value) = rotating\n    d_key_blocks = jnp.zeros_like(d_key), d_value\n",
    (KERNELS + "test_ring_attention_equals_reference[c8-left padding]",),
    "context parallelism alone: the gradient of keys comes from the queries of one device",
  ),
  Mutant(
    "ring-dv-of-the-last-device-alone",
    "models/attention/blockwise.py",
    "    key_blocks, d_key_blocks = rotating\n",
    "    key_blocks, (d_key, d_value) = rotating\n    d_key_blocks = d_key, jnp.zeros_like(d_value)\n",
    (KERNELS + "test_ring_attention_equals_reference[c8-left padding]",),
    "context parallelism alone: the gradient of values comes from the queries of one device",
  ),
  Mutant(
    "ring-keys-leave-their-segments",
    "models/attention/blocks.py",
    "return (state, jax.tree.map(send, rotating)), None",
    "return (state, jax.tree.map(lambda x: x if x.dtype == jnp.int32 else send(x), rotating)), None",
    (KERNELS + "test_ring_attention_equals_reference[d2c2t2-cross of odd lengths with dropout]",),
    "context parallelism alone: masks are made from the segments of other keys",
  ),
  Mutant(
    "ring-sends-the-other-way",
    "models/attention/blocks.py",
    "perm = [(i, (i + 1) % devices) for i in range(devices)]",
    "perm = [(i, (i + 2) % devices) for i in range(devices)]",
    (KERNELS + "test_ring_attention_equals_reference[c8-left padding]",),
    "context parallelism over an even number of devices: each sees half of the keys twice",
  ),
  Mutant(
    "ring-order-not-restored",
    "models/attention/blocks.py",
    "return exchange_halves(layout, x, inverse=True) if layout.zigzag else x",
    "return exchange_halves(layout, x) if layout.zigzag else x",
    (KERNELS + "test_ring_attention_equals_reference[c8-left padding]",),
    "context parallelism alone: outputs stand at the places of other tokens",
  ),
  Mutant(
    "ring-relative-table-not-summed",
    "models/attention/blockwise.py",
    "d_table = lax.psum(d_table, layout.replicated).astype(relative.dtype)",
    "d_table = d_table.astype(relative.dtype)",
    (KERNELS + "test_ring_attention_equals_reference[c4t2-all]",),
    "the gradient of T5's relative biases is that of one device's queries",
  ),
  Mutant(
    "splash-without-softcap",
    "models/attention/splash.py",
    "attn_logits_soft_cap=settings.softcap,",
    "attn_logits_soft_cap=None,",
    (KERNELS + "test_splash_attention_interpreted_equals_reference[bidirectional window]",),
    "Gemma on TPU differs from Gemma elsewhere",
  ),
  Mutant(
    "splash-without-scale",
    "models/attention/splash.py",
    "(query * settings.scale, key, value)",
    "(query, key, value)",
    (KERNELS + "test_splash_attention_interpreted_equals_reference[packed]",),
  ),
  Mutant(
    "splash-window-one-token-too-wide",
    "models/attention/splash.py",
    "(settings.window - 1, 0) if settings.causal",
    "(settings.window, 0) if settings.causal",
    (KERNELS + "test_splash_attention_interpreted_equals_reference[window]",),
  ),
  Mutant(
    "cudnn-without-scale",
    "models/attention/cudnn.py",
    'mask[:, None], scale=settings.scale, implementation="cudnn"',
    'mask[:, None], implementation="cudnn"',
    (INVARIANTS + "test_cudnn_kernel_gets_scale_mask_and_bias",),
    "on GPU, models with a scale of their own (T5, Gemma) differ",
  ),
  Mutant(
    "cudnn-without-relative-bias",
    "models/attention/cudnn.py",
    "bias = masks.relative_bias(relative, query_tokens, key_tokens, settings).astype(query.dtype)",
    "bias = None",
    (INVARIANTS + "test_cudnn_kernel_gets_scale_mask_and_bias",),
    "T5 on GPU has no positions",
  ),
)

MODELS = (
  Mutant(
    "norm-scale-not-zero-centered",
    "models/layers.py",
    'y = y * (1 + vector("scale", nn.initializers.zeros))',
    'y = y * vector("scale", nn.initializers.zeros)',
    (FAMILIES + "test_forward_of_each_family_equals_transformers[gemma]",),
    "Gemma checkpoints give other logits",
  ),
  Mutant(
    "tied-head-has-no-gradient",
    "models/layers.py",
    'jnp.einsum("BLD,VD->BLV", x.astype(self.dtype), self.table.astype(self.dtype))',
    'jnp.einsum("BLD,VD->BLV", x.astype(self.dtype), jax.lax.stop_gradient(self.table).astype(self.dtype))',
    (INVARIANTS + "test_tied_table_gets_the_sum_of_the_gradients_of_both_its_uses",),
    "tied embeddings learn from their use as inputs alone",
  ),
  Mutant(
    "tied-table-updated-twice",
    "models/layers.py",
    'jnp.einsum("BLD,VD->BLV", x.astype(self.dtype), self.table.astype(self.dtype))',
    'jnp.einsum("BLD,VD->BLV", x.astype(self.dtype), '
    "(2 * self.table - jax.lax.stop_gradient(self.table)).astype(self.dtype))",
    (INVARIANTS + "test_tied_table_gets_the_sum_of_the_gradients_of_both_its_uses",),
    "the gradient of the head is counted twice in the tied table",
  ),
  Mutant(
    "logit-softcap-forgotten",
    "models/transformer.py",
    "return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)",
    "return logits",
    (FAMILIES + "test_forward_of_each_family_equals_transformers[gemma2]",),
  ),
  Mutant(
    "dropout-not-rescaled",
    "models/layers.py",
    "return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)",
    "return jnp.where(keep, x, jnp.zeros((), x.dtype)).astype(x.dtype)",
    (LAYERS + "test_dropout_keeps_the_mean",),
  ),
  Mutant(
    "dropout-keyed-by-place-in-microbatch",
    "models/layers.py",
    "return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)",
    "return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows.shape[0]))",
    (STEP + "test_gradient_with_dropout_accumulated_on_mesh_equals_one_device[gpt causal_lm]",),
    "accum changes what is dropped, and the loss",
  ),
  Mutant(
    "dropout-keyed-by-row-of-the-device",
    "models/layers.py",
    "return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)",
    'return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows % (rows.shape[0] // num_shards("act_batch")))',
    (STEP + "test_gradient_with_dropout_accumulated_on_mesh_equals_one_device[gpt causal_lm]",),
    "the mesh changes what is dropped, and the loss",
  ),
  Mutant(
    "dropout-the-same-in-every-step",
    "training/step.py",
    "key = jax.random.fold_in(key, state.step)",
    "key = jax.random.fold_in(key, 0)",
    (INVARIANTS + "test_dropout_differs_between_steps",),
  ),
  Mutant(
    "router-weights-not-normalised",
    "models/moe.py",
    "  if normalize:",
    "  if not normalize:",
    (FAMILIES + "test_forward_of_each_family_equals_transformers[mixtral]",),
    "the weights of a token's experts do not sum to one: Mixtral checkpoints give other logits",
  ),
  Mutant(
    "experts-of-the-wrong-token",
    "models/moe.py",
    "rows = jnp.take(x.reshape(B * L, -1), order // k, axis=0)",
    "rows = jnp.take(x.reshape(B * L, -1), order % (B * L), axis=0)",
    (FAMILIES + "test_forward_of_each_family_equals_transformers[mixtral]",),
  ),
  Mutant(
    "expert-width-not-summed-over-devices",
    "models/moe.py",
    "return jax.lax.psum(y, width_axes) if width_axes else y",
    "return y",
    (STEP + "test_gradient_unrolled_remat_accumulated_on_mesh_equals_scanned[mixtral causal_lm]",),
    "under tensor parallelism a mixture of experts computes with a part of each expert",
  ),
  Mutant(
    "lora-scale-not-divided-by-rank",
    "config/model.py",
    "return self.alpha / self.rank",
    "return self.alpha",
    (PEFT + "test_logits_equal_peft[gpt2]",),
    "adapters from PEFT are applied too strongly",
  ),
  Mutant(
    "lora-forward-without-scale",
    "models/layers.py",
    "return x * jnp.asarray(lora.scale, x.dtype)",
    "return x",
    (FINETUNE + "test_merged_adapters_compute_the_same_logits[llama causal_lm]",),
  ),
  Mutant(
    "lora-merge-without-scale",
    "models/lora.py",
    "return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)",
    "return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)",
    (FINETUNE + "test_merged_adapters_compute_the_same_logits[llama causal_lm]",),
    "a merged model differs from the one that was trained",
  ),
  Mutant(
    "peft-rank-stabilised-scale-ignored",
    "interop/peft/lora_matrices.py",
    'return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))',
    "return float(alpha / rank)",
    (PEFT + "test_logits_equal_peft[t5]",),
  ),
  Mutant(
    "peft-rank-stabilised-scale-assumed",
    "interop/peft/lora_matrices.py",
    'return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))',
    "return float(alpha / math.sqrt(rank))",
    (PEFT + "test_logits_equal_peft[gpt2]",),
  ),
  Mutant(
    "peft-fused-rows-of-another-projection",
    "interop/peft/lora_matrices.py",
    "parts_b = [parameter_view(b, patterns_b, shapes_b, i) for i in range(count)]",
    "parts_b = [parameter_view(b, patterns_b, shapes_b, count - 1 - i) for i in range(count)]",
    (PEFT + "test_logits_equal_peft[gpt_neox]",),
    "an adapter of a fused query-key-value matrix is added to another of its parts",
  ),
  Mutant(
    "peft-alpha-pattern-ignored",
    "interop/peft/lora_matrices.py",
    'alpha = next(matching, config["lora_alpha"])',
    'alpha = config["lora_alpha"]',
    (PEFT + "test_logits_equal_peft[gpt2]",),
  ),
  Mutant(
    "huggingface-query-heads-transposed",
    "interop/families/tensor_names.py",
    'QUERY, KEY, OUT = "(H A) D -> D H A"',
    'QUERY, KEY, OUT = "(A H) D -> D H A"',
    (FAMILIES + "test_forward_of_each_family_equals_transformers[llama]",),
    "the rows of q_proj go to other heads: imported models write nonsense",
  ),
  Mutant(
    "huggingface-skipped-rows-are-read",
    "interop/tensors.py",
    "tensor = tensor[(slice(None),) * axis + (slice(dimension.skip, None),)]",
    "tensor = tensor[(slice(None),) * axis + (slice(None, -dimension.skip),)]",
    (FAMILIES + "test_forward_of_each_family_equals_transformers[opt]",),
    "positions of OPT begin two rows early",
  ),
)

OPTIMIZERS = (
  Mutant(
    "gradient-scaled-by-data-axis",
    "training/step.py",
    '  if "objective" in metrics:  # divided',
    "  from llmjax.distributed import sharding\n\n"
    '  grads = jax.tree.map(lambda g: g / sharding.num_shards("act_batch"), grads)\n'
    '  if "objective" in metrics:  # divided',
    (STEP + "test_gradient_with_dropout_accumulated_on_mesh_equals_one_device[gpt causal_lm]",),
    "the gradient of a sum is averaged over devices: more devices, smaller steps",
  ),
  Mutant(
    "gradient-scaled-by-expert-axis",
    "training/step.py",
    '  if "objective" in metrics:  # divided',
    "  from llmjax.distributed import sharding\n\n"
    '  grads = jax.tree.map(lambda g: g / sharding.num_shards("experts"), grads)\n'
    '  if "objective" in metrics:  # divided',
    (VERIFY + "test_measure_on_mesh_equals_one_device[experts-fsdp=2,expert=2,context=2]",),
    "expert parallelism makes steps smaller",
  ),
  Mutant(
    "clip-by-local-gradient-norm",
    "training/optimizers.py",
    'return _combine_optimizers(each, decays, scales, common["clip_norm"])',
    "from llmjax.distributed import sharding\n\n"
    '  clip_norm, inner = common["clip_norm"], _combine_optimizers(each, decays, scales, None)\n\n'
    "  def update(grads, state, params=None):\n"
    "    if clip_norm is not None:\n"
    "      clip = optax.clip_by_global_norm(clip_norm)\n"
    "      local = sharding.per_device(lambda g: clip.update(g, optax.EmptyState())[0], (axes,), axes)\n"
    "      grads = local(_promote_to_float32(grads))\n"
    "    return inner.update(grads, state, params)\n\n"
    "  return optax.GradientTransformation(inner.init, update)",
    (STEP + "test_two_train_steps_on_mesh_equal_one_device[llama causal_lm-sizes0-2]",),
    "each device clips by the norm of its own shards",
  ),
  Mutant(
    "clip-by-parameter",
    "training/optimizers.py",
    "grads, _ = clip.update(_promote_to_float32(grads), optax.EmptyState())",
    "grads = jax.tree.map(lambda g: clip.update(g, optax.EmptyState())[0], _promote_to_float32(grads))",
    (OPTIM + "test_clip_norm_is_the_norm_of_the_whole_tree",),
    "clip_norm bounds every parameter's gradient by itself",
  ),
  Mutant(
    "clip-after-the-optimizer",
    "training/optimizers.py",
    "    grads, _ = clip.update(_promote_to_float32(grads), optax.EmptyState())\n"
    "    pairs = jax.tree.map(one, _promote_to_float32(params), grads, state, each, decays, scales)\n"
    "    return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], params, pairs) for i in (0, 1))",
    "    pairs = jax.tree.map(one, _promote_to_float32(params), _promote_to_float32(grads), "
    "state, each, decays, scales)\n"
    "    direction, state = (jax.tree.map(lambda _, pair, i=i: pair[i], params, pairs) for i in (0, 1))\n"
    "    return clip.update(direction, optax.EmptyState())[0], state",
    (INVARIANTS + "test_clipping_scales_gradients_and_not_directions",),
    "with Adam, clip_norm bounds the step and not the gradient",
  ),
  Mutant(
    "weight-decay-on-norms",
    "training/optimizers.py",
    "return weight_decay / multiplier if decays else 0",
    "return weight_decay / multiplier",
    (OPTIM + "test_weight_decay_is_decoupled_and_masked",),
    "optim.decay_mask is ignored",
  ),
  Mutant(
    "weight-decay-through-the-moments",
    "training/optimizers.py",
    "direction, part = tx.update(grad, part, param)\n"
    "      direction = direction + decay * param if decay else direction",
    "direction, part = tx.update(grad + decay * param, part, param)",
    (OPTIM + "test_weight_decay_is_decoupled_and_masked",),
    "AdamW is Adam with L2 regularisation",
  ),
  Mutant(
    "warm-up-begins-at-zero",
    "training/schedules.py",
    "float((step + 1) / warmup_steps if step < peak else after(step))",
    "float(step / warmup_steps if step < peak else after(step))",
    (OPTIM + "test_schedule_has_no_zero_warmup_step_and_ends_at_final[cosine]",),
    "the first step has a learning rate of zero",
  ),
  Mutant(
    "schedule-ends-one-step-late",
    "training/schedules.py",
    "last=max(total_steps - 1, peak)",
    "last=max(total_steps, peak)",
    (OPTIM + "test_schedule_has_no_zero_warmup_step_and_ends_at_final[cosine]",),
    "the last step does not have the final rate",
  ),
  Mutant(
    "ema-of-the-previous-parameters",
    "training/step.py",
    "ema = optax.incremental_update(params, state.ema, 1 - ema_decay)",
    "ema = optax.incremental_update(state.params, state.ema, 1 - ema_decay)",
    (INVARIANTS + "test_ema_decays_towards_the_updated_parameters",),
  ),
  Mutant(
    "ema-decay-swapped",
    "training/step.py",
    "ema = optax.incremental_update(params, state.ema, 1 - ema_decay)",
    "ema = optax.incremental_update(params, state.ema, ema_decay)",
    (INVARIANTS + "test_ema_decays_towards_the_updated_parameters",),
    "the average is hardly one",
  ),
  Mutant(
    "muon-rescaled-by-the-wrong-side",
    "training/optimizers.py",
    "max(1.0, fan_out / fan_in) if consistent_rms is None",
    "max(1.0, fan_in / fan_out) if consistent_rms is None",
    (OPTIM + "test_muon_orthogonalizes_hidden_matrices_and_uses_adam_elsewhere",),
  ),
  Mutant(
    "muon-splits-heads-from-the-input-side",
    "models/mup.py",
    'return tuple(range(len(axes) - 1)) if axes[-1] == "embed" else None',
    'return (0,) if axes[-1] == "embed" else None',
    (OPTIM + "test_matrix_input_dims_follow_from_axis_names",),
    "the output projection of attention is orthogonalised as another matrix",
  ),
  Mutant(
    "adafactor-factors-laid-out-like-each-other",
    "training/optimizers.py",
    "v_row=like_param(x.v_row, larger),\n      v_col=like_param(x.v_col, smaller)",
    "v_row=like_param(x.v_row, smaller),\n      v_col=like_param(x.v_col, larger)",
    (OPTIM + "test_adafactor_factors_are_sharded_like_the_remaining_dimension",),
    "square kernels' factors lie on the wrong axis of the mesh",
  ),
  Mutant(
    "adafactor-without-clipping-of-updates",
    "training/optimizers.py",
    "  if clip_threshold is not None:",
    "  if clip_threshold is None:",
    (OPTIM + "test_adafactor_equals_its_formula",),
  ),
  Mutant(
    "layers-share-adafactors-statistics",
    "training/optimizers.py",
    "for _ in range(len(names) - len(own)):\n    init, update = jax.vmap(init), jax.vmap(update)",
    "for _ in range(0):\n    init, update = jax.vmap(init), jax.vmap(update)",
    (OPTIM + "test_optimizer_stacked_layers_equal_unstacked[adafactor]",),
    "scan changes what an optimizer does",
  ),
  Mutant(
    "mup-rate-does-not-follow-the-width",
    "models/mup.py",
    "return readout / fan_in",
    "return readout",
    (MUP + "test_mup_scales_equal_table_8_of_the_paper[layers-mlp-embed]",),
    "a learning rate tuned on a narrow model diverges on a wide one",
  ),
  Mutant(
    "mup-readout-not-divided",
    "models/mup.py",
    "return 1 / width_multiplier(input_axes(axes), ratios) if is_readout(axes) else 1.0",
    "return 1.0",
    (MUP + "test_mup_scales_equal_table_8_of_the_paper[embed-vocab]",),
  ),
  Mutant(
    "mup-scores-by-square-root-of-width",
    "config/model.py",
    'return base / self.width_ratios["head_dim"]',
    'return base / self.width_ratios["head_dim"] ** 0.5',
    (MUP + "test_mup_score_scale_follows_the_head_width_only",),
  ),
  Mutant(
    "layer-decay-begins-at-the-first-layer",
    "training/trainable.py",
    "scale = np.array([decay ** (depth - i) for i, _ in layers], np.float32)",
    "scale = np.array([decay ** (i + 1) for i, _ in layers], np.float32)",
    (FINETUNE + "test_layer_scales_are_powers_of_the_depth_below_the_top",),
    "the first layers learn fastest",
  ),
)

DATA = (
  Mutant(
    "packed-row-is-one-segment",
    "data/packing.py",
    "segments[start:stop] = number",
    "segments[start:stop] = 1",
    (PACKING + "test_row_has_segments_positions_and_padding",),
    "packed documents see each other",
  ),
  Mutant(
    "packed-positions-run-on",
    "data/packing.py",
    "positions[start:stop] = np.arange(len(part))",
    "positions[start:stop] = np.arange(start, stop)",
    (PACKING + "test_row_has_segments_positions_and_padding",),
    "a document's positions depend on its neighbours in the row",
  ),
  Mutant(
    "split-repeats-a-token",
    "data/packing.py",
    "stop = min(offset + room, len(example.inputs))",
    "stop, offset = min(offset + room, len(example.inputs)), max(offset - 1, 0)",
    (PACKING + "test_cut_example_has_every_token_once_for_any_room",),
    "pieces of a document that is cut over rows overlap",
  ),
  Mutant(
    "mixture-weights-ignored",
    "data/row_streams.py",
    "shares = np.cumsum(source.weights or (1.0,))",
    "shares = np.cumsum(np.ones(len(source.parts or (source,))))",
    (PIPELINE + "test_mixture_draws_by_weight_and_covers_each_source",),
  ),
  Mutant(
    "permutation-repeats-records",
    "data/randomness.py",
    'return np.argsort(bits, kind="stable")',
    "return (bits % np.uint64(size)).astype(np.int64)",
    (PIPELINE + "test_permute_index_is_a_permutation[7]",),
    "an epoch misses a third of the records and shows others twice",
  ),
  Mutant(
    "rows-read-the-same-records",
    "data/row_streams.py",
    "divmod(row.number + row.counts[component] * self.num_streams, size)",
    "divmod(row.number + row.counts[component], size)",
    (PIPELINE + "test_packed_stream_has_every_token_once_an_epoch",),
  ),
  Mutant(
    "every-epoch-in-the-same-order",
    "data/row_streams.py",
    "return component, epoch, permute_index(position, size, self.seed, SHUFFLE, component, epoch)",
    "return component, epoch, permute_index(position, size, self.seed, SHUFFLE, component, 0)",
    (PIPELINE + "test_packed_stream_has_every_token_once_an_epoch",),
  ),
  Mutant(
    "cursor-of-batches-made-ahead",
    "data/pipeline.py",
    "return {**self._identity(), **self._position}",
    "return {**self._identity(), **self._make_position()}",
    (
      PIPELINE + "test_resumed_stream_equals_an_uninterrupted_one[documents-1-1-1-True]",
      INVARIANTS + "test_interrupted_run_has_the_loss_curve_of_a_whole_run",
    ),
    "a resumed run skips the batches that were prefetched",
  ),
  Mutant(
    "evaluation-counts-filler-rows",
    "data/pipeline.py",
    "packing.pack_row(row[i] if i < len(row) else (), template, filler.row_lengths)",
    "packing.pack_row(row[min(i, len(row) - 1)] if row else (), template, filler.row_lengths)",
    (PIPELINE + "test_evaluation_has_every_token_once[1-30]",),
    "rows that run out repeat their last example instead of padding",
  ),
  Mutant(
    "evaluation-means-of-batch-means",
    "evaluation/evaluators.py",
    "total = add_metrics(total, jax.tree.map(np.float64, metrics))",
    "total = add_metrics(total, {name: (s / max(w, 1e-9), float(w > 0)) for name, (s, w) in metrics.items()})",
    (INVARIANTS + "test_evaluation_weighs_batches_by_their_weights",),
    "the last, half-empty batch of a split counts like a full one",
  ),
)

RESUME = (
  Mutant(
    "resume-restarts-the-data",
    "training/session.py",
    "self.stream.restore(cursor)",
    "self.stream.restore(self.stream.cursor)",
    (INVARIANTS + "test_interrupted_run_has_the_loss_curve_of_a_whole_run",),
    "a resumed run reads the beginning of the data again",
  ),
  Mutant(
    "resume-restarts-the-schedule",
    "training/loop.py",
    "learning_rate = program.replicate(np.float32(program.learning_rate(step)))",
    "learning_rate = program.replicate(np.float32(program.learning_rate(step - session.first_step)))",
    (INVARIANTS + "test_interrupted_run_has_the_loss_curve_of_a_whole_run",),
    "a resumed run warms up again",
  ),
  Mutant(
    "resume-resets-the-optimizer",
    "training/resume.py",
    "state = checkpoints.restore(step, program.abstract_state)",
    "state = checkpoints.restore(step, program.abstract_state)\n"
    "      state = state.replace(opt_state=program.init(state.params).opt_state)",
    (INVARIANTS + "test_interrupted_run_has_the_loss_curve_of_a_whole_run",),
    "the loss jumps after a resume: moments and step count of Adam begin anew",
  ),
  Mutant(
    "resume-resets-the-step",
    "training/resume.py",
    "state = checkpoints.restore(step, program.abstract_state)",
    "state = checkpoints.restore(step, program.abstract_state)\n"
    "      state = state.replace(step=program.init(state.params).step)",
    (INVARIANTS + "test_interrupted_run_has_the_loss_curve_of_a_whole_run",),
    "a resumed run drops what its first steps dropped",
  ),
  Mutant(
    "checkpoint-leaves-matched-by-shape",
    "checkpoints/manager.py",
    "    return self._restore_state(step, abstract_state)\n",
    "    leaves, tree = jax.tree.flatten(self._restore_state(step, abstract_state))\n"
    "    by_shape: dict[tuple[int, ...], list[jax.Array]] = {}\n"
    "    for leaf in leaves:\n"
    "      by_shape.setdefault(leaf.shape, []).append(leaf)\n"
    "    return jax.tree.unflatten(tree, [by_shape[leaf.shape].pop() for leaf in leaves])\n",
    (INVARIANTS + "test_checkpoint_restores_every_leaf_of_equal_shape_by_name",),
    "kernels of equal shape are swapped: a resumed or loaded model writes nonsense",
  ),
  Mutant(
    "evaluation-ignores-the-average",
    "training/program.py",
    'merge_trainable(state.params if self.config["ema_decay"] is None else state.ema, state.frozen)',
    "merge_trainable(state.params, state.frozen)",
    (INVARIANTS + "test_evaluated_parameters_are_the_average",),
  ),
)

GENERATING = (
  Mutant(
    "left-padding-shifts-positions",
    "types.py",
    "positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)",
    "positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)",
    (GENERATION + "test_generate_greedy_equals_the_uncached_forward[learned]",),
    "what a prompt is continued with depends on the longest prompt of the batch",
  ),
  Mutant(
    "cache-index-off-by-one",
    "models/attention/module.py",
    "jax.lax.dynamic_update_slice(cached.value, new, (0, ctx.cache_index, 0, 0))",
    "jax.lax.dynamic_update_slice(cached.value, new, (0, ctx.cache_index + 1, 0, 0))",
    (GENERATION + "test_generate_greedy_equals_the_uncached_forward[learned]",),
  ),
  Mutant(
    "decoded-positions-one-behind",
    "inference/decoding.py",
    "token=token, position=state.position + 1, seen=seen",
    "token=token, position=state.position + (state.count > 0), seen=seen",
    (GENERATION + "test_generate_greedy_equals_the_uncached_forward[learned]",),
    "the first new token has the position of the last one of the prompt",
  ),
  Mutant(
    "top-p-drops-the-token-that-reaches-p",
    "inference/sampling.py",
    "before = jnp.cumsum(probabilities, axis=-1) - probabilities",
    "before = jnp.cumsum(probabilities, axis=-1)",
    (SAMPLING + "test_filter_logits_keeps_the_most_probable_tokens[top_p=0.81]",),
  ),
  Mutant(
    "beam-search-drops-finished-beams",
    "inference/beam_search.py",
    "pool = jnp.concatenate([state.finished.scores,",
    "pool = jnp.concatenate([jnp.full_like(state.finished.scores, -jnp.inf),",
    (BEAMS + "test_beam_search_with_all_beams_finds_the_global_optimum[1.0]",),
    "a continuation that ended is lost at the next token",
  ),
  Mutant(
    "length-penalty-without-the-end-token",
    "inference/beam_search.py",
    "power = length.astype(jnp.float32) ** settings.length_penalty",
    "power = jnp.maximum(length - 1, 1).astype(jnp.float32) ** settings.length_penalty",
    (BEAMS + "test_beam_search_with_all_beams_finds_the_global_optimum[1.0]",),
  ),
  Mutant(
    "cache-does-not-follow-its-beam",
    "inference/decoding.py",
    "_read_token(model, params, take(memory.cache, parents), tokens, position, cache_length)",
    "_read_token(model, params, memory.cache, tokens, position, cache_length)",
    (BEAMS + "test_beam_search_over_a_cache_equals_the_uncached_reference[scanned-0]",),
    "a beam goes on from the keys and values of another",
  ),
)

TAGGING = (
  Mutant(
    "crf-transitions-transposed",
    "objectives/crf.py",
    "inside = reduce(before[:, :, None] + transitions.matrix[None], axis=1)",
    "inside = reduce(before[:, :, None] + transitions.matrix.T[None], axis=1)",
    (CRF + "test_crf_equals_sums_over_all_taggings[0]",),
  ),
  Mutant(
    "crf-backpointers-transposed",
    "objectives/crf.py",
    "previous = jnp.argmax(before + transitions.matrix.T[tag], axis=-1)",
    "previous = jnp.argmax(before + transitions.matrix[tag], axis=-1)",
    (CRF + "test_crf_equals_sums_over_all_taggings[0]",),
    "the best tags are not those of the best score",
  ),
  Mutant(
    "crf-start-forgotten",
    "objectives/crf.py",
    "here = jnp.where(begins[..., None], transitions.start[None, None], inside)",
    "here = jnp.where(begins[..., None], 0.0, inside)",
    (CRF + "test_crf_equals_sums_over_all_taggings[0]",),
  ),
  Mutant(
    "crf-end-forgotten",
    "objectives/crf.py",
    "last = jax.nn.logsumexp(forward + transitions.end[None, None], axis=-1)",
    "last = jax.nn.logsumexp(forward, axis=-1)",
    (CRF + "test_crf_equals_sums_over_all_taggings[0]",),
  ),
  Mutant(
    "crf-chains-run-into-each-other",
    "objectives/crf.py",
    "return previous, real & ((last < 0) | (jnp.take_along_axis(segments, previous, axis=1) != segments))",
    "return previous, real & (last < 0)",
    (CRF + "test_crf_equals_sums_over_all_taggings[0]",),
    "packed sentences are tagged as one",
  ),
)

MUTANTS = (
  *LOSSES,
  *ATTENTION,
  *ATTENTION_KERNELS,
  *MODELS,
  *OPTIMIZERS,
  *DATA,
  *RESUME,
  *GENERATING,
  *TAGGING,
)
