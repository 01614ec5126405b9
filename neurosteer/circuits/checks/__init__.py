"""Whether a circuit does what it was found for."""
