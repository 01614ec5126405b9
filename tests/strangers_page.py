"""A page that strangers can reach, with a tiny model, in a process of its own: `python strangers_page.py PORT`."""

import os
import sys
import time

import torch
from pages import Ready
from tiny import tiny

from neurosteer.steering.session import Session
from neurosteer.ui.page import create_app, launch

if __name__ == "__main__":
    os.environ["NEUROSTEER_ALLOWED_HOSTS"] = "page.example"  # as behind a proxy
    torch.set_num_threads(1)
    page = create_app(holder=Ready(Session(tiny("llama").lm)))
    launch(page, port=int(sys.argv[1]), prevent_thread_lock=True, quiet=True)
    while True:
        time.sleep(60)
