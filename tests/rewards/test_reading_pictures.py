"""The reader of image files gives what a viewer shows, or an error sentence that names the file."""

import base64
import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

import rewards.media
from rewards import RewardError
from rewards.http.wire import JSON, Limits, decode
from rewards.media import folder_images, images_in, natural, open_image, read_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def levels(path):
    """(H, W, 3) in 0 to 255."""
    return (read_image(path) * 255).round().int().permute(1, 2, 0).tolist()


def other_primaries():
    """The profile of sRGB with red and green changed about, under another name."""
    places = {SRGB[at : at + 4]: at for at in range(132, 132 + 12 * struct.unpack(">I", SRGB[128:132])[0], 12)}
    red, green, changed = places[b"rXYZ"] + 4, places[b"gXYZ"] + 4, bytearray(SRGB)
    changed[red : red + 8], changed[green : green + 8] = SRGB[green : green + 8], SRGB[red : red + 8]
    return bytes(changed).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


def grey(values):
    return Image.fromarray(np.array([values], dtype=np.uint16))


def gamma_of_grey():
    """A profile of grey without a curve of its own: a level of 55 is as bright as one of 127 in sRGB."""
    curve = b"curv" + bytes(8)
    tags = {b"kTRC": curve, b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)}
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", 7) + b"linear\0" + bytes(79)
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name + struct.pack(">2I", start + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    header = bytearray(SRGB[:128])
    header[16:20] = b"GRAY"
    whole = bytes(header) + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize(("orientation", "corner"), [(3, (-1, -1)), (6, (0, -1)), (8, (-1, 0)), (2, (0, -1))])
def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path, kind, orientation, corner):
    image, exif = Image.new("RGB", (48, 32), "white"), Image.Exif()
    image.paste((0, 0, 0), (0, 0, 16, 16))
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{kind}", exif=exif)
    shown = read_image(tmp_path / f"a.{kind}")
    assert shown.shape == ((3, 48, 32) if orientation in (6, 8) else (3, 32, 48))
    assert shown[:, corner[0], corner[1]].max() < 0.1 and shown.mean() > 0.7


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_grey_of_16_bits_is_scaled(tmp_path, kind):
    grey([0, 257, 32896, 65535]).save(tmp_path / f"a.{kind}")
    assert [pixel[0] for pixel in levels(tmp_path / f"a.{kind}")[0]] == [0, 1, 128, 255]


def test_grey_of_16_bits_whose_0_is_white_is_inverted(tmp_path):
    file = tmp_path / "a.tif"
    grey([0, 65535]).save(file)
    entry = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert file.read_bytes().count(entry) == 1
    file.write_bytes(file.read_bytes().replace(entry, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    assert [pixel[0] for pixel in levels(file)[0]] == [255, 0]


def transparent(mode):
    if mode == "P":
        image = Image.new("P", (2, 1), 1)
        image.putpalette([9, 9, 9, 200, 0, 0])
        image.putpixel((1, 0), 0)
        return image, {"transparency": 1}
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 1), (200, 0, 0, 0) if mode == "RGBA" else (200, 0))
        image.putpixel((1, 0), (9, 9, 9, 255) if mode == "RGBA" else (9, 255))
        return image, {}
    image = Image.new(mode, (2, 1), (200, 0, 0) if mode == "RGB" else 200)
    image.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else 9)
    return image, {"transparency": (200, 0, 0) if mode == "RGB" else 200}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_parts_are_laid_on_white_with_one_warning(tmp_path, caplog, mode):
    rewards.media._warn_of_white.cache_clear()
    image, options = transparent(mode)
    image.save(tmp_path / "a.png", **options)
    for _ in range(2):
        assert levels(tmp_path / "a.png") == [[[255, 255, 255], [9, 9, 9]]]
    assert [record.getMessage() for record in caplog.records] == ["images with transparent parts are laid on white"]


def png(colour, bits, row, **chunks):
    """A PNG of one row of pixels, written by hand, since Pillow writes few kinds."""
    size = 8 * len(row) // (bits * {0: 1, 2: 3, 3: 1}[colour])
    about = struct.pack(">2I5B", size, 1, bits, colour, 0, 0, 0)
    parts = {"IHDR": about, **chunks, "IDAT": zlib.compress(b"\0" + row), "IEND": b""}
    written = [(name.encode() + data) for name, data in parts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in written
    )


