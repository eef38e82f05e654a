"""The engine: cameras, field, renderer, guidance, losses, optimiser and the files a run writes.

Nothing is imported here, so that the command can read `dream_fast.engine.config.schema` without loading torch.
"""
