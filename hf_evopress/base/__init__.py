"""What any Python project needs; knows nothing of models or levels.

In: file names, sizes, processes, devices. Out: whole files or none, fingerprints, plug-ins by
name, the device to compute on. Open first: resources.py (how files are written).
"""
