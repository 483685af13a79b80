"""The command line: arguments, one module a command, and the changes to the process.

This room uses every other room; none uses it.
"""
