"""Promise: what the vision tower gets is what the official processor would give it: the frames that a player shows, in
order, and their seconds. A file that cannot be read is a MediaError and nothing else."""
import io
import os
import struct
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as official

import data
from data import (InputSettings, MediaError, Record, frame_indices, patchify, read_image, read_media, read_video,
                  smart_resize)


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbered(i: int) -> np.ndarray:
    """A frame (96, 160, 3) that shows its number: nine blocks from left to right are its bits, lowest first."""
    frame = np.full((96, 160, 3), 60, np.uint8)
    for bit in range(9):
        frame[40:56, 8 + 16 * bit:24 + 16 * bit] = 255 * (i >> bit & 1)
    return frame


def numbers(frames: np.ndarray) -> list[int]:
    blocks = frames[:, 45:51, 8:152].reshape(len(frames), 6, 9, 16, 3)[:, :, :, 3:13].mean(axis=(1, 3, 4))
    return ((blocks > 125) @ (1 << np.arange(9))).tolist()


def write_clip(path: Path, codec: str, times: list[int] | range = range(60), unit: Fraction = Fraction(1, 25),
               gop: int = 20, options: dict | None = None, format: str | None = None) -> Path:
    """Frames 0, 1, 2, … of a clip, shown at `times` in `unit`."""
    with av.open(str(path), "w", format=format) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 160, 96, "yuv420p", gop
        stream.codec_context.time_base = unit
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            frame.pts, frame.time_base = time, unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def copy_clip(source: Path, path: Path, first: int = 0, start: int = 0, extra: bool = False) -> Path:
    """Copies the packets of frames from `first` on, unchanged. Those before `start` get negative times: an MP4 hides them.
    extra: VP8 frames but key frames come again, as frames that are not shown, such as encoders make for reference."""
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is None or packet.pts * packet.time_base < Fraction(first, 25):
                continue
            shift, packet.stream = round(Fraction(start, 25) / packet.time_base), stream
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            again = bytearray(packet)
            again[0] &= ~0x10                                # the bit that says: show it
            again = av.Packet(bytes(again))
            again.stream, again.pts, again.dts, again.time_base = stream, packet.pts + 1, packet.dts + 1, packet.time_base
            new.mux(packet)
            if extra and not packet.is_keyframe:
                new.mux(again)
    return path


