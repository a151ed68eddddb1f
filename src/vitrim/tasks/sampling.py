"""Which frames of a video make a clip."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from vitrim.config import require


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a video make a clip."""

    frames: int
    """Of a clip."""
    stride: int = 2
    """Frames of the video from one to the next; 0 spreads them evenly over all of it."""
    clips: int = 1
    """Per video at evaluation, spread evenly over it."""
    crops: int = 1
    """Of each of these, along its longer side: 1, in the middle, or 3."""

    def __post_init__(self) -> None:
        for name, value in (("frames", self.frames), ("clips", self.clips)):
            require(1 <= value <= 1024, f"{name} is {value}; expected 1 to 1024")
        require(0 <= self.stride <= 1024, f"stride is {self.stride}; expected 0 to 1024")
        require(self.crops in (1, 3), f"crops is {self.crops}; expected 1 or 3")

    def numbers(self, length: int, *, training: bool) -> np.ndarray:
        """Frames (clips, T) of a video of ``length``: one clip at random, by Python's generator, or
        all of the evaluation's.
        """
        if not self.stride:
            return self._spread(length, training)
        span = (self.frames - 1) * self.stride + 1
        room = max(length - span, 0) + 1
        starts = [(2 * clip + 1) * room // (2 * self.clips) for clip in range(self.clips)]
        if training:
            starts = [random.randrange(room)]
        steps = np.arange(self.frames) * self.stride
        places = np.array(starts)[:, None] + steps
        return np.minimum(places, length - 1).astype(np.int64)

    def _spread(self, length: int, training: bool) -> np.ndarray:
        """One frame of each of as many equal parts: any, or that of the clip's own place."""
        share = ((np.arange(self.clips) + 0.5) / self.clips)[:, None]
        if training:
            share = np.array([[random.random() for _ in range(self.frames)]])
        places = (np.arange(self.frames) + share) * length / self.frames
        return np.minimum(places, length - 1).astype(np.int64)
