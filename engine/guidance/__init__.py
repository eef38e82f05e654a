"""Guidance: image models, their prompts, and the gradient that they give to rendered images."""