def spread(first: int, last: int, count: int) -> list[int]:
    return np.linspace(first, last, count).round().astype(int).tolist()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A media root: good.avi with 20 frames at 5 a second, pictures/ with 7 frames, and much that is broken."""
    root = tmp_path_factory.mktemp("media")
    (root / "good.avi").write_bytes(data.avi_bytes(noise(20, 42, 56, 3), 5))
    for name in ("pictures", "no_frames", "broken_frames", "mixed_frames"):
        (root / name).mkdir()
    for i, frame in enumerate(noise(7, 42, 56, 3)):
        Image.fromarray(frame).save(root / "pictures" / f"{i:03d}.png")
    for i, width in enumerate((56, 28)):
        Image.fromarray(noise(28, width, 3)).save(root / "mixed_frames" / f"{i}.png")
    clip, picture = ((root / name).read_bytes() for name in ("good.avi", "pictures/000.png"))
    garbage, page = noise(4000).tobytes(), b"<html>404 Not Found</html>"
    broken = {"empty.avi": b"", "empty.png": b"", "garbage.avi": garbage, "garbage.png": garbage, "page.mp4": page,
              "page.jpg": page, "cut.png": picture[:len(picture) // 2], "no_frames/notes.txt": b"no pictures here",
              "broken_frames/000.png": picture[:100]}
    for share in (0.1, 0.5, 0.9):
        broken[f"cut_{share}.avi"] = clip[:int(share * len(clip))]
    for name, content in broken.items():
        (root / name).write_bytes(content)
    return root


class TestFrames:
    @pytest.mark.parametrize("fps", [0.5, 1, 24, 29.97, 60])
    @pytest.mark.parametrize("frames", [2, 4, 6, 16, 32])
    def test_an_even_number_evenly_spread_with_first_and_last(self, fps, frames):
        settings = InputSettings(frames=frames)
        for total in [*range(1, 70), 500, 10_001]:
            chosen = frame_indices(total, fps, settings)
            assert len(chosen) % 2 == 0 and 2 <= len(chosen) <= frames
            assert chosen[0] == 0 and chosen[-1] == total - 1
            gaps = np.diff(chosen)
            assert gaps.max() - gaps.min() <= 1, "rounding moves a frame by less than one place"

    @pytest.mark.parametrize("total, fps, frames, official", [
        (30, 30, 16, 4), (90, 30, 16, 6), (150, 30, 16, 10), (9000, 30, 16, 16), (234, 30, 16, 14), (270, 25, 32, 20)])
    def test_two_frames_a_second_rounded_down_to_an_even_number(self, total, fps, frames, official):
        """234 frames at 30 a second last 7.8 s: 15.6 frames, of which the official utility takes 14."""
        assert len(frame_indices(total, float(fps), InputSettings(frames=frames))) == official

    def test_frames_and_seconds_of_a_video_file(self, media):
        frames, seconds = read_video(media / "good.avi", InputSettings(frames=8))
        chosen = [0, 3, 5, 8, 11, 14, 16, 19]
        assert np.array_equal(frames, noise(20, 42, 56, 3)[chosen])
        assert seconds == pytest.approx(2 * 20 / (5 * 8))

    def test_a_folder_of_frames_is_a_video(self, media):
        frames, seconds = read_video(media / "pictures", InputSettings(fps=2.0))
        assert np.array_equal(frames, noise(7, 42, 56, 3)[[0, 1, 2, 4, 5, 6]])
        assert seconds == pytest.approx(2 * 7 / (2.0 * 6))

    def test_numbered_frames_stand_in_the_order_of_their_numbers(self, tmp_path):
        for i, frame in enumerate(noise(12, 28, 28, 3)):
            Image.fromarray(frame).save(tmp_path / f"frame_{i}.png")
        assert np.array_equal(read_video(tmp_path, InputSettings())[0], noise(12, 28, 28, 3))


EIGHT = InputSettings(frames=8, fps=0)
X264 = {"bf": "3", "preset": "ultrafast", "x264-params": "b-adapt=0:bframes=3"}
CLIPS = {
    "h264.mp4": ("libx264", X264), "h264.mkv": ("libx264", X264), "h264.mov": ("libx264", X264),
    "h264.flv": ("libx264", X264), "h264.avi": ("libx264", X264), "xvid.avi": ("mpeg4", {"bf": "2"}),
    "xvid.mkv": ("mpeg4", {"bf": "2"}), "mpeg1.mpg": ("mpeg1video", {"bf": "2"}), "mpeg2.mp4": ("mpeg2video", {"bf": "2"}),
    "mpeg2.vob": ("mpeg2video", {"bf": "2"}), "windows.wmv": ("wmv2", {}), "sorenson.flv": ("flv", {}),
    "vp8.webm": ("libvpx", {"deadline": "realtime"}), "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": "open-gop=1:keyint=20:bframes=3:b-adapt=0:log-level=1"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "crf": "10"})}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The clips of CLIPS, 60 numbered frames at 25 a second."""
    root = tmp_path_factory.mktemp("clips")
    for name, (codec, options) in CLIPS.items():
        write_clip(root / name, codec, options=options, format={".wmv": "asf"}.get(Path(name).suffix))
    return root


