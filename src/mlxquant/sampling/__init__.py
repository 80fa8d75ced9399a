"""Noise, time, prompts, and the loop that draws."""
