"""Methods for weights: steps, rounding, refinement, branches, learned rounding."""
