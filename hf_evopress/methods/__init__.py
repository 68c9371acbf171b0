"""Compression methods, one per file, found by file name."""
