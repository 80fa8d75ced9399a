"""The files of the explicit two-track pipeline: one module for each kind of folder that a step writes and the next one
reads.
"""
