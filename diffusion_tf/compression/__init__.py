"""Progressive lossy compression (Section 4.3, Algorithms 3 and 4) as a file format."""
