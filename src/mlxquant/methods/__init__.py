"""Published methods, one file each: arrays in, arrays out. They read no files, keep no state and never name a model.

``registry`` finds them all: it imports the files of these folders when it is first asked.
"""
