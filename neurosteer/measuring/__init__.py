"""Measuring what a recipe does to the model itself: KL, preference, what strength 1 means, figures per token."""
