"""What the search minimises, one fitness per file, found by file name."""
