"""The page: `python app.py` takes the options of `neurosteer app`."""

import contextlib
import os
import sys

with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  on a Space it has to come before anything that touches the GPU

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from neurosteer.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
