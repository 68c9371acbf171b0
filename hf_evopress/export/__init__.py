"""What a plan is written out as, one format per file, found by file name."""
