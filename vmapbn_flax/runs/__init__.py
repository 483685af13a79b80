"""One workdir: its files, the loop that trains its run, checkpoints, rows, pictures, and loading a finished run.

The loop serves one run and several that train together in one program. This room uses `multihost`, `training`, `data`,
`nn` and the modules beside the packages, and knows nothing of sweeps.
"""
