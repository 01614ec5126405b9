"""Imported first of all, before the Hub's client reads the environment."""

import os

_KEPT = ("HF_HOME", "HF_HUB_CACHE")  # where models lie

for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING")) and name not in _KEPT]:
    del os.environ[_name]
os.environ.pop("TRANSFORMERS_OFFLINE", None)
os.environ["HF_TOKEN_PATH"] = os.devnull  # nor is the login of whoever runs the tests used
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
