"""Artifacts: vectors, circuits and recipes of them; their folders on disk, their cards and plots."""
