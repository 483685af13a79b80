"""The command line: arguments, one module a command, and what it changes in its process.

Uses every other room; none uses it.
"""
