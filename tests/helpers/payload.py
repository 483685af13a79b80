"""What no file may make the program import."""

raise AssertionError("imported because a file named it")
