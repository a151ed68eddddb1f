"""Video files, read and written by PyAV (extra ``video``), whose wheels bring FFmpeg.

Only whole containers are opened, through a file that Python opened: formats that name other files
or addresses (playlists, patterns, concatenations) are not even looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from vitrim.errors import MissingExtraError
from vitrim.runtime import IMAGE_FORMATS, check_proportions

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv"),
    *(".webm", ".wmv"),
)
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,ogg,asf"
_MOST_PIXELS = 2**26
"""Of a frame: 8192 x 8192."""

Value = TypeVar("Value")


def import_av() -> Any:
    """PyAV.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("reading video files", "av", "video") from error
    av.logging.set_level(None)  # what is wrong with a file is said by an error
    return av


class VideoFile:
    """The pictures of an open video file; use it as a context.

    Its frames are numbered at its mean rate, whatever the distances between them: number ``i`` is
    the one whose time is nearest to the ``i``-th step from the first to the last. So stretches of a
    file of variable rate take as long as they took.

    Args:
        file: an open file, which can seek.

    Raises:
        ValueError: it is no video, has no picture, or its frames have no times.
    """

    def __init__(self, file: BinaryIO) -> None:
        av = import_av()
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "", "fflags": "+genpts"}
        try:
            self._container = av.open(file, options=options, metadata_errors="ignore")
        except (OSError, ValueError, av.error.FFmpegError) as error:
            raise ValueError(_what_else(file)) from error
        try:
            self._open()
        except BaseException:
            self._container.close()
            raise

    def _open(self) -> None:
        cover = import_av().stream.Disposition.attached_pic
        streams = [s for s in self._container.streams.video if not s.disposition & cover]
        if not streams:
            others = {stream.type for stream in self._container.streams}
            raise ValueError(f"it has no video stream ({', '.join(sorted(others)) or 'nothing'})")
        self._stream = streams[0]
        self._stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        self._stream.codec_context.thread_count = 1  # its worker is one of several
        packets = (p for p in self._container.demux(self._stream) if p.size and not p.is_discard)
        times = [(packet.pts, packet.is_keyframe) for packet in packets]
        if not times:
            raise ValueError("it has no frame")
        if any(time is None for time, _ in times):
            raise ValueError("its frames have no times")
        # What was cut out of a longer file may begin with frames that need earlier ones.
        first = next((time for time, is_key in times if is_key), None)
        if first is None:
            raise ValueError("it has no key frame to begin with")
        self._times = np.unique(np.array([time for time, _ in times if time >= first], np.int64))

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __len__(self) -> int:
        return len(self._times)

    def read(
        self, numbers: Iterable[int], change: Callable[[Image.Image], Value]
    ) -> dict[int, Value]:
        """Frames by their numbers, upright, each changed as soon as it is decoded.

        Raises:
            ValueError: one of them cannot be decoded.
        """
        steps = np.linspace(self._times[0], self._times[-1], len(self))
        wanted = {number: self._nearest(steps[number]) for number in numbers}
        found = self._decode(set(wanted.values()), min(wanted.values()), change)
        missing = set(wanted.values()) - found.keys()
        if missing:  # not every format can be entered in its middle
            found |= self._decode(missing, int(self._times[0]), change)
        missing -= found.keys()
        if missing:
            seconds = float((min(missing) - int(self._times[0])) * self._stream.time_base)
            raise ValueError(
                f"{len(missing)} of its frames cannot be decoded, the first at {seconds:.2f} s"
            )
        return {number: found[time] for number, time in wanted.items()}

    def _nearest(self, time: float) -> int:
        after = min(int(np.searchsorted(self._times, time)), len(self) - 1)
        before = max(after - 1, 0)
        is_before = time - self._times[before] < self._times[after] - time
        return int(self._times[before if is_before else after])

    def _decode(
        self, wanted: set[int], start: int, change: Callable[[Image.Image], Value]
    ) -> dict[int, Value]:
        found, last = dict[int, Value](), max(wanted)
        for frame in self._frames_from(start):
            if frame.pts in wanted and not frame.is_corrupt:
                found[frame.pts] = change(_upright(frame))
            if frame.pts is not None and frame.pts >= last:
                break
        return found

    def _frames_from(self, start: int) -> Iterator[Any]:
        try:
            self._container.seek(start, stream=self._stream)
            yield from self._container.decode(self._stream)
        except import_av().error.FFmpegError as error:
            raise ValueError(f"its frames cannot be decoded ({error.strerror})") from error


def _upright(frame: Any) -> Image.Image:
    """The picture of a frame, turned as its display matrix says."""
    check_proportions(frame.width, frame.height)
    image: Image.Image = frame.to_image()
    turn = round(frame.rotation / 90) % 4 * 90  # counter-clockwise, as Pillow's
    return image.rotate(turn, expand=True) if turn else image


def _what_else(file: BinaryIO) -> str:
    """Why an open file is no video."""
    try:
        file.seek(0)
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return f"it is an image ({image.format}), where a video is due"
    except Exception:  # neither is it an image
        return "it is damaged, or no video of a kind that is read (mp4, mkv, webm, avi ...)"


def write_video(path: str | os.PathLike[str], frames: np.ndarray, rate: int) -> None:
    """Write ``frames`` (T, H, W, 3) uint8, of even sides, at ``rate`` per second.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    av = import_av()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": "14", "threads": "1"} if codec == "libx264" else {}
    with av.open(str(Path(path)), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
