"""What a model is for: its data, its losses, its measure."""
