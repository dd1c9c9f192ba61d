"""Promise: what the vision tower gets is what the official processor would give it: the frames that a player shows, in
order, and their seconds. A file that cannot be read is a MediaError and nothing else."""
import os
import re
import struct
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as official

import data
from data import (InputSettings, MediaError, Record, frame_indices, patchify, read_image, read_media, read_video,
                  smart_resize)

EIGHT = InputSettings(frames=8, fps=0)


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def numbered(i: int) -> np.ndarray:
    """A frame (96, 160, 3) that shows its number: nine blocks from left to right are its bits, lowest first."""
    frame = np.full((96, 160, 3), 60, np.uint8)
    bits = 255 * (i >> np.arange(9) & 1)
    frame[40:56, 8:152] = bits.repeat(16)[:, None]
    return frame


def numbers(frames: np.ndarray) -> list[int]:
    bits = frames[:, 48, 16:152:16, 0] > 125                 # the middle of each block
    return (bits @ (1 << np.arange(9))).tolist()


def write_clip(path: Path, codec: str, times: list[int] | range = range(60), unit: Fraction = Fraction(1, 25),
               options: dict | None = None, format: str | None = None) -> Path:
    """Frames 0, 1, 2, … of a clip, shown at `times` in `unit`. An MP4 hides those at negative times."""
    hiding = {"avoid_negative_ts": "disabled"} if times[0] < 0 else {}
    with av.open(str(path), "w", format=format, options=hiding) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.gop_size = 160, 96, 20
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        stream.codec_context.time_base = unit
        for i, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            frame.pts, frame.time_base = at, unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def spread(first: int, last: int, count: int) -> list[int]:
    return np.linspace(first, last, count).round().astype(int).tolist()


class TestFrames:
    @pytest.mark.parametrize("fps", [0.5, 24, 60])
    @pytest.mark.parametrize("frames", [2, 6, 32])
    def test_an_even_number_evenly_spread_with_first_and_last(self, fps, frames):
        for total in [*range(1, 70), 10_001]:
            chosen, _ = frame_indices(total, fps, InputSettings(frames=frames))
            assert len(chosen) % 2 == 0 and 2 <= len(chosen) <= frames
            assert chosen[0] == 0 and chosen[-1] == total - 1
            assert np.ptp(np.diff(chosen)) <= 1, "rounding moves a frame by less than one place"

    @pytest.mark.parametrize("total, fps, frames, count", [
        (30, 30, 16, 4), (150, 30, 16, 10), (9000, 30, 16, 16), (234, 30, 16, 14), (270, 25, 32, 20)])
    def test_two_frames_a_second_rounded_down_to_an_even_number(self, total, fps, frames, count):
        """234 frames at 30 a second last 7.8 s: 15.6 frames, of which the official utility takes 14."""
        assert len(frame_indices(total, fps, InputSettings(frames=frames))[0]) == count

    def test_a_folder_of_pictures_is_a_video_in_the_order_of_their_numbers(self, tmp_path):
        for i in range(12):
            Image.fromarray(numbered(i)).save(tmp_path / f"frame_{i}.png")
        frames, seconds = read_video(tmp_path, InputSettings(frames=8))
        assert numbers(frames) == spread(0, 11, 8) and seconds == 12 / 8
        Image.fromarray(noise(28, 28, 3)).save(tmp_path / "frame_0.png")
        with pytest.raises(MediaError, match="differ in size"):
            read_video(tmp_path, EIGHT)


