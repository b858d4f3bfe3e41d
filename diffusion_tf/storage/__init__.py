"""Files: whole or absent, on disk or gs://."""
