"""Contenders drawn on the same prompts: scores, intervals, cost, and the folder that reports them."""
