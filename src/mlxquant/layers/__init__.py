"""Modules that replace modules: quantized layers, what they weigh in bytes, and how they get into a tree and into a
file.
"""
