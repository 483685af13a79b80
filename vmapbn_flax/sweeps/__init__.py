"""Many runs from one config: expanded to members, planned in groups, trained, ranked and drawn.

Each member is a run in a workdir of its own. Uses `runs` and everything below it.
"""
