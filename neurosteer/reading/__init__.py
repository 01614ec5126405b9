"""Examples to activations: the only batched reading loop."""
