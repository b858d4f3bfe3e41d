"""A small table of the codec, for files that no network needs to read."""

from diffusion_tf.compression.tables import Table

TABLE = Table(
    "",
    "float32",
    (8, 8, 1),
    1,
    12,
    (7,) * 64,
    (3, 1, 0),
    ((1, 9), (2, 5, 1)),
    ((3, 4, 5),) * 2,
    (1,) * 256,
    2,
    (256, 300),
)
