"""Video files, odd ones too, and the clips that are made of them."""

from __future__ import annotations

import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vitrim import ConfigError, InputError
from vitrim.runtime import UnreadableImageError
from vitrim.tasks.clips import ClipReader, held_out_reader, is_clips, open_clips
from vitrim.tasks.labelled import training_transform
from vitrim.tasks.moving_digits import MovingDigits, write_moving_digits
from vitrim.tasks.sampling import Sampling
from vitrim.tasks.video_files import VideoFile, write_video
from vitrim.train.data import EvalLoader, digits_data_config
from vitrim.train.recipe import AugmentRecipe
from vitrim.train.samples import seeded

CONFIG = digits_data_config(48)


def greys(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose grey says their number."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    return frames + np.arange(0, 240, 240 // count, np.uint8)[:, None, None, None]


def numbers(path: Path, count: int, wanted: list[int]) -> list[int]:
    """Which frames of :func:`greys` are read as these."""
    with open(path, "rb") as file, VideoFile(file) as video:
        found = video.read(wanted, lambda image: round(np.asarray(image).mean() * count / 240))
    return [found[number] for number in wanted]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, greys(40), 10)
    return path


def test_a_moving_digit_moves_as_its_label_says_and_returns():
    clips = MovingDigits("train", 12, clutter=0.0)
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for index in range(12):
        frames, label = clips.clip(index)
        digit, direction = clips.classes[label].split()
        assert frames.shape == (16, 64, 64, 3)
        assert int(digit) == label // 4
        rows, columns = steps[direction]
        shifts = []
        for frame in frames:
            moved = (np.roll(frames[0], (n * rows, n * columns), (0, 1)) for n in range(64))
            shifts.append(next(n for n, rolled in enumerate(moved) if (rolled == frame).all()))
        assert shifts[0] == 0
        assert all(1 <= (late - early) % 64 <= 2 for early, late in pairwise(shifts))
        again = MovingDigits("train", 12, clutter=0.0).clip(index)[0]
        assert (again == frames).all()


def test_splits_epochs_and_seeds_differ():
    clips = MovingDigits("train", 4)
    first = clips.clip(0)[0]
    clips.set_epoch(1)
    others = [clips.clip(0)[0], MovingDigits("val", 4).clip(0)[0], MovingDigits(seed=1).clip(0)[0]]
    assert all((first != other).any() for other in others)


def test_files_hold_what_the_arrays_do(tmp_path):
    folder = write_moving_digits(tmp_path / "digits", 4)
    reader = held_out_reader(digits_data_config(64), Sampling(16, 1))
    written = open_clips(folder, reader)
    arrays = MovingDigits("train", 4, transform=reader.read_array)
    for index in range(4):
        views, label = arrays[index]
        place = next(i for i in range(4) if written.name(i).endswith(f"{index:06d}.mp4"))
        found, number = written[place]
        assert written.classes[number] == arrays.classes[label].replace(" ", "_")
        assert found.shape == views.shape == (1, 3, 16, 64, 64)
        assert (found - views).abs().mean() < 0.15  # colours are halved in files
    with pytest.raises(InputError, match="is in use"):
        write_moving_digits(folder, 1)


@pytest.mark.parametrize(
    ("sampling", "length", "expected"),
    [
        (Sampling(4, 2), 11, [[2, 4, 6, 8]]),
        (Sampling(4, 2, clips=2), 11, [[1, 3, 5, 7], [3, 5, 7, 9]]),
        (Sampling(4, 2), 4, [[0, 2, 3, 3]]),
        (Sampling(3, 5), 1, [[0, 0, 0]]),
        (Sampling(4, 0), 8, [[1, 3, 5, 7]]),
        (Sampling(2, 0, clips=2), 8, [[1, 5], [3, 7]]),
    ],
)
def test_frames_of_a_clip(sampling, length, expected):
    assert sampling.numbers(length, training=False).tolist() == expected
    if sampling.stride:
        expected = np.minimum(np.arange(sampling.frames) * sampling.stride, length - 1)
        with seeded(0):
            drawn = [sampling.numbers(length, training=True)[0] for _ in range(50)]
        assert {int(row[0]) for row in drawn} == set(range(max(1, length - 6 if length > 6 else 1)))
        if length < 6:
            assert all((row == expected).all() for row in drawn)


@pytest.mark.parametrize("bad", [{"frames": 0}, {"stride": -1}, {"clips": 0}, {"crops": 2}])
def test_samplings_that_cannot_be(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**({"frames": 4} | bad))


def test_frames_by_number_from_anywhere(clip):
    assert numbers(clip, 40, [0, 39, 17]) == [0, 39, 17]
    with open(clip, "rb") as file, VideoFile(file) as video:
        assert len(video) == 40


