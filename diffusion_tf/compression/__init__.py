"""Progressive lossy compression (Section 4.3, Algorithms 3 and 4) as a file format.

The names here need no TensorFlow: flags are checked before it is imported.
"""

CHUNK_BITS = range(4, 25)  # what `chunk_bits` may be
