"""Anybody's module, known by what it was seen to do: recorded calls, and the chain that they show."""
