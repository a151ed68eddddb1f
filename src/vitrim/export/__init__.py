"""Models for other runtimes: bundles, and the files in them."""
