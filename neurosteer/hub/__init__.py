"""Artifacts on the Hugging Face Hub: publish them, fetch them, find them."""

from neurosteer.hub.client import Token, whoami
from neurosteer.hub.pulling import list_artifacts, pull, pull_folder, pull_into, read_card
from neurosteer.hub.pushing import Pushed, push
from neurosteer.hub.repos import Reference, parse_reference
from neurosteer.hub.searching import Found, search

__all__ = [
    "Found",
    "Pushed",
    "Reference",
    "Token",
    "list_artifacts",
    "parse_reference",
    "pull",
    "pull_folder",
    "pull_into",
    "push",
    "read_card",
    "search",
    "whoami",
]
