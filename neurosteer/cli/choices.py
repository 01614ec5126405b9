"""The values that options may have, named here without torch so that help and mistakes come at once.

They are the library's own: a test compares the two.
"""

from typing import Literal

Method = Literal["caa", "pca", "probe", "sae", "cna"]
Framing = Literal["raw", "prompt", "answer"]
ReadTokens = Literal["mean", "last"]
Rank = Literal["difference", "dprime", "write", "rate", "probe"]
Operation = Literal["scale", "shift"]
Weight = Literal["difference", "target"]
Sides = Literal["positive", "both"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["4bit", "8bit"]
Metric = Literal["difference", "logit"]
Attention = Literal["full", "frozen"]
Aggregate = Literal["mean", "union"]
Ablation = Literal["zero", "mean", "paired"]
Format = Literal["gguf", "tensors", "repeng", "steering-vectors", "weights", "lora"]
Kind = Literal["steering-vector", "neuron-circuit"]