X264 = {"bf": "3", "preset": "ultrafast", "x264-params": "b-adapt=0:bframes=3"}
CLIPS = {
    "h264.mp4": ("libx264", X264), "h264.mkv": ("libx264", X264), "h264.flv": ("libx264", X264),
    "h264.avi": ("libx264", X264), "xvid.avi": ("mpeg4", {"bf": "2"}), "mpeg1.mpg": ("mpeg1video", {"bf": "2"}),
    "mpeg2.mp4": ("mpeg2video", {"bf": "2"}), "mpeg2.vob": ("mpeg2video", {"bf": "2"}), "windows.wmv": ("wmv2", {}),
    "vp8.webm": ("libvpx", {"deadline": "realtime"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "hevc.mp4": ("libx265", {
        "preset": "ultrafast", "x265-params": "open-gop=1:keyint=20:bframes=3:b-adapt=0:log-level=1"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "crf": "10"})}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The clips of CLIPS, 60 numbered frames at 25 a second."""
    root = tmp_path_factory.mktemp("clips")
    for name, (codec, options) in CLIPS.items():
        write_clip(root / name, codec, options=options, format="asf" if name == "windows.wmv" else None)
    return root


@pytest.fixture(params=[2000, 5], ids=["read on", "seek"])
def both_paths(request, monkeypatch):
    """READ_ON = 5 makes the clips long ones, in which decord may seek."""
    monkeypatch.setattr(data, "READ_ON", request.param)


class TestContainers:
    @pytest.mark.parametrize("name", CLIPS)
    def test_the_frames_that_a_player_shows(self, clips, name, both_paths):
        frames, seconds = read_video(clips / name, EIGHT)
        assert numbers(frames) == spread(0, 59, 8)
        assert seconds == pytest.approx(60 / 25 / 4) or name == "h264.avi"        # its header says 50 a second

    @pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "vp9.webm", "av1.mp4"])
    def test_a_long_clip_is_read_by_seeks_where_they_are_exact(self, clips, name, monkeypatch):
        monkeypatch.setattr(data, "READ_ON", 5)
        monkeypatch.delattr(data, "read_on")
        assert numbers(read_video(clips / name, EIGHT)[0]) == spread(0, 59, 8)

    @pytest.mark.parametrize("name, codec, options", [
        ("x.mp4", "libx264", X264), ("x.mov", "mpeg4", {"bf": "2"}), ("x.mp4", "mpeg2video", {"bf": "2"})])
    def test_what_an_edit_list_hides_at_the_beginning_is_not_shown(self, tmp_path, name, codec, options, both_paths):
        """So does a cut without encoding: it starts at a key frame."""
        clip = write_clip(tmp_path / name, codec, range(-10, 50), options=options)
        frames, seconds = read_video(clip, EIGHT)
        assert numbers(frames) == spread(10, 59, 8) and seconds == pytest.approx(50 / 25 / 4)

    def test_a_clip_of_which_decord_shows_other_frames_than_it_counts_is_refused(self, clips, tmp_path, both_paths):
        """An edit list ends after a second; VP8 frames come again as ones that are not shown, such as encoders make for
        reference; and decord loses the beginning of a transport stream."""
        raw = bytearray((clips / "h264.mp4").read_bytes())
        at = raw.index(b"elst") + 12
        raw[at:at + 4] = struct.pack(">I", 1000)
        (tmp_path / "x.mp4").write_bytes(raw)
        with av.open(str(clips / "vp8.webm")) as old, av.open(str(tmp_path / "x.mkv"), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is None:
                    continue
                packet.stream = stream
                hidden = bytearray(packet)
                hidden[0] &= ~0x10                           # the bit that says: show it
                hidden = av.Packet(bytes(hidden))
                hidden.stream, hidden.time_base = stream, packet.time_base
                hidden.pts = hidden.dts = packet.pts + 1
                new.mux(packet if packet.is_keyframe else [packet, hidden])
        write_clip(tmp_path / "x.ts", "libx264", options=X264)
        for name in ("x.mp4", "x.mkv", "x.ts"):
            with pytest.raises(MediaError, match=r"\d+ of \d+ frames .* convert it to MP4"):
                read_video(tmp_path / name, EIGHT)

    @pytest.mark.parametrize("name, codec", [("x.mp4", "libx264"), ("x.webm", "libvpx")])
    def test_seconds_at_a_variable_rate(self, tmp_path, name, codec):
        """20 frames at 25 a second, then 20 at 5 a second."""
        times = [*range(0, 800, 40), *range(800, 4800, 200)]
        frames, seconds = read_video(write_clip(tmp_path / name, codec, times, Fraction(1, 1000)), EIGHT)
        assert numbers(frames) == spread(0, 39, 8) and seconds == pytest.approx(4.8 / 4, rel=0.03)

    def test_a_rate_that_nobody_wrote_is_refused(self, tmp_path):
        """An AVI has one rate, and its frames out of order have no times."""
        clip = write_clip(tmp_path / "x.avi", "mpeg4", range(0, 4800, 80), Fraction(1, 1000), options={"bf": "2"})
        with pytest.raises(MediaError, match="60 frames at 1000.0 a second"):
            read_video(clip, EIGHT)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_a_video_and_a_picture_is_none(tmp_path, kind):
    first, *rest = [Image.fromarray(numbered(i)) for i in range(60)]
    first.save(tmp_path / "clip", kind, save_all=True, append_images=rest, duration=40, lossless=True)
    frames, seconds = read_video(tmp_path / "clip", EIGHT)
    assert numbers(frames) == spread(0, 59, 8) and seconds == pytest.approx(60 / 25 / 4)
    first.save(tmp_path / "still", kind)
    with pytest.raises(MediaError, match="a picture, not a video"):
        read_video(tmp_path / "still", EIGHT)


class TestHanging:
    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
    def test_a_read_that_hangs_is_named_and_the_program_does_not_wait_for_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "HANG", 0.2)
        os.mkfifo(tmp_path / "pipe.mp4")
        before = set(threading.enumerate())
        with pytest.raises(MediaError, match="hangs: nothing came for 0.2 seconds"):
            read_video(tmp_path / "pipe.mp4", EIGHT)
        left, = set(threading.enumerate()) - before
        writer = os.open(tmp_path / "pipe.mp4", os.O_WRONLY)
        (tmp_path / "pipe.mp4").unlink()
        os.close(writer)                                     # the read ends
        assert left.daemon

    def test_a_slow_read_does_not_hang(self, tmp_path, monkeypatch):
        def slowly(path, settings, beat):
            for _ in range(8):
                time.sleep(0.05)
                beat()
            return "frames"

        monkeypatch.setattr(data, "HANG", 0.2)
        monkeypatch.setattr(data, "decode", slowly)
        assert read_video(tmp_path / "x.mp4", EIGHT) == "frames"


class TestPatches:
    @pytest.mark.parametrize("limits", [(128 * 784, 128 * 784), (784, 784), (4 * 784, 1280 * 784)])
    def test_sizes_are_those_of_the_official_rule(self, limits):
        sides = np.exp(np.random.default_rng(0).uniform(3.4, 8, (200, 2)))   # 30 to 2980
        for height, width in sides.astype(int).tolist():
            assert smart_resize(height, width, *limits) == official.smart_resize(height, width, 28, *limits)

    @pytest.mark.parametrize("height, width, least, most", [
        (56, 84, 784, 100 * 784), (333, 77, 784, 16 * 784), (30, 40, 16 * 784, 64 * 784),
        (61, 450, 32 * 784, 32 * 784)])
    def test_patches_are_those_of_the_official_processor(self, height, width, least, most):
        """A picture fills its patches twice, a video fills them with two frames."""
        processor = official.Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most)
        frames = noise(4, height, width, 3)
        video, grid = patchify(frames, least, most)
        video = video.view(2, -1, 3, 2, 196)                 # steps, patches, colours, frames, pixels
        for i, frame in enumerate(frames):
            expected = processor(images=[Image.fromarray(frame)], return_tensors="pt")
            pixels, own_grid = patchify(frame[None], least, most)
            assert [[*own_grid]] == expected["image_grid_thw"].tolist() and grid == (2, *own_grid[1:])
            assert (pixels - expected["pixel_values"]).abs().max() < 1e-5
            half = expected["pixel_values"].view(-1, 3, 2, 196)[:, :, 0]
            assert (video[i // 2, :, :, i % 2] - half).abs().max() < 1e-5

    def test_a_picture_that_is_too_narrow_is_refused(self):
        with pytest.raises(MediaError, match="narrow"):
            patchify(noise(1, 10, 2001, 3), 784, 100 * 784)


@pytest.fixture
def reread(tmp_path):
    """Saves a picture and reads it."""
    def saved(picture, format="PNG", **options):
        picture.save(tmp_path / "x", format, **options)
        return read_image(tmp_path / "x")[0]
    return saved


class TestPictures:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
    def test_every_kind_of_picture_is_read_as_three_colours(self, mode, reread):
        picture = Image.fromarray(noise(20, 30, 3)).convert(mode)
        assert np.array_equal(reread(picture), picture.convert("RGB"))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_what_is_transparent_is_white(self, mode, reread):
        """Black writing on a transparent ground would otherwise be black on black."""
        picture = Image.new("LA", (28, 28), (0, 0))
        picture.paste((0, 255), (0, 0, 28, 14))
        pixels = reread(picture.convert("RGBA").convert(mode))
        assert (pixels[:14] == 0).all() and (pixels[14:] == 255).all()

    def test_a_picture_is_turned_as_its_camera_says(self, reread):
        picture, exif = noise(20, 40, 3), Image.Exif()
        exif[0x0112] = 6                                     # its first row is shown at the right
        assert np.array_equal(reread(Image.fromarray(picture), exif=exif), np.rot90(picture, -1))

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("exif", [b"nonsense", b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0", b""])
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_broken_exif_data_do_not_matter(self, format, exif, reread):
        picture = Image.fromarray(noise(20, 40, 3))
        assert reread(picture, format, exif=b"Exif\0\0" + exif).shape == (20, 40, 3)

    RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)

    @pytest.mark.parametrize("format, values", [("PNG", RAMP), ("TIFF", RAMP.astype(">u2"))])
    def test_grey_of_16_bits_is_scaled(self, format, values, reread):
        """Pillow would cut it off at 255."""
        pixels = reread(Image.fromarray(values), format)
        assert (pixels == np.arange(256).reshape(16, 16, 1)).all()

    @pytest.mark.parametrize("values", [RAMP.astype(np.int32), RAMP.astype(np.float32)])
    def test_grey_of_32_bits_is_refused(self, values, reread):
        with pytest.raises(MediaError, match="range is not known"):
            reread(Image.fromarray(values), "TIFF")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A media root: good.avi with 20 frames, which are PNG pictures, good.png, and much that is broken."""
    root = tmp_path_factory.mktemp("media")
    clip = write_clip(root / "good.avi", "png", range(20)).read_bytes()
    Image.fromarray(noise(42, 56, 3)).save(root / "good.png")
    (root / "folder").mkdir()
    broken = {"empty": b"", "garbage": noise(4000).tobytes(), "page": b"<html>404 Not Found</html>",
              "cut picture": (root / "good.png").read_bytes()[:3000], "cut clip": clip[:-len(clip) // 2],
              "beginning": clip[:1000]}
    for name, content in broken.items():
        (root / name).write_bytes(content)
    return root


class TestBrokenMedia:
    @pytest.mark.parametrize("name", ["missing", "empty", "garbage", "page", "cut picture", "cut clip", "beginning",
                                      "folder"])
    def test_a_file_that_cannot_be_read_is_a_media_error(self, media, name):
        with pytest.raises(MediaError):
            read_video(media / name, EIGHT)
        with pytest.raises(MediaError):
            read_image(media / name)

    def test_a_codec_that_decord_lacks_is_said_in_plain_words(self, media, tmp_path):
        (tmp_path / "x.avi").write_bytes((media / "good.avi").read_bytes().replace(b"MPNG", b"XXXX"))
        with pytest.raises(MediaError, match=r"cannot find video stream.*convert it to MP4 \(H.264\)"):
            read_video(tmp_path / "x.avi", EIGHT)

    @pytest.mark.parametrize("frame", [0, 8, 19])
    def test_a_frame_that_cannot_be_decoded_is_never_shown_as_another(self, media, tmp_path, frame):
        """decord refuses the file or, at random, leaves the frame out: every frame that it gives is a real one."""
        raw = bytearray((media / "good.avi").read_bytes())
        at = [found.start() for found in re.finditer(b"\x89PNG", raw)][frame]
        raw[at:at + 100] = bytes(100)
        (tmp_path / "x.avi").write_bytes(raw)
        try:
            shown = numbers(read_video(tmp_path / "x.avi", EIGHT)[0])
        except MediaError:
            return
        assert frame not in shown and shown == sorted(set(shown))


def read_path(root, path) -> np.ndarray:
    return read_media(Record("", "", (), "OCR", "", path, "image"), root, EIGHT)[0]


class TestPaths:
    @pytest.mark.parametrize("path", ["./good.png", "folder/../good.png", ".//good.png"])
    def test_a_path_inside_the_root_is_found(self, media, path):
        assert np.array_equal(read_path(media, path), noise(1, 42, 56, 3))

    @pytest.mark.parametrize("path", ["/etc/passwd", "..", "../secret.png", "link.png", "up/secret.png"])
    def test_a_path_that_leaves_the_root_is_refused(self, tmp_path, path):
        root = tmp_path / "root"
        root.mkdir()
        (tmp_path / "secret.png").touch()
        os.symlink(tmp_path / "secret.png", root / "link.png")
        os.symlink(tmp_path, root / "up")
        with pytest.raises(MediaError, match="leads out of"):
            read_path(root, path)

    @pytest.mark.parametrize("path", ["a\0b.png", "x" * 300, "y/" * 3000, "loop/x.png"],
                             ids=["zero byte", "long name", "long path", "link to itself"])
    def test_a_path_that_no_file_can_have(self, tmp_path, path):
        os.symlink("loop", tmp_path / "loop")
        with pytest.raises(MediaError):
            read_path(tmp_path, path)


@pytest.fixture
def cache(tmp_path):
    """datasets--x--y/snapshots/0f3c as a Hugging Face cache holds it: its files are links into blobs/. The folder
    datasets--x--y/copies/0f3c has the same links, but is no snapshot."""
    snapshot, copy = (tmp_path / "datasets--x--y" / folder / "0f3c" for folder in ("snapshots", "copies"))
    blobs, elsewhere = tmp_path / "datasets--x--y/blobs", tmp_path / "elsewhere"
    for place in (blobs, elsewhere):
        place.mkdir(parents=True)
        Image.fromarray(noise(28, 28, 3)).save(place / "9a11", "PNG")
    for folder in (snapshot, copy):
        (folder / "clips").mkdir(parents=True)
        os.symlink("../../../blobs/9a11", folder / "clips/good.png")
        os.symlink(elsewhere / "9a11", folder / "clips/out.png")
    os.symlink(snapshot, tmp_path / "link")
    return snapshot


class TestCache:
    @pytest.mark.parametrize("root, path", [(".", "clips/good.png"), ("clips", "good.png"),
                                            ("../../../link", "clips/good.png")])
    def test_media_that_are_linked_inside_one_cache_are_read(self, cache, root, path):
        assert np.array_equal(read_path(cache / root, path), noise(1, 28, 28, 3))

    @pytest.mark.parametrize("root, path", [
        ("clips", "out.png"), (".", "../../../elsewhere/9a11"), ("../../copies/0f3c", "clips/good.png")])
    def test_what_lies_outside_of_it_or_is_linked_from_outside_is_refused(self, cache, root, path):
        assert (cache / root / path).is_file()
        with pytest.raises(MediaError, match="leads out of"):
            read_path(cache / root, path)