class TestContainers:
    """READ_ON = 5 makes the clips long ones, in which decord may seek."""

    @pytest.mark.parametrize("read_on", [2000, 5])
    @pytest.mark.parametrize("name", CLIPS)
    def test_the_frames_that_a_player_shows(self, clips, name, read_on, monkeypatch):
        monkeypatch.setattr(data, "READ_ON", read_on)
        frames, seconds = read_video(clips / name, EIGHT)
        assert numbers(frames) == spread(0, 59, 8)
        assert 60 / 25 == pytest.approx(seconds * 8 / 2) or name == "h264.avi"        # its header says 50 a second

    @pytest.mark.parametrize("name, seeks", [("h264.mp4", True), ("h264.mkv", True), ("vp9.webm", True), ("av1.mp4", True),
                                             ("hevc.mp4", False), ("mpeg2.mp4", False), ("xvid.avi", False)])
    def test_a_long_clip_is_read_by_seeks_where_they_are_exact(self, clips, name, seeks, monkeypatch):
        """In an open group of frames, key frames are shown later than decord counts them."""
        monkeypatch.setattr(data, "READ_ON", 5)
        monkeypatch.setattr(data, "read_on", lambda reader, indices, *_: dict.fromkeys(indices, numbered(0)))
        shown = numbers(read_video(clips / name, EIGHT)[0])
        assert shown == (spread(0, 59, 8) if seeks else [0] * 8)

    @pytest.mark.parametrize("read_on", [2000, 5])
    @pytest.mark.parametrize("name, codec, options", [
        ("x.mp4", "libx264", X264), ("x.mov", "mpeg4", {"bf": "2"}), ("x.mp4", "mpeg2video", {"bf": "2"})])
    def test_a_cut_without_encoding_hides_what_stands_before_it(self, tmp_path, name, codec, options, read_on, monkeypatch):
        """Such a cut starts at a key frame: an edit list hides the frames up to the cut at 1.2 s, which is frame 30."""
        monkeypatch.setattr(data, "READ_ON", read_on)
        source = write_clip(tmp_path / ("whole" + name), codec, options=options)
        cut = copy_clip(source, tmp_path / name, first=20, start=30)
        frames, seconds = read_video(cut, EIGHT)
        assert numbers(frames) == spread(30, 59, 8) and seconds == pytest.approx(30 / 25 / 4)

    @pytest.mark.parametrize("read_on", [2000, 5])
    def test_frames_hidden_at_the_end_are_never_shown(self, clips, tmp_path, read_on, monkeypatch):
        """An edit list that ends after 1 s: decord does not say where."""
        monkeypatch.setattr(data, "READ_ON", read_on)
        raw = bytearray((clips / "h264.mp4").read_bytes())
        at = raw.index(b"elst") + 12
        assert struct.unpack(">I", raw[at:at + 4])[0] == 2400                # thousandths of a second
        raw[at:at + 4] = struct.pack(">I", 1000)
        (tmp_path / "x.mp4").write_bytes(raw)
        with pytest.raises(MediaError, match=r"25 of \d+ frames .* convert it to MP4"):
            read_video(tmp_path / "x.mp4", EIGHT)

    @pytest.mark.parametrize("read_on", [2000, 5])
    def test_frames_that_are_never_shown_are_not_counted(self, clips, tmp_path, read_on, monkeypatch):
        monkeypatch.setattr(data, "READ_ON", read_on)
        copy_clip(clips / "vp8.webm", tmp_path / "x.mkv", extra=True)
        with pytest.raises(MediaError, match="60 of 117 frames .* convert it to MP4"):
            read_video(tmp_path / "x.mkv", EIGHT)

    def test_a_stream_whose_beginning_decord_loses_is_refused(self, tmp_path):
        write_clip(tmp_path / "x.ts", "libx264", options=X264)
        with pytest.raises(MediaError, match=r"\d+ of 60 frames .* convert it to MP4"):
            read_video(tmp_path / "x.ts", EIGHT)

    def test_what_decord_cannot_decode_is_refused_and_never_shown_wrong(self, tmp_path):
        """decord2 3.4.0 fails at a key frame of HEVC before which several frames wait; decord 0.6.0 did not."""
        options = {"preset": "ultrafast", "x265-params": "open-gop=0:keyint=20:bframes=4:b-adapt=0:log-level=1"}
        clip = write_clip(tmp_path / "x.mp4", "libx265", options=options)
        try:
            assert numbers(read_video(clip, EIGHT)[0]) == spread(0, 59, 8)
        except MediaError as error:
            assert "convert it to MP4 (H.264)" in str(error)

    @pytest.mark.parametrize("name, codec", [("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.webm", "libvpx")])
    def test_seconds_at_a_variable_rate(self, tmp_path, name, codec):
        """20 frames at 25 a second, then 20 at 5 a second."""
        times = [*range(0, 800, 40), *range(800, 4800, 200)]
        clip = write_clip(tmp_path / name, codec, times, Fraction(1, 1000))
        frames, seconds = read_video(clip, EIGHT)
        assert numbers(frames) == spread(0, 39, 8) and seconds == pytest.approx(4.8 / 4, rel=0.03)

    def test_a_rate_that_nobody_wrote_is_refused(self, tmp_path):
        """An AVI has one rate, and its frames out of order have no times."""
        clip = write_clip(tmp_path / "x.avi", "mpeg4", range(0, 4800, 80), Fraction(1, 1000), options={"bf": "2"})
        with pytest.raises(MediaError, match="60 frames at 1000.0 a second"):
            read_video(clip, EIGHT)

    @pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
    def test_an_animated_picture_is_no_video(self, tmp_path, format):
        pictures = [Image.fromarray(numbered(i)) for i in range(8)]
        if format not in Image.registered_extensions().values():
            pytest.skip("this Pillow cannot write it")
        pictures[0].save(tmp_path / "x", format, save_all=True, append_images=pictures[1:], duration=100)
        with pytest.raises(MediaError, match=rf"animation \({format[:3]}.*: convert an animation to MP4"):
            read_video(tmp_path / "x", EIGHT)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
