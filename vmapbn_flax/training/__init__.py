"""What the devices run: state, loss and steps, their data on a mesh, and their compiled programs.

This room uses `data`, `nn`, and the modules `config` and `errors` beside the packages.
"""