def test_a_transparent_colour_is_found_among_pixels_of_any_bits(tmp_path):
    path = tmp_path / "a.png"
    for bits, row, clear, shown in ((2, b"\x1b", 1, (0, 255, 170, 255)), (4, b"\x0a", 10, (0, 255))):
        path.write_bytes(png(0, bits, row, tRNS=struct.pack(">H", clear)))
        assert [pixel[0] for pixel in levels(path)[0]] == list(shown)
    path.write_bytes(png(3, 8, b"\0\1", PLTE=bytes([255, 0, 0, 0, 0, 255]), tRNS=bytes([0, 255])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert levels(path) == [[[255, 255, 255], [0, 0, 255]]]
    path.write_bytes(png(2, 16, bytes(6), tRNS=bytes(6)))
    with pytest.raises(RewardError, match=r"a\.png cannot be read as an image: its transparent colour has 16 bits"):
        read_image(path)


def test_a_pngs_gamma_is_applied_only_if_it_has_no_better_colour_data(tmp_path):
    path, linear = tmp_path / "a.png", struct.pack(">I", 100_000)
    for chunks, shown in (
        ({"gAMA": linear}, 186),  # 255 (128 / 255)^(1 / 2.2)
        ({"gAMA": struct.pack(">I", 45_455)}, 128),
        ({"sRGB": b"\0", "gAMA": linear}, 128),
    ):
        path.write_bytes(png(2, 8, bytes([128, 128, 128]), **chunks))
        assert levels(path) == [[[shown] * 3]]


def test_half_transparent_pixels_are_mixed_and_opaque_ones_give_no_warning(tmp_path, caplog):
    Image.new("RGBA", (1, 1), (255, 0, 0, 51)).save(tmp_path / "a.png")
    assert levels(tmp_path / "a.png") == [[[255, 204, 204]]]
    rewards.media._warn_of_white.cache_clear()
    caplog.clear()
    Image.new("RGBA", (1, 1), (255, 0, 0, 255)).save(tmp_path / "b.png")
    assert levels(tmp_path / "b.png") == [[[255, 0, 0]]] and not caplog.records


def test_colours_of_another_profile_are_converted_to_srgb(tmp_path):
    red, mine = Image.new("RGB", (1, 1), (255, 0, 0)), other_primaries()
    for name, profile in (("mine", mine), ("srgb", SRGB), ("damaged", b"no profile")):
        red.save(tmp_path / f"{name}.png", icc_profile=profile)
    Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save(tmp_path / "clear.png", icc_profile=mine)
    Image.new("L", (1, 1), 100).save(tmp_path / "grey.png", icc_profile=mine)
    Image.new("L", (1, 1), 55).save(tmp_path / "linear.png", icc_profile=gamma_of_grey())
    red.save(tmp_path / "unfit.png", icc_profile=gamma_of_grey())
    assert levels(tmp_path / "mine.png") == [[[0, 255, 0]]]
    assert levels(tmp_path / "srgb.png") == levels(tmp_path / "damaged.png") == [[[255, 0, 0]]]
    assert levels(tmp_path / "unfit.png") == [[[255, 0, 0]]]
    assert levels(tmp_path / "clear.png") == [[[255, 255, 255]]]
    assert levels(tmp_path / "grey.png") == [[[100, 100, 100]]]
    assert levels(tmp_path / "linear.png")[0][0][0] == pytest.approx(127, abs=2)


@pytest.mark.parametrize(
    ("mode", "kind", "colour"),
    [
        ("CMYK", "jpg", (0, 255, 255, 0)),
        ("CMYK", "tif", (0, 255, 255, 0)),
        ("1", "png", 1),
        ("L", "bmp", 255),
        ("RGB", "dib", (255, 0, 0)),
        ("P", "gif", 0),
        ("RGB", "jfif", (255, 0, 0)),
    ],
)
def test_every_kind_of_file_is_read(tmp_path, mode, kind, colour):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([255, 0, 0])
    image.save(tmp_path / f"A.{kind.upper()}", "JPEG" if kind == "jfif" else None)
    white = mode in ("1", "L")
    assert [path.name for path in images_in(tmp_path)] == [f"A.{kind.upper()}"]
    assert (
        np.abs(np.array(levels(tmp_path / f"A.{kind.upper()}")[0][0]) - ([255] * 3 if white else [255, 0, 0])).max() < 3
    )


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_an_animation_and_several_pages_are_refused_by_name(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    with pytest.raises(
        RewardError, match=rf"a\.{kind} cannot be read as an image: it has 3 frames or pages; save the one"
    ):
        read_image(tmp_path / f"a.{kind}")
    frames[0].save(tmp_path / f"b.{kind}")
    assert levels(tmp_path / f"b.{kind}")[0][0] == pytest.approx([255, 0, 0], abs=2)


def test_of_a_photograph_with_a_preview_the_photograph_is_read(tmp_path):
    photo, preview = Image.new("RGB", (16, 16), (0, 0, 255)), Image.new("RGB", (4, 4))
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    assert read_image(tmp_path / "a.jpg").shape == (3, 16, 16)


def noise(kind):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (b"", "it is empty"),
        (b"a text", "its content is none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "its content is none of PNG, JPEG"),
        (noise("PNG")[:2000], "truncated"),
        (noise("JPEG")[:2000], "truncated"),
        (noise("BMP")[:2000], "truncated"),
        (Image.new("I", (2, 2)), "its pixels are integers of 32 bits; save it with 8 bits"),
        (Image.new("F", (2, 2)), "its pixels are floats of 32 bits; save it with 8 bits"),
    ],
)
def test_a_file_that_is_no_image_is_refused_by_name(tmp_path, contents, why):
    file = tmp_path / "a.png"
    if isinstance(contents, Image.Image):
        contents.save(file, "TIFF")
    else:
        file.write_bytes(contents)
    with pytest.raises(RewardError, match=rf"{file} cannot be read as an image: .*{why}") as caught:
        open_image(file)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused_by_name(tmp_path):
    (tmp_path / "a.png").mkdir()
    for name, why in (("a.png", "Is a directory"), ("b.png", "No such file")):
        with pytest.raises(RewardError, match=rf"{name} cannot be read as an image: {why}"):
            read_image(tmp_path / name)
    with pytest.raises(RewardError, match="no_folder cannot be read as a folder of images: No such file"):
        images_in(tmp_path / "no_folder")


def test_the_server_reads_a_png_as_the_reader_does():
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image = Image.new("RGBA", (3, 2), (9, 9, 9, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(file, "PNG", exif=exif)
    wide = io.BytesIO()
    grey([0, 32896]).save(wide, "PNG")

    def sent(data):
        body = json.dumps([{"png": base64.b64encode(data).decode(), "prompt": "x"}]).encode()
        return decode(bytearray(body), JSON, Limits(1, 1000)).media[0]

    shown = torch.ones(3, 3, 2)
    shown[:, 0, 1] = torch.tensor([1.0, 0, 0])
    assert torch.equal(sent(file.getvalue()), shown)
    assert (sent(wide.getvalue())[0] * 255).tolist() == [[0, 128]]
    frames = io.BytesIO()
    image.save(frames, "PNG", save_all=True, append_images=[image.rotate(180)])
    with pytest.raises(RewardError, match=r"item 0: its png cannot be read: .*it has 2 frames"):
        sent(frames.getvalue())


# Folders


def test_a_folders_images_come_in_natural_order(tmp_path):
    names = ["2.png", "10.JPG", "1 (2).tiff", "1 (10).webp", "01.bmp", "img2_1.png", "img2_10.png", "IMG10_1.png"]
    for name in (*names, "._2.png", ".hidden.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.png").mkdir()
    expected = ["01.bmp", "1 (2).tiff", "1 (10).webp", "2.png", "10.JPG", "img2_1.png", "img2_10.png", "IMG10_1.png"]
    assert [path.name for path in images_in(tmp_path)] == expected
    assert folder_images(str(tmp_path), "similarity", "references") == images_in(tmp_path)
    (tmp_path / "3.HEIC").write_bytes(b"")
    with pytest.raises(RewardError, match=r"3\.HEIC is an image of a kind that is not read; save it as PNG"):
        images_in(tmp_path)


@given(st.lists(st.integers(0, 10**6), min_size=2, unique=True), st.sampled_from(["{}", "{:03d}", "step_{}_x", "٣{}"]))
def test_numbers_in_names_are_sorted_by_value(numbers, form):
    names = [form.format(number) + ".png" for number in numbers]
    assert sorted(names, key=natural) == [form.format(number) + ".png" for number in sorted(numbers)]


def test_file_names_of_any_letters_can_be_compared():
    names = ["a.png", "1.png", "", ".png", "1", "a1.png", "²3.png", "٣.png", "img.png", "img2.png", "01.png", "1.jpg"]
    assert names.index(max(names, key=natural)) == 6  # parts of one kind meet at each place, "²" being no digit
    assert sorted(["img2.png", "img.png", "img10.png"], key=natural) == ["img.png", "img2.png", "img10.png"]
    assert sorted(["10.png", "٣.png"], key=natural) == ["٣.png", "10.png"]
