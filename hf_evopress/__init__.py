"""Compressed models as first-class citizens of the Hugging Face ecosystem."""

__version__ = "0.1.0"