class TestHanging:
    def test_a_read_that_hangs_is_named_and_the_next_clip_is_read(self, media, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "HANG", 0.2)
        os.mkfifo(tmp_path / "pipe.mp4")
        before = threading.active_count()
        with pytest.raises(MediaError, match="hangs: nothing came for 0.2 seconds"):
            read_video(tmp_path / "pipe.mp4", EIGHT)
        assert threading.active_count() == before + 1
        assert len(read_video(media / "good.avi", EIGHT)[0]) == 8
        os.close(os.open(tmp_path / "pipe.mp4", os.O_WRONLY))                # it ends

    def test_a_slow_read_does_not_hang(self, media, monkeypatch):
        monkeypatch.setattr(data, "HANG", 0.2)
        decode = data.decode

        def slowly(path, settings, beat):
            for _ in range(8):
                threading.Event().wait(0.05)
                beat()
            return decode(path, settings, beat)

        monkeypatch.setattr(data, "decode", slowly)
        assert len(read_video(media / "good.avi", EIGHT)[0]) == 8

    def test_the_program_ends_while_a_read_hangs_in_decord(self, tmp_path):
        code = f"""
import os, sys
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
import data
from pathlib import Path
data.HANG = 1
os.mkfifo("pipe.mp4")
pipe = os.open("pipe.mp4", os.O_RDWR)                        # both ends are open: only reads wait
os.write(pipe, bytes(12))
try:
    data.read_video(Path("pipe.mp4"), data.InputSettings())
except data.MediaError as error:
    print(error)
"""
        ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60, capture_output=True, text=True)
        assert ended.returncode == 0 and "hangs" in ended.stdout, ended.stderr


