"""Every key that the train loop reads, with its default. Other configs start from here; this one is not run itself."""

from ml_collections import ConfigDict

from llmjax.config import optional


def get_config(arg: str | None = None) -> ConfigDict:
  """The defaults. Durations may be given in steps, tokens, examples, epochs or percent of total_steps."""
  config = ConfigDict()
  config.seed = 0
  config.total_steps = optional(1000)  # a duration
  config.batch_size = 16  # global sequences per update, whatever the mesh
  config.accum = 1  # microbatches per update, computed one after the other
  config.seq_len = 256  # tokens per sequence
  config.logit_tiles = 1  # parts of every sequence whose logits are made one after the other: memory for time
  config.init_from = optional(None, str)  # start from the parameters of this PATH
  # Regex of our parameters -> what they are called there, as in re.sub, or None: they start afresh. First match wins.
  config.init_map = ()
  config.trainable = ((r".*", True),)  # regex -> whether parameters learn; first match wins
  config.auxiliary = ConfigDict()  # {NAME: {"init_from": PATH, or None for what this run starts from}}: frozen models
  config.profile = optional(None, str)  # "10:15": write a trace of these steps

  # What each key means: llmjax.models.config.TransformerConfig.
  config.model = ConfigDict()
  config.model.name = "transformer"
  config.model.vocab_size = optional(None, int)  # None: the tokenizer's
  config.model.max_len = optional(None, int)  # None: seq_len
  config.model.d_model = 256
  config.model.decoder_layers = 4
  config.model.encoder_layers = 0
  config.model.num_heads = 4
  config.model.num_kv_heads = optional(None, int)
  config.model.head_dim = optional(None, int)
  config.model.d_ff = optional(None, int)
  config.model.norm = "layernorm"
  config.model.norm_epsilon = 1e-5
  config.model.norm_bias = True
  config.model.norm_zero_centered = False
  config.model.norm_placement = "pre"
  config.model.parallel_residual = False
  config.model.embedding_width = optional(None, int)
  config.model.scale_embeddings = False
  config.model.embedding_norm = False
  config.model.first_attention_norm = True
  config.model.positions = "learned"
  config.model.rotary_base = 10_000.0
  config.model.rotary_fraction = 1.0
  config.model.rotary_scaling = ConfigDict()  # {"name": ..., "factor": ..., ...}; empty is none
  config.model.local_rotary_base = optional(None, float)
  config.model.relative_buckets = 32
  config.model.relative_max_distance = 128
  config.model.attention_pattern = ("global",)
  config.model.window = optional(None, int)
  config.model.attention = "auto"
  config.model.attention_scale = optional(None, float)
  config.model.attention_softcap = optional(None, float)
  config.model.logit_softcap = optional(None, float)
  config.model.token_types = 0
  config.model.activation = "gelu"
  config.model.gated = False
  config.model.qkv_bias = True
  config.model.attention_out_bias = True
  config.model.mlp_bias = True
  config.model.qk_norm = False
  config.model.num_experts = 0
  config.model.experts_per_token = 2
  config.model.expert_d_ff = optional(None, int)
  config.model.normalize_router = True
  config.model.shared_expert_d_ff = optional(None, int)
  config.model.expert_capacity = optional(None, float)
  config.model.tie_embeddings = True
  config.model.scale_tied_logits = False
  config.model.pooling = "first"
  config.model.head_transform = False
  config.model.head_bias = False
  config.model.pooler = False
  config.model.pooler_activation = "tanh"
  config.model.sentence_classes = 0
  config.model.lora_rank = 0
  config.model.lora_alpha = optional(None, float)
  config.model.lora_dropout = 0.0
  config.model.lora_targets = r".*attention/(query|value)"
  config.model.bidirectional_prompt = False
  config.model.dropout = 0.0
  config.model.attention_dropout = 0.0
  config.model.mlp_dropout = 0.0
  config.model.init_stddev = optional(0.02, float)
  config.model.embedding_stddev = optional(None, float)
  config.model.residual_init = "scaled"
  config.model.base_width = optional(None, int)  # d_model that rates were tuned at: muP carries them to this width
  config.model.base_head_dim = optional(None, int)  # the head width there, where it is another
  config.model.dtype = "float32"
  config.model.param_dtype = "float32"
  config.model.scan = True
  config.model.remat = "none"

  config.data = ConfigDict()
  config.data.corpus = ConfigDict()  # {"name": a source, ...}, see configs/corpora.py
  config.data.train = "train"  # split, or a slice of one: "train[:90%]"
  config.data.eval = "validation"
  config.data.tokenizer = ConfigDict()  # {"name": "sentencepiece" | "hf" | "bytes" | "characters", ...}
  config.data.pack = True  # several documents a row, none sees another
  config.data.longest = 512  # where seq_len is None it is the pretrained model's max_len, but at most this
  config.data.interleave = 1  # documents that a row reads in turn: more mix long documents better, and take memory
  config.data.epoch_tokens = optional(None, int)  # tokens in the training data; only durations in epochs need it
  config.data.workers = 2  # threads that read and tokenise
  config.data.prefetch = 2  # batches made ahead

  config.objective = ConfigDict({"name": "causal_lm", "label_smoothing": 0.0, "z_loss": 0.0, "balance": 0.0})

  config.optim = ConfigDict()
  config.optim.name = "adamw"
  config.optim.lr = 1e-3  # peak
  config.optim.weight_decay = 0.1
  config.optim.decay_mask = ((r".*(norm|bias|positions).*", False), (r".*", True))  # first match wins
  config.optim.lr_scale = ((r".*", 1.0),)  # regex -> what multiplies the rate of parameters; first match wins
  config.optim.layer_decay = optional(None, float)  # and once more for each layer above them
  config.optim.clip_norm = optional(1.0, float)
  config.optim.ema_decay = optional(None, float)  # keep and evaluate an average of the parameters

  config.schedule = ConfigDict({"name": "cosine", "warmup": optional("2%"), "final": 0.1})

  config.mesh = ConfigDict(  # -1 takes the devices that are left
    {"data": -1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
  )
  # Logical axis -> the mesh axis (or axes) it is cut over; those of parameters, then of activations.
  config.rules = ConfigDict()
  config.rules.layers = optional(None)
  config.rules.vocab = optional("tensor")
  config.rules.positions = optional(None)
  config.rules.embed = optional("fsdp")
  config.rules.heads = optional("tensor")
  config.rules.kv_heads = optional("tensor")
  config.rules.head_dim = optional(None)
  config.rules.mlp = optional("tensor")
  config.rules.experts = optional("expert")
  config.rules.norm = optional(None)
  config.rules.head = optional(None)
  config.rules.classes = optional(None)
  config.rules.lora = optional(None)
  config.rules.token_types = optional(None)
  config.rules.buckets = optional(None)
  config.rules.act_batch = optional(("data", "fsdp", "expert"))
  config.rules.act_len = optional("context")
  config.rules.act_embed = optional(None)
  config.rules.act_heads = optional("tensor")
  config.rules.act_kv_heads = optional("tensor")
  config.rules.act_head_dim = optional(None)
  config.rules.act_mlp = optional("tensor")
  config.rules.act_vocab = optional("tensor")

  config.evals = ConfigDict()  # {NAME: {"name": an evaluator, "every": duration, ...}}; all run at the end too

  config.checkpoint = ConfigDict()
  config.checkpoint.every = optional("20%")
  config.checkpoint.keep = 2  # the latest ones
  config.checkpoint.keep_every = optional(None)  # also keep those at multiples of this duration
  config.checkpoint.best = optional(None, str)  # also keep the one that is best in this, e.g. "eval/heldout/loss"
  config.checkpoint.best_is = "least"  # or "most"

  # Stop when `metric` has not been better than before for `patience` of its evaluations in a row.
  config.early_stopping = ConfigDict({"metric": optional(None, str), "best_is": "least", "patience": 3})

  config.log = ConfigDict({"every": optional(10), "tensorboard": True})
  config.log.wandb = optional(None, str)  # also log to this project of Weights & Biases
  return config


def language_model_evals(config: ConfigDict, prompt: str | None) -> None:
  """Held-out loss over the whole split, and a prompt (None: the beginning of the held-out text) continued."""
  _heldout(config)
  config.evals.sample = ConfigDict(
    {
      "name": "sample",
      "every": optional(None),
      "at": (0, "10%"),
      "prompt": optional(prompt, str),
      "max_new_tokens": 100,
      "temperature": 0.8,
      "top_p": optional(0.95, float),
    }
  )


def token_evals(config: ConfigDict) -> None:
  """Held-out loss over the whole split, beside what guessing by frequency gives on the same labels."""
  _heldout(config)
  # Its keys follow those of `heldout`.
  same = {key: config.evals.heldout.get_oneway_ref(key) for key in ("split", "batch_size", "max_batches")}
  config.evals.unigram = ConfigDict({"name": "unigram", "every": optional(None), "at": (), **same})


def retrieval_evals(config: ConfigDict, bm25: bool = False) -> None:
  """Held-out loss, and each anchor's own positive looked for among all of the split, by BM25 too where asked for."""
  _heldout(config)
  config.evals.retrieval = ConfigDict(
    {
      "name": "retrieval",
      "every": optional("20%"),
      "at": (0,),  # what an untrained model finds
      "split": optional(None, str),
      "batch_tokens": 16384,
      "limit": optional(None, int),
      "bm25": bm25,
    }
  )


def task_evals(config: ConfigDict) -> None:
  """Held-out loss, and what the task measures of its answers to the same records."""
  _heldout(config)
  config.evals.answers = ConfigDict(
    {
      "name": "answers",
      "every": optional("20%"),
      "at": (),
      "split": optional(None, str),
      "limit": optional(None, int),
      "batch_tokens": 16384,
    }
  )


def _heldout(config: ConfigDict) -> None:
  config.evals.heldout = ConfigDict(
    {
      "name": "loss",
      "every": optional("20%"),
      "at": (),
      "split": optional(None, str),
      "batch_size": optional(None, int),
      "max_batches": optional(None, int),
    }
  )
