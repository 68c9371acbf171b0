"""EoRA and LoRD as ordinary PEFT adapters, and merging them back.

In: a compressed model, the dense one, text. Out: an adapter folder that stock PEFT reads.
Open first: eora.py (repair), then folder.py (files), peft_layers.py (how PEFT wraps our layers).
"""
