"""Quantization methods, one file each: arrays in, arrays out. They read no files, keep no state and never name a model.

``registry`` knows them all. It imports the method files when it is first asked and not here, because ``statistics`` builds on
``moments`` and the range methods build on ``statistics``.
"""
