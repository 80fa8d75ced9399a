"""Levels: of weights, of inputs, of time. What a code means, and how codes are packed."""
