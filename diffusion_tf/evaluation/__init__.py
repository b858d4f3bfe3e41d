"""Sample quality: features of images, and scores that compare them with those of real images.

The names here need no TensorFlow: flags are checked before it is imported.
"""

METRICS = ("fid", "inception_score", "kid", "precision_recall")
FEATURES = ("inception", "digits", "pixels")
LEAST_COMPARED = 20  # samples, and held-out images, for a verdict about copies: with fewer nothing is significant
MAX_REFERENCE = 50_000  # default number of real images: the millions of LSUN would not fit in memory
# TF-GAN's export of the 2015 Inception network, by which FID and Inception Score are defined.
INCEPTION_TFHUB = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
RESIZES = ("tf1", "pytorch_fid")  # how images are resized and scaled for Inception
