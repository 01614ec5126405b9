"""Circuits: which neurons an answer is owed to, and how they feed one another."""

from neurosteer.circuits.attribution import (
    AGGREGATES,
    METRICS,
    Attribution,
    NeuronScore,
    PromptAttribution,
    attribute,
)
from neurosteer.circuits.choices import Choice, NextToken, next_tokens
from neurosteer.circuits.linearised import ATTENTIONS, LinearPass, linear_logits, linear_pass, linearised
from neurosteer.circuits.selection import RULES, Selection
from neurosteer.circuits.universal import UniversalNeurons, everyday_prompts, find_universal

__all__ = [
    "AGGREGATES",
    "ATTENTIONS",
    "METRICS",
    "RULES",
    "Attribution",
    "Choice",
    "LinearPass",
    "NeuronScore",
    "NextToken",
    "PromptAttribution",
    "Selection",
    "UniversalNeurons",
    "attribute",
    "everyday_prompts",
    "find_universal",
    "linear_logits",
    "linear_pass",
    "linearised",
    "next_tokens",
]
