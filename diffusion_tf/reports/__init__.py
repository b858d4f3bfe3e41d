"""Pictures and pages about a trained run."""