class TestPatches:
    @pytest.mark.parametrize("least, most", [
        (128 * 784, 128 * 784), (784, 784), (4 * 784, 1280 * 784)])
    def test_sizes_are_those_of_the_official_rule(self, least, most):
        rng = np.random.default_rng(0)
        for height, width in np.exp(rng.uniform(np.log(28), np.log(3000), (200, 2))).astype(int).tolist():
            assert smart_resize(height, width, least, most) == \
                official.smart_resize(height, width, min_pixels=least, max_pixels=most), (height, width)

    @pytest.mark.parametrize("height, width, least, most", [
        (56, 84, 784, 100 * 784), (333, 77, 784, 16 * 784), (30, 40, 16 * 784, 64 * 784), (61, 450, 32 * 784, 32 * 784)])
    def test_a_picture_equals_the_official_processor(self, height, width, least, most):
        picture = noise(height, width, 3)
        expected = official.Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most)(
            images=[Image.fromarray(picture)], return_tensors="pt")
        patches, grid = patchify(picture[None], least, most)
        assert list(grid) == expected["image_grid_thw"][0].tolist() and grid[0] == 1
        assert patches.dtype == torch.float32 and patches.shape == (grid[1] * grid[2], 3 * 2 * 14 * 14)
        assert (patches - expected["pixel_values"]).abs().max() < 1e-5

    def test_a_video_holds_two_frames_in_each_patch_as_the_official_processor_holds_one_twice(self):
        frames = noise(6, 70, 100, 3)
        processor = official.Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=100 * 784)
        single = [processor(images=[Image.fromarray(f)], return_tensors="pt")["pixel_values"].view(-1, 3, 2, 196)
                  for f in frames]
        patches, grid = patchify(frames, 784, 100 * 784)
        assert grid == (3, 4, 8)                             # 70 × 100 pixels become 56 × 112
        patches = patches.view(3, -1, 3, 2, 196)             # steps, patches, colours, frames, pixels
        for i, alone in enumerate(single):
            assert (patches[i // 2, :, :, i % 2] - alone[:, :, 0]).abs().max() < 1e-5

    def test_patches_that_will_be_merged_are_neighbours(self):
        """Every patch of a 4 × 4 grid is painted with its own brightness 10·row + column."""
        rows, columns = np.mgrid[:56, :56] // 14
        frame = np.repeat((10 * rows + columns)[..., None], 3, -1).astype(np.uint8)
        patches, grid = patchify(np.stack([frame, frame]), 784, 100 * 784)
        brightness = ((patches[:, 0] * data.STD[0] + data.MEAN[0]) * 255).round().int().tolist()
        assert grid == (1, 4, 4)
        assert brightness == [0, 1, 10, 11, 2, 3, 12, 13, 20, 21, 30, 31, 22, 23, 32, 33]


class TestPictures:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
    def test_every_kind_of_picture_is_read_as_three_colours(self, mode, tmp_path):
        picture = Image.fromarray(noise(20, 30, 3)).convert(mode)
        picture.save(tmp_path / "x", "JPEG" if mode == "CMYK" else "PNG")
        pixels = read_image(tmp_path / "x")
        assert pixels.shape == (1, 20, 30, 3) and pixels.dtype == np.uint8
        if mode != "CMYK":
            assert np.array_equal(pixels[0], np.asarray(picture.convert("RGB")))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_what_is_transparent_is_white(self, mode, tmp_path):
        """Black writing on a transparent ground would otherwise be black on black."""
        picture = Image.new("LA", (28, 28), (0, 0))
        picture.paste((0, 255), (0, 0, 28, 14))
        picture.convert("RGBA").convert(mode).save(tmp_path / "x.png")
        pixels = read_image(tmp_path / "x.png")[0]
        assert (pixels[:14] == 0).all() and (pixels[14:] == 255).all()


    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_picture_is_turned_as_its_camera_says(self, tmp_path, format, orientation):
        """Corners are numbered from the upper left one; the standard says where row 0 and column 0 of a file are shown."""
        corners = np.array([[0, 80], [160, 240]], np.uint8)
        shown = {1: corners, 2: corners[:, ::-1], 3: corners[::-1, ::-1], 4: corners[::-1], 5: corners.T,
                 6: corners.T[:, ::-1], 7: corners.T[::-1, ::-1], 8: corners.T[::-1]}[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(corners.repeat(10, 0).repeat(20, 1)).convert("RGB").save(tmp_path / "x", format, exif=exif)
        pixels = read_image(tmp_path / "x")
        height, width = (20, 40) if orientation < 5 else (40, 20)
        assert pixels.shape == (1, height, width, 3)
        read = pixels[0, height // 4::height // 2, width // 4::width // 2, 0]
        assert np.abs(read.astype(int) - shown).max() < 8

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("exif", [b"nonsense", b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0", b""])
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_broken_exif_data_do_not_matter(self, tmp_path, format, exif):
        Image.fromarray(noise(20, 40, 3)).save(tmp_path / "x", format, exif=b"Exif\0\0" + exif)
        assert read_image(tmp_path / "x").shape == (1, 20, 40, 3)

    RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)

    @pytest.mark.parametrize("values, format", [
        (RAMP, "PNG"), (RAMP, "TIFF"), (RAMP.astype(">u2"), "TIFF"), (RAMP.astype(np.int32), "TIFF"), (RAMP, "PPM"),
        (RAMP.astype(np.int32) * 1000, "TIFF"), (RAMP.astype(np.int32) // 257, "TIFF"),
        (RAMP.astype(np.float32), "TIFF"), (RAMP.astype(np.float32) / 65535, "TIFF"),
        (RAMP.astype(np.float32) / 257, "TIFF")])
    def test_grey_of_more_than_8_bits_is_scaled(self, tmp_path, values, format):
        """Pillow would cut it off at 255, and floats at 1 would be black."""
        Image.fromarray(values).save(tmp_path / "x", format)
        pixels = read_image(tmp_path / "x")[0]
        assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
        assert np.abs(pixels[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
        assert len(np.unique(pixels)) >= 255

    def test_a_dark_picture_of_16_bits_stays_dark(self, tmp_path):
        Image.fromarray(np.full((28, 28), 2570, np.uint16)).save(tmp_path / "x.png")
        assert (read_image(tmp_path / "x.png") == 10).all()

    def test_what_is_transparent_in_16_bits_is_white(self, tmp_path):
        """A PNG may name one grey value as the transparent one: here 7, in the left half."""
        rows = np.full((28, 28), 2570, np.uint16)
        rows[:, :14] = 7
        file = io.BytesIO()
        Image.fromarray(rows).save(file, "PNG", transparency=7)
        (tmp_path / "x.png").write_bytes(file.getvalue())
        pixels = read_image(tmp_path / "x.png")[0]
        assert (pixels[:, :14] == 255).all() and (pixels[:, 14:] == 10).all()

    def test_values_that_are_no_numbers_are_black(self, tmp_path):
        values = np.full((28, 28), 0.5, np.float32)
        values[0, 0], values[0, 1] = np.nan, -1
        Image.fromarray(values).save(tmp_path / "x.tiff")
        pixels = read_image(tmp_path / "x.tiff")[0]
        assert (pixels[0, :2] == 0).all() and (pixels[1:] == 127).all()


class TestBrokenMedia:
    @pytest.mark.parametrize("name", [
        "missing.avi", "empty.avi", "garbage.avi", "page.mp4", "cut_0.1.avi", "cut_0.5.avi", "cut_0.9.avi",
        "no_frames", "broken_frames", "mixed_frames"])
    def test_a_video_that_cannot_be_read(self, media, name):
        with pytest.raises(MediaError):
            read_video(media / name, InputSettings())

    @pytest.mark.parametrize("name", ["missing.png", "empty.png", "garbage.png", "page.jpg", "cut.png", "no_frames",
                                      "good.avi"])
    def test_a_picture_that_cannot_be_read(self, media, name):
        with pytest.raises(MediaError):
            read_image(media / name)

    @pytest.mark.parametrize("height, width", [(1, 300), (300, 1), (10, 2001)])
    def test_a_picture_that_is_too_narrow(self, height, width):
        with pytest.raises(MediaError, match="narrow"):
            patchify(noise(1, height, width, 3), 784, 100 * 784)

    def test_a_codec_that_decord_lacks_is_said_in_plain_words(self, media, tmp_path):
        (tmp_path / "x.avi").write_bytes((media / "good.avi").read_bytes().replace(b"MPNG", b"XXXX"))
        with pytest.raises(MediaError, match=r"a codec that decord lacks.*convert it to MP4 \(H.264\)"):
            read_video(tmp_path / "x.avi", InputSettings())

    @pytest.mark.parametrize("frame", [0, 8, 19])
    def test_a_frame_that_cannot_be_decoded_is_never_shown_as_another(self, media, tmp_path, frame):
        """decord refuses the file or, at random, leaves the frame out: every frame that it gives is a real one."""
        raw, clip = bytearray((media / "good.avi").read_bytes()), [frame.tobytes() for frame in noise(20, 42, 56, 3)]
        at = [i for i in range(len(raw)) if raw[i:i + 4] == b"00dc"][frame]
        raw[at + 8:at + 500] = bytes(492)
        (tmp_path / "x.avi").write_bytes(raw)
        try:
            shown = [clip.index(x.tobytes()) for x in read_video(tmp_path / "x.avi", InputSettings(frames=8))[0]]
        except MediaError:
            return
        assert frame not in shown and shown == sorted(set(shown))


def read_path(root, path) -> np.ndarray:
    return read_media(Record("", "", (), "OCR", "", path, "video"), root, InputSettings())[0]


class TestPaths:
    @pytest.mark.parametrize("path", ["./good.avi", "pictures/../good.avi", ".//good.avi"])
    def test_a_path_inside_the_root_is_found(self, media, path):
        assert np.array_equal(read_path(media, path), read_video(media / "good.avi", InputSettings())[0])

    @pytest.mark.parametrize("path", ["/etc/passwd", "..", "../secret.avi", "link.avi", "up/secret.avi"])
    def test_a_path_that_leaves_the_root_is_refused(self, tmp_path, path):
        root = tmp_path / "root"
        root.mkdir()
        (tmp_path / "secret.avi").touch()
        os.symlink(tmp_path / "secret.avi", root / "link.avi")
        os.symlink(tmp_path, root / "up")
        with pytest.raises(MediaError, match="leads out of"):
            read_path(root, path)

    @pytest.mark.parametrize("path", ["a\0b.avi", "x" * 300 + ".avi", "y/" * 3000 + "x.avi", "loop/x.avi"],
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
        (place / "9a11").write_bytes(data.avi_bytes(noise(2, 28, 28, 3), 2))
    for folder in (snapshot, copy):
        (folder / "clips").mkdir(parents=True)
        os.symlink(os.path.relpath(blobs / "9a11", folder / "clips"), folder / "clips/good.avi")
        os.symlink(elsewhere / "9a11", folder / "clips/out.avi")
    os.symlink(snapshot, tmp_path / "link")
    return snapshot


class TestCache:
    @pytest.mark.parametrize("root, path", [(".", "clips/good.avi"), ("clips", "good.avi"),
                                            ("../../../link", "clips/good.avi")])
    def test_media_that_are_linked_inside_one_cache_are_read(self, cache, root, path):
        assert np.array_equal(read_path(cache / root, path), noise(2, 28, 28, 3))

    @pytest.mark.parametrize("root, path", [
        (".", "clips/out.avi"), ("clips", "out.avi"), (".", "../../../elsewhere/9a11"), ("..", "../../elsewhere/9a11"),
        ("../../copies/0f3c", "clips/good.avi")])
    def test_what_lies_outside_of_it_or_is_linked_from_outside_is_refused(self, cache, root, path):
        assert (cache / root / path).is_file()
        with pytest.raises(MediaError, match="leads out of"):
            read_path(cache / root, path)
