"""Files on disk or gs://: atomic writes, checkpoints, run folders and resumable measurements."""
