"""The states between two blocks, and attention on them."""
