"""What to do to which layer, in one string."""
