"""How fast, beside what an application would write by hand: ``python -m tests.benchmarks``."""
