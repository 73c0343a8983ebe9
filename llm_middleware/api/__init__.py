"""What both fronts share, with no framework in it."""
