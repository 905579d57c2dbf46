"""What type checkers make of the public API. Nothing here runs: mypy and pyright read it.

``assert_type`` says what a caller gets. A line that must be refused has a ``type: ignore``: mypy's
strict mode and the setting in each file make one that is not needed an error.
"""
