"""Models of other libraries: Hugging Face folders and PEFT adapters, read and written.

Reading a folder crosses these files, in this order:

  folder_reader.py       opens config.json and the safetensors files, and assembles the parameters
  families/NAME.py       the family's data sheet: fields of config.json, and which tensor holds which parameter
  config_json.py         config.json -> `TransformerConfig`
  tensor_map.py          the tensors of one model, with the layers and experts counted out
  tensors.py             a tensor -> the parameters that it holds, without a copy
"""
