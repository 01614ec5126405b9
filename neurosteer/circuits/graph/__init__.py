"""How the neurons of a circuit feed one another."""
