"""Weights and programs of other frameworks: TF1, diffusers, StableHLO, SavedModel, the TPU compiler."""
