"""`python -m hf_evopress` is `hf-evopress`."""

from .cli import main

main()
