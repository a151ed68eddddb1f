"""Training: recipes, data and the engine. Nothing here is loaded by ``import vitrim``."""
