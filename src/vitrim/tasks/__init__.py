"""What a model is for. The engine in ``train/`` trains each of them."""
