"""Models: where they come from, loading them, the parts that steering needs, and how prompts are formatted."""
