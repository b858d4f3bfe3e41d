"""Grids and pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion_tf import figures


def test_image_grid_places_each_image():
    images = np.arange(5 * 2 * 3 * 1, dtype=np.uint8).reshape(5, 2, 3, 1) + 1
    grid = figures.image_grid(images, columns=2)
    assert grid.shape == (9, 8, 1)
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        np.testing.assert_array_equal(grid[3 * row : 3 * row + 2, 4 * column : 4 * column + 3], image)
    assert len(np.unique(grid[6:, 4:])) == 1  # no sixth image
    assert figures.square_grid(np.zeros((100, 8, 8, 1), np.uint8)).shape == (90, 90, 1)


def test_captioned_grids_enlarge_every_pixel():
    left = np.random.RandomState(0).randint(0, 256, (80, 80, 1)).astype(np.uint8)
    right = np.random.RandomState(1).randint(0, 256, (80, 40, 3)).astype(np.uint8)
    picture = np.asarray(Image.open(io.BytesIO(figures.captioned_grids({"left": left, "right": right}))))
    assert picture.shape[0] >= 600
    shown = picture[28 : 28 + 640 : 8, 8 : 8 + 640 : 8]
    np.testing.assert_array_equal(shown, np.repeat(left, 3, axis=2))
    start = 8 + 640 + 16
    np.testing.assert_array_equal(picture[28 : 28 + 640 : 8, start : start + 320 : 8], right)
    assert (picture[:28, 8:80] < 255).any()  # the caption


def test_curves_stand_side_by_side():
    x = np.linspace(1, 10, 50)
    panels = [figures.Curve("line", "x", "y", x, x), figures.Curve("growth", "x", "y", x, np.exp(x), log_y=True)]
    one, two = (np.asarray(Image.open(io.BytesIO(figures.curves(panels[:count])))) for count in (1, 2))
    assert two.shape[1] == 2 * one.shape[1] and two.shape[0] == one.shape[0]
    assert (two[:, : two.shape[1] // 2] < 255).any() and (two[:, two.shape[1] // 2 :] < 255).any()


def test_long_caption_widens_its_picture():
    grid = np.zeros((20, 8, 3), np.uint8)
    short, long = (figures.captioned_grids({caption: grid}) for caption in ("c", "c" * 60))
    short, long = (np.asarray(Image.open(io.BytesIO(png))) for png in (short, long))
    assert long.shape[0] == short.shape[0] and long.shape[1] > short.shape[1]
    assert (long[:, -7:] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_labelled_grid_aligns_whole_tiles(channels):
    images = np.random.RandomState(0).randint(0, 256, (2, 3, 8, 8, channels)).astype(np.uint8)
    png = figures.labelled_grid(
        list(images), row_labels=["a", "long label"], column_labels=list("xyz"), caption="c" * 80
    )
    picture = np.asarray(Image.open(io.BytesIO(png)))
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (48, 48))
    places = []
    for image in images.reshape(-1, 8, 8, channels):
        enlarged = image[..., 0].repeat(6, 0).repeat(6, 1)
        (place,) = np.argwhere((windows == enlarged).all(axis=(2, 3)))
        places.append(place)
    places = np.array(places).reshape(2, 3, 2)
    assert (np.diff(places[..., 1], axis=1) == 50).all() and (np.diff(places[..., 0], axis=0) == 50).all()
    assert (picture[:, -3:] == 255).all() and (picture[-3:] == 255).all()  # nothing is cut off at the edges


def test_class_grid_has_rows_of_one_class():
    labels = np.arange(64) % 10
    images = np.broadcast_to(labels[:, None, None, None] + 100, (64, 4, 4, 1)).astype(np.uint8)
    grid, legend = figures.class_grid(images, labels)
    assert legend == "a row for each class: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    rows = grid.reshape(10, 5, -1)[:, 0]
    assert [set(np.unique(row)) - {64} for row in rows] == [{100 + label} for label in range(10)]
    assert (grid == 100).sum() == 7 * 16 and (grid == 104).sum() == 6 * 16

    two, legend = figures.class_grid(images[:64], np.arange(64) % 2 - 1, ("cat",))
    assert legend == "4 rows for each class: no label, cat" and two.shape == (8 * 5, 8 * 5, 1)
    one, legend = figures.class_grid(images[:9], np.full(9, 1), ("cat", "dog"))
    assert legend == "class: dog" and one.shape == (15, 15, 1)
    many, legend = figures.class_grid(images[:9], np.arange(9) * 10)
    np.testing.assert_array_equal(many, figures.square_grid(images[:9]))
    assert legend == "classes in turn: 0, 10, 20, 30, 40, 50, 60, 70, 80"
