"""The tests, and the programs of their own beside them."""

from . import loops

loops.install()
