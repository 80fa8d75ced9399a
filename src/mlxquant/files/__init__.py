"""Bytes one can trust: checked, atomic, resumable."""
