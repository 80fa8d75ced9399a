"""Stage by stage: measure, allocate, try, judge, keep. Where models and methods meet."""
