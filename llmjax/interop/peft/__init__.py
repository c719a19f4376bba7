"""LoRA adapters in folders of PEFT: read onto a base model, and written.

A folder has the adapter's tensors and the name of its base model:

  adapter_config.json          rank, alpha, dropout, target modules, base_model_name_or_path
  adapter_model.safetensors    of every adapted matrix A [r inputs] and B [outputs r], and parameters that were trained
                               whole, such as a head; names are those of the base model's tensors

See https://huggingface.co/docs/peft/developer_guides/checkpoint. Where the base model fuses several of our projections
in one matrix (query, key and value in GPT-2's c_attn), so does the adapter, see `lora_matrices.py`.
"""
