"""Sample quality: features of images, and scores that compare them with those of real images."""
