"""Sparse autoencoders: load, train, measure, put into words."""
