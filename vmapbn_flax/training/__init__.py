"""What the device runs: state, loss and steps, their data on a mesh, and their compiled programs.

It may use `data`, `nn`, and the root's `config` and `errors`, and nothing above.
"""
