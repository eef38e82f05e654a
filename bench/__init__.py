"""Measurements of operators, steps, whole runs and results. Nothing in the engine imports them."""
