"""Video files: their frames, size and rate."""

import av
import numpy as np
import pytest

from dream_fast.engine.export import video


def test_write_video_odd_sides(tmp_path):
    """A video has every frame, also with odd sides."""
    frames = [np.full((21, 33, 3), value, dtype=np.uint8) for value in (0, 120, 240)]
    frames_written = []
    codec = video.write_video(tmp_path / "v.mp4", iter(frames), 25, on_frame=lambda: frames_written.append(1))
    assert codec in ("libx264", "mpeg4") and len(frames_written) == 3
    with av.open(str(tmp_path / "v.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 25
    assert len(decoded) == 3 and decoded[0].shape == (22, 34, 3)
    for frame, expected in zip(decoded, (0, 120, 240), strict=True):
        assert abs(frame.astype(int).mean() - expected) < 6
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_write_video_without_frames(tmp_path):
    """A video without frames is refused and leaves nothing."""
    with pytest.raises(ValueError, match="at least one frame"):
        video.write_video(tmp_path / "v.mp4", [], 25)
    assert list(tmp_path.iterdir()) == []