def test_variable_rate_is_read_by_time(tmp_path):
    """Frames 0 to 5 in half a second, then one in a second and a bit: the mean step is 0.6 s."""
    path, times = tmp_path / "odd.mp4", [0, 1, 2, 3, 4, 5, 17, 29, 41, 54]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for time, frame in zip(times, greys(10), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    assert numbers(path, 10, list(range(10))) == [0, 5, 6, 6, 7, 7, 8, 8, 9, 9]


@pytest.mark.parametrize(
    ("matrix", "turn"), [((0, 1, -1, 0), -90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 90)]
)
def test_turned_files_are_upright(tmp_path, matrix, turn):
    """Phones write the picture as their sensor lies, and a matrix in the track's header."""
    picture = np.zeros((1, 48, 64, 3), np.uint8)
    picture[:, :10, :20] = 255
    path = tmp_path / "turned.mp4"
    write_video(path, picture, 10)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    with open(path, "rb") as file, VideoFile(file) as video:
        found = np.asarray(video.read([0], lambda image: image)[0]).astype(int)
    expected = np.asarray(Image.fromarray(picture[0]).rotate(turn, expand=True)).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 8


def spoilt(folder: Path, clip: Path) -> dict[str, str]:
    """Files that cannot be read, and what is said of them."""
    good = clip.read_bytes()
    Image.new("RGB", (40, 30)).save(folder / "image.png")
    (folder / "image.png").rename(folder / "image.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.avi").write_text("no video at all")
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    segment = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{clip}\n#EXT-X-ENDLIST\n"
    (folder / "playlist.mp4").write_text(segment)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return {
        "image.mp4": "it is an image",
        "empty.mp4": "damaged, or no video",
        "text.avi": "damaged, or no video",
        "cut.mp4": "damaged, or no video",
        "playlist.mp4": "damaged, or no video",  # it names another file, which is not looked at
        "sound.mp4": "no video stream",
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_named_and_left_out(tmp_path, clip, workers):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    reasons = spoilt(folder, clip)
    (folder / "good.mp4").write_bytes(clip.read_bytes())
    dataset = open_clips(folder.parent, held_out_reader(CONFIG, Sampling(4, 2)))
    loader = EvalLoader(dataset, 3, workers)
    assert sum(len(labels) for _, labels in loader) == 1
    found = {Path(file.name).name: file.reason for file in loader.unreadable}
    assert found.keys() == reasons.keys()
    assert all(reasons[name] in reason for name, reason in found.items()), found


def test_damage_in_the_middle_is_found_where_it_is_met(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8)
    path = tmp_path / "spoilt.mp4"
    write_video(path, frames, 10)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    start = held_out_reader(CONFIG, Sampling(4, 2, clips=1))
    with open(path, "rb") as file, VideoFile(file) as video:
        assert len(video.read(range(8), np.asarray)) == 8
    with pytest.raises(
        UnreadableImageError, match=r"spoilt\.mp4 cannot be read as a video: its frames"
    ):
        open_clips(path, start, labelled=False)[0]


def test_csv_of_paths_and_labels(tmp_path, clip):
    (tmp_path / "a b.mp4").write_bytes(clip.read_bytes())
    reader = held_out_reader(CONFIG, Sampling(2))
    names = tmp_path / "names.csv"
    for text, labels, classes in [
        ("path,label\na b.mp4,run\nabsent.mp4,jump\n", [1, 0], ["jump", "run"]),
        ("a b.mp4,7\nabsent.mp4,2\n", [7, 2], None),
        ('"a b.mp4",7\r\n', [7], None),
        ("a b.mp4 3\n", [3], None),
    ]:
        names.write_text(text)
        dataset = open_clips(names, reader)
        assert [label for _, label in dataset.reader.samples] == labels
        assert dataset.classes == classes
        assert dataset[0][0].shape == (1, 3, 2, 48, 48)
    classes = tmp_path / "classes.txt"
    classes.write_text("sit\nrun\njump\n")
    names.write_text("a b.mp4,jump\n")
    assert open_clips(names, reader, class_map=classes)[0][1] == 2
    for text, message in [
        ("", "names no video"),
        ("a,b,c\n", "line 1 .* expected a path and a label"),
        ("a.mp4,\n", "expected a path and a label"),
        ("../a.mp4,1\n", "may lie outside"),
        ("/etc/a.mp4,1\n", "may lie outside"),
        ("a.mp4,swim\n", "lacks 1 class"),
        ('"a.mp4,1\n', "line 1"),
    ]:
        names.write_text(text)
        with pytest.raises(InputError, match=message):
            open_clips(names, reader, class_map=classes)


def test_sources_that_are_none(tmp_path, clip):
    reader = held_out_reader(CONFIG, Sampling(2))
    with pytest.raises(InputError, match=r"do not exist.*'moving-digits'"):
        open_clips("moving-digit", reader)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="hold no video"):
        open_clips(tmp_path, reader)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "1.png")
    with pytest.raises(InputError, match=r"holds 1 images, such as 1\.png, and no video"):
        open_clips(tmp_path, reader)
    assert not is_clips(tmp_path)
    assert is_clips(clip)
    assert is_clips("moving-digits/test")


def test_three_crops_lie_along_the_longer_side(clip, tmp_path):
    frames = np.zeros((2, 48, 144, 3), np.uint8)
    for part, grey in enumerate((50, 150, 250)):
        frames[:, :, 48 * part : 48 * (part + 1)] = grey
    write_video(tmp_path / "wide.mp4", frames, 10)
    reader = held_out_reader(CONFIG, Sampling(2, 1, clips=2, crops=3))
    views, _ = open_clips(tmp_path / "wide.mp4", reader, labelled=False)[0]
    assert views.shape == (6, 3, 2, 48, 48)
    greys = ((views.mean((1, 2, 3, 4)) * 0.25 + 0.5) * 255).round()
    assert torch.allclose(greys, torch.tensor([50.0, 150.0, 250.0] * 2), atol=3)


def test_all_frames_of_a_clip_are_changed_alike():
    augment = AugmentRecipe(
        color_jitter=0.4, rand_augment="rand-m9-mstd0.5-inc1", random_erase=1.0, hflip=0.5
    )
    change = training_transform(augment, CONFIG)
    reader = ClipReader(Sampling(4, 1), change, training=True)
    picture = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8)
    drawn = []
    for seed in range(3):
        with seeded(seed):
            drawn.append(reader.read_array(picture.repeat(6, axis=0)))
        assert drawn[-1].shape == (3, 4, 48, 48)
        assert all(torch.equal(drawn[-1][:, 0], drawn[-1][:, t]) for t in range(1, 4))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
