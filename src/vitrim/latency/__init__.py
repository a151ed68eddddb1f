"""Latency tables: measuring them on a device, and predicting models from them."""
