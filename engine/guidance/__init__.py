"""Guidance: an image model, its prompts, and the gradient that they give to a picture of the scene."""
