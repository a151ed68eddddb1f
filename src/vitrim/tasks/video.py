"""Models on clips: video models on several views of a video, image models frame by frame.

frame_wise = vitrim.tasks.video.FrameWise(vitrim.from_pretrained("runs/deit_s"), frames=8)
logits = frame_wise(clips)  # (B, 3, 8, H, W): the mean over the frames
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config import require
from vitrim.errors import InputError, UnsupportedBackboneError
from vitrim.families import family_of
from vitrim.model import SparseModel, Trace
from vitrim.tools.evaluate import dense_macs

FRAMES_OF_IMAGES = 8
"""Of a clip, where an image model looks at it and nobody says how many."""


def takes_clips(model: nn.Module) -> bool:
    """Whether ``model`` takes clips (B, 3, T, H, W), and not images."""
    if isinstance(model, SparseModel | OnClips):
        return model.takes_clips
    try:
        return family_of(model).clip_frames is not None
    except UnsupportedBackboneError:  # a model that runs, but not piece by piece
        return False


def on_clips(model: nn.Module, frames: int) -> nn.Module:
    """``model``, if it takes clips; else it frame by frame, on clips of so many frames."""
    return model if takes_clips(model) else FrameWise(model, frames)


def folded(clips: Tensor) -> Tensor:
    """Frames (B * T, 3, H, W) of clips (B, 3, T, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


class OnClips(nn.Module):
    """What runs a model several times and takes the mean: its costs, settings and trace."""

    takes_clips = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def backbone(self) -> nn.Module:
        """The same of the dense model inside."""
        raise NotImplementedError

    @property
    def inner(self) -> Any:
        """The model that is run in the end."""
        return self.model.inner if isinstance(self.model, OnClips) else self.model

    def snapshot(self) -> Callable[[], None]:
        """What puts a sparse model's settings back as they are now."""
        found: Callable[[], None] = self.inner.snapshot()
        return found

    @torch.no_grad()
    def trace(self, clips: Tensor) -> Trace:
        """Logits and MACs by clip; the stages' rows are those of all images or views in turn."""
        raise NotImplementedError


class FrameWise(OnClips):
    """An image model, dense or sparse, on the frames of clips: all in one batch, packed where the
    model packs; the logits are the mean over a clip's frames.

    Args:
        model: takes images (B, 3, H, W).
        frames: of a clip.
    """

    def __init__(self, model: nn.Module, frames: int) -> None:
        super().__init__(model)
        require(not takes_clips(model), "the model takes clips itself; call it as it is")
        require(frames >= 1, f"frames is {frames}; expected 1 or more")
        self.frames = frames

    @property
    def backbone(self) -> FrameWise:
        return FrameWise(self.inner.backbone, self.frames)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, classes) of clips (B, 3, T, H, W)."""
        images = self._frames_of(clips)
        logits: Tensor = self.model(images)
        return logits.reshape(len(clips), self.frames, -1).mean(1)

    @torch.no_grad()
    def trace(self, clips: Tensor) -> Trace:
        trace: Trace = self.inner.trace(self._frames_of(clips))
        parts = (len(clips), self.frames)
        logits = trace.logits.reshape(*parts, -1).mean(1)
        return replace(trace, logits=logits, macs=trace.macs.reshape(parts).sum(1))

    def _frames_of(self, clips: Tensor) -> Tensor:
        if clips.ndim != 5 or clips.shape[2] != self.frames:
            raise InputError(
                f"clips have shape {tuple(clips.shape)}; expected (any, 3, {self.frames}, H, W)"
            )
        return folded(clips)

    def dense_macs(self, size: tuple[int, ...]) -> int:
        """MACs of a clip of (frames, height, width), with nothing dropped."""
        return self.frames * dense_macs_of(self.inner, size[1:])

    def macs(self, size: tuple[int, ...]) -> int | None:
        """MACs of a clip; None where they depend on the images."""
        if not isinstance(self.inner, SparseModel):
            return self.dense_macs(size)
        macs = self.inner.macs((size[1], size[2]))
        return None if macs is None else self.frames * macs


class Views(OnClips):
    """A model of clips on all views of a video (B, V, 3, T, H, W), one after the other: the mean of
    their probabilities, as logarithms. MACs are those of a view.
    """

    @property
    def backbone(self) -> Views:
        inner: Any = self.model
        return Views(inner.backbone)

    def forward(self, views: Tensor) -> Tensor:
        """Logarithms (B, classes) of mean probabilities."""
        return mean_of_views([self.model(view) for view in views.unbind(1)])

    @torch.no_grad()
    def trace(self, views: Tensor) -> Trace:
        model: Any = self.model
        traces: list[Trace] = [model.trace(view) for view in views.unbind(1)]
        logits = mean_of_views([trace.logits for trace in traces])
        macs = torch.stack([trace.macs for trace in traces]).mean(0)
        return replace(traces[0], logits=logits, macs=macs)

    def dense_macs(self, size: tuple[int, ...]) -> int:
        """MACs of a view of (frames, height, width), with nothing dropped."""
        if isinstance(self.model, OnClips):
            model: Any = self.model
            return int(model.dense_macs(size))
        return dense_macs_of(self.model, size)


def mean_of_views(logits: list[Tensor]) -> Tensor:
    """Logarithms (B, classes) of the mean probabilities of several logits (B, classes)."""
    if len(logits) == 1:
        return logits[0]
    logs = torch.stack([one.float().log_softmax(-1) for one in logits])
    return logs.logsumexp(0) - torch.tensor(float(len(logits))).log()


def dense_macs_of(model: nn.Module, size: tuple[int, ...]) -> int:
    """MACs of a model, with nothing dropped, on one image or clip of this size."""
    if isinstance(model, SparseModel):
        model = model.backbone
    device = next(model.parameters()).device
    return dense_macs(model, torch.zeros(1, 3, *size, device=device))
