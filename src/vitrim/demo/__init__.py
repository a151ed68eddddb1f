"""The whole job in a few minutes, offline."""
