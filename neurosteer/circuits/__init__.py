"""Circuits: which neurons an answer is owed to, and how they feed one another."""

from neurosteer.circuits.checks.faithfulness import PERCENTS, Faithfulness, measure_faithfulness
from neurosteer.circuits.checks.probing import (
    Prediction,
    next_token_probs,
    sweep_multipliers,
    top_predictions,
)
from neurosteer.circuits.decomposition import compare_with_circuit, decompose
from neurosteer.circuits.graph.edges import CircuitGraph, Edge, find_edges
from neurosteer.circuits.graph.pictures import dot, figure, figure_html, text_diagram
from neurosteer.circuits.parts import at_multiplier, part, random_like
from neurosteer.circuits.relp.attribution import Attribution, attribute
from neurosteer.circuits.relp.choices import Choice, NextToken, next_tokens
from neurosteer.circuits.relp.linearised import ATTENTIONS, linear_pass, linearised
from neurosteer.circuits.relp.scores import NeuronScore
from neurosteer.circuits.relp.selection import RULES, Selection
from neurosteer.circuits.relp.universal import CommonNeurons, everyday_prompts, find_universal, find_unspecific
from neurosteer.circuits.relp.weights import Neuron, edge_weights

__all__ = [
    "ATTENTIONS",
    "PERCENTS",
    "RULES",
    "Attribution",
    "Choice",
    "CircuitGraph",
    "CommonNeurons",
    "Edge",
    "Faithfulness",
    "Neuron",
    "NeuronScore",
    "NextToken",
    "Prediction",
    "Selection",
    "at_multiplier",
    "attribute",
    "compare_with_circuit",
    "decompose",
    "dot",
    "edge_weights",
    "everyday_prompts",
    "figure",
    "figure_html",
    "find_edges",
    "find_universal",
    "find_unspecific",
    "linear_pass",
    "linearised",
    "measure_faithfulness",
    "next_token_probs",
    "next_tokens",
    "part",
    "random_like",
    "sweep_multipliers",
    "text_diagram",
    "top_predictions",
]
