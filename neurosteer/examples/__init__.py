"""Contrast sets: texts that show a behaviour and texts that do not, read from whatever file holds them. No torch."""
