from tests.faults.conftest import program

__all__ = ["program"]
