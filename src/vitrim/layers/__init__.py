"""What methods are built of: draws, selectors, losses, poolings, windows."""
