"""Recipes to text: batched, steered, streamed."""
