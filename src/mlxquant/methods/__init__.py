"""Published methods, one file each: arrays in, arrays out. They read no files, keep no state and never name a model.

``registry`` finds them all: a method is a file here, in any of the folders, and nothing lists it.
"""
