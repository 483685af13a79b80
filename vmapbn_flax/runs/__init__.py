"""One workdir: its files by name, the loop that trains what is in it, and what is said, drawn and loaded of it.

The loop serves one run and several that train together in one program. Uses `multihost`, `training`, `data`, `nn` and
the modules beside the packages; knows nothing of sweeps.
"""
