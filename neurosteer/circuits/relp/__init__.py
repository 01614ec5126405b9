"""Which neurons an answer is owed to: gradient × activation through a linearised model (RelP, arXiv 2508.21258)."""
