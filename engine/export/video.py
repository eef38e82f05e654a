"""The turntable video: colour, normals and depth side by side, as mp4."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream

from dream_fast.engine.config.sections import CameraConfig
from dream_fast.engine.export.images import concatenate_images, depth_image, normal_image, to_uint8
from dream_fast.engine.render.base import Renderer
from dream_fast.engine.scene.camera import turntable
from dream_fast.engine.workspace.atomic import atomic_write


def turntable_frames(
    renderer: Renderer, config: CameraConfig, frames: int, on_view: Callable[[], None] = lambda: None
) -> Iterator[np.ndarray]:
    """Frames [H, 3 W, 3] uint8 of one turn around the object: colour | normals | depth.

    `on_view` is called before each of them.
    """
    for camera in turntable(config, frames, renderer.field.device).split():
        on_view()
        view = renderer.view(camera, config.H, config.W)
        depth = depth_image(view, camera.radius, renderer.config.bound)
        yield concatenate_images([to_uint8(part)[0] for part in (view.rgb, normal_image(view), depth)])


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int, on_frame: Callable[[], None] | None = None) -> str:
    """Write frames [H, W, 3] uint8 as mp4 and return the codec: h264 where the library has it, else mpeg4.

    Both codecs need even sides, so an odd side is padded by repeating its last row or column. `on_frame` is called
    after each frame.
    """
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # The container is named, since the temporary file need not end in .mp4.
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream: VideoStream | None = None
        for frame in frames:
            height, width = frame.shape[:2]
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = cast(VideoStream, container.add_stream(codec, rate=fps))
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                # The macroblock tree of x264 is not deterministic for small images.
                x264: dict[str, Any] = {"crf": "18", "x264-params": "mbtree=0"}
                stream.options = x264 if codec == "libx264" else {"qscale": "3"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if on_frame is not None:
                on_frame()
        if stream is None:
            raise ValueError("a video needs at least one frame")
        container.mux(stream.encode())
    return codec
