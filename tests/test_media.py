"""Promise: what the vision tower gets is what the official processor would give it, and a file that cannot be read is a
MediaError and nothing else."""
import os

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
