"""Circuits: which neurons an answer is owed to, and how they feed one another."""

from neurosteer.circuits.attribution import AGGREGATES, Attribution, attribute
from neurosteer.circuits.choices import Choice, NextToken, next_tokens
from neurosteer.circuits.edges import CircuitGraph, Edge, Hub, find_edges
from neurosteer.circuits.linearised import ATTENTIONS, LinearPass, linear_logits, linear_pass, linearised
from neurosteer.circuits.pictures import dot, figure, figure_html, text_diagram
from neurosteer.circuits.scores import METRICS, NeuronScore, PromptAttribution
from neurosteer.circuits.selection import RULES, Selection
from neurosteer.circuits.universal import UniversalNeurons, everyday_prompts, find_universal
from neurosteer.circuits.weights import Neuron, SuperWeight, edge_weights

__all__ = [
    "AGGREGATES",
    "ATTENTIONS",
    "METRICS",
    "RULES",
    "Attribution",
    "Choice",
    "CircuitGraph",
    "Edge",
    "Hub",
    "LinearPass",
    "Neuron",
    "NeuronScore",
    "NextToken",
    "PromptAttribution",
    "Selection",
    "SuperWeight",
    "UniversalNeurons",
    "attribute",
    "dot",
    "edge_weights",
    "everyday_prompts",
    "figure",
    "figure_html",
    "find_edges",
    "find_universal",
    "linear_logits",
    "linear_pass",
    "linearised",
    "next_tokens",
    "text_diagram",
]
