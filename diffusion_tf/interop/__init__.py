"""Exchange with other frameworks: TF1 and diffusers weights, StableHLO, SavedModels and the TPU compiler."""
