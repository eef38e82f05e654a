"""What a run leaves behind: pictures, videos and meshes. Every file is written beside its place and then renamed."""
