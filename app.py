"""The page: `python app.py [--model NAME] [--port N]`."""

import argparse
import contextlib
import os

with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  on a Space it has to come before anything that touches the GPU

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from neurosteer.errors import UsageError
from neurosteer.ui.page import create_app, launch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the NeuroSteer page.")
    parser.add_argument("--model", help="catalog name, Hub id, folder or GGUF file (default: the embedded model)")
    parser.add_argument("--host", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port (default: GRADIO_SERVER_PORT, else the first free from 7860)")
    parser.add_argument(
        "--trust-visitors",
        action="store_true",
        default=None,
        help="treat whoever can reach --host as this machine's owner, its login of the Hub included",
    )
    options = parser.parse_args()
    served = {"host": options.host, "trust_visitors": options.trust_visitors}
    try:
        launch(create_app(options.model, **served), port=options.port, **served)
    except UsageError as error:
        parser.error(str(error))
