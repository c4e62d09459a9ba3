"""Compiled programs are kept between the tests of this room, as in the train room."""

from tests.train.conftest import compiled_programs, shared_programs

__all__ = ["compiled_programs", "shared_programs"]
