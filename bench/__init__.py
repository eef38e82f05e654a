"""Measurements: quality of results, and later the speed of operators. Imported by nothing in the engine."""
