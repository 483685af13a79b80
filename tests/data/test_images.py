"""PNG and JPEG files of any size and mode, brought to the size and mode that a network takes."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from vmapbn_flax.data.images import read_converted, read_image
from vmapbn_flax.errors import UsageError

GREY, COLOUR = (6, 8), (6, 8, 3)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, COLOUR).astype(np.uint8)
EIGHT = {GREY: "made grey of 8 bits", COLOUR: "made colour of 8 bits"}


def save(path, image, **options):
    (PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_what_fits_is_read_as_in_training(tmp_path, suffix, shape):
    path = save(tmp_path / f"a.{suffix}", PIXELS if len(shape) == 3 else PIXELS[..., 0])
    for strict in (False, True):
        pixels, done = read_converted(path, shape, strict=strict)
        np.testing.assert_array_equal(pixels, read_image(path, shape))
        assert done == ()


def test_one_channel_is_grey(tmp_path):
    path = save(tmp_path / "a.png", PIXELS[..., 0])
    assert read_converted(path, (6, 8, 1))[0].shape == (6, 8, 1)


def test_grey_and_colour(tmp_path):
    grey, colour = save(tmp_path / "grey.png", PIXELS[..., 0]), save(tmp_path / "colour.png", PIXELS)
    pixels, done = read_converted(grey, COLOUR)
    np.testing.assert_array_equal(pixels, np.repeat(PIXELS[..., :1], 3, -1))
    assert done == ("made colour of 8 bits",)
    pixels, done = read_converted(colour, GREY)
    np.testing.assert_allclose(pixels, PIXELS @ [0.299, 0.587, 0.114], atol=0.51)
    assert done == ("made grey of 8 bits",)


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_what_is_transparent_lies_on_white(tmp_path, shape):
    alpha = np.zeros(GREY, np.uint8)
    alpha[:, 1], alpha[:, 2] = 128, 255
    path = save(tmp_path / "a.png", PIL.Image.fromarray(np.dstack([np.zeros_like(PIXELS), alpha])))
    pixels, done = read_converted(path, shape)
    assert done == ("laid on white", EIGHT[shape])
    np.testing.assert_array_equal(pixels.reshape(6, 8, -1)[0, :4, 0], [255, 127, 0, 255])
    opaque = save(tmp_path / "b.png", PIL.Image.fromarray(PIXELS).convert("RGBA"))
    assert read_converted(opaque, shape)[1] == (EIGHT[shape],)
    assert read_converted(path, (6, 8, 4))[0][0, :4, 3].tolist() == [0, 128, 255, 0]


MODES = {
    "1": lambda image: image.convert("1", dither=PIL.Image.Dither.NONE),
    "P": lambda image: image.convert("P", palette=PIL.Image.Palette.WEB),
    "LA": lambda image: image.convert("LA"),
    "transparent palette": lambda image: with_transparency(image.convert("P", palette=PIL.Image.Palette.WEB)),
}


def with_transparency(image):
    image.info["transparency"] = bytes([255] * 256)
    return image


@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize("mode", MODES)
def test_modes(tmp_path, mode, shape):
    image = MODES[mode](PIL.Image.fromarray(PIXELS))
    pixels, done = read_converted(save(tmp_path / "a.png", image), shape)
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGBA").convert("RGB" if len(shape) == 3 else "L")))
    assert done == (EIGHT[shape],)


def test_cmyk(tmp_path):
    image = PIL.Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).convert("CMYK")
    pixels, done = read_converted(save(tmp_path / "a.jpg", image), COLOUR)
    np.testing.assert_allclose(pixels, 200, atol=3)
    assert done == ("made colour of 8 bits", "resized to 6 x 8")


def test_sixteen_bits(tmp_path):
    """Pillow would take every value above 255 for white."""
    deep = (PIXELS[..., 0].astype(np.uint16) << 8) + 17
    pixels, done = read_converted(save(tmp_path / "a.png", deep), GREY)
    np.testing.assert_array_equal(pixels, PIXELS[..., 0])
    assert done == ("made grey of 8 bits",)


def test_sizes(tmp_path):
    path = save(tmp_path / "a.png", np.kron(PIXELS, np.ones((5, 5, 1), np.uint8)))
    pixels, done = read_converted(path, COLOUR)
    assert done == ("resized to 6 x 8",)
    assert pixels.shape == COLOUR
    assert np.corrcoef(pixels.reshape(-1), PIXELS.reshape(-1))[0, 1] > 0.9
    one = save(tmp_path / "b.png", PIL.Image.new("L", (1, 1), 77))
    np.testing.assert_array_equal(read_converted(one, GREY)[0], 77)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned(tmp_path, orientation):
    image = PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    exif = image.getexif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", image, exif=exif, quality=100)
    pixels, done = read_converted(path, (8, 6) if orientation > 4 else (6, 8))
    np.testing.assert_array_equal(pixels, np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(path))))
    assert done == (() if orientation == 1 else ("turned upright",))


def test_large_photographs(tmp_path):
    """Decoded at a fraction of their size, they are what they would be at their full one."""
    x, y = np.meshgrid(np.linspace(0, 1, 1200), np.linspace(0, 1, 900))
    image = PIL.Image.fromarray((255 * np.abs(np.sin(7 * x) * np.cos(5 * y))).astype(np.uint8))
    pixels, done = read_converted(save(tmp_path / "a.jpg", image, quality=95), (30, 40))
    expected = np.asarray(image.resize((40, 30), PIL.Image.Resampling.LANCZOS)).astype(int)
    assert done == ("resized to 30 x 40",)
    assert np.abs(pixels - expected).max() <= 4


def test_strict_says_all_that_differs(tmp_path):
    path = save(tmp_path / "a.png", PIL.Image.new("RGBA", (20, 10)))
    with pytest.raises(UsageError) as error:
        read_converted(path, GREY, strict=True)
    assert str(error.value) == (
        f"{path}: got an image of 10 x 20 in the mode RGBA, which would have to be laid on white and made grey of 8 "
        f"bits and resized to 6 x 8; expected 6 x 8, grey. Convert it yourself, or leave --strict out."
    )


def test_networks_of_two_channels(tmp_path):
    with pytest.raises(UsageError, match="got an image for a network of 2 channels; expected an array"):
        read_converted(save(tmp_path / "a.png", PIXELS), (6, 8, 2))


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged parts that it can do without
def test_mutations_are_read_or_refused(tmp_path):
    """Bytes changed, cut off or put in anywhere, of every kind of file: one line, and no other exception."""
    files = []
    for mode, format in (("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG")):
        image = PIL.Image.fromarray(PIXELS).convert(mode)
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        content = io.BytesIO()
        image.save(content, format, exif=exif)
        files.append(content.getvalue())
    rng, refused = np.random.default_rng(1), []
    path = tmp_path / "a.png"
    for _ in range(400):
        content = bytearray(files[rng.integers(len(files))])
        for _ in range(rng.integers(1, 4)):
            at, kind = rng.integers(len(content)), rng.integers(3)
            if kind == 0:
                content[at] = rng.integers(256)
            elif kind == 1:
                del content[at : at + rng.integers(1, 30)]
            else:
                content[at:at] = rng.bytes(rng.integers(1, 8))
        path.write_bytes(content)
        try:
            assert read_converted(path, GREY)[0].shape == GREY
        except UsageError as error:
            refused.append(str(error))
    assert [line for line in refused if "\n" in line or not line.startswith(f"{path}: got ")] == []
    assert 100 < len(refused) < 390
