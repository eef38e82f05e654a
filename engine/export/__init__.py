"""Images, videos, meshes and reports, all written atomically."""
