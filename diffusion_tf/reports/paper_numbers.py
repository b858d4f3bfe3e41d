"""Results of the paper (Ho, Jain & Abbeel 2020), for comparison with a run."""

# Table 4: progressive lossy compression of the CIFAR-10 test set. Keys are reverse process times T - t + 1.
TABLE_4 = {
    time: {"paper_rate_bits_per_dim": rate, "paper_distortion_rmse": rmse}
    for time, rate, rmse in (
        (1000, 1.77581, 0.95136),
        (900, 0.11994, 12.02277),
        (800, 0.05415, 18.47482),
        (700, 0.02866, 24.43656),
        (600, 0.01507, 30.80948),
        (500, 0.00716, 38.03236),
        (400, 0.00282, 46.12765),
        (300, 0.00081, 54.18826),
        (200, 0.00013, 60.97170),
        (100, 0.00000, 67.60125),
    )
}

# Table 1, unconditional CIFAR-10: (model, Inception Score, FID, NLL test (train) in bits/dim).
TABLE_1 = (
    ("Diffusion (original)", "", "", "<= 5.40"),
    ("Gated PixelCNN", "4.60", "65.93", "3.03 (2.90)"),
    ("Sparse Transformer", "", "", "2.80"),
    ("PixelIQN", "5.29", "49.46", ""),
    ("EBM", "6.78", "38.2", ""),
    ("NCSNv2", "", "31.75", ""),
    ("NCSN", "8.87 ± 0.12", "25.32", ""),
    ("SNGAN", "8.22 ± 0.05", "21.7", ""),
    ("SNGAN-DDLS", "9.09 ± 0.10", "15.42", ""),
    ("StyleGAN2 + ADA (v1)", "9.74 ± 0.05", "3.26", ""),
    ("DDPM, L, fixed isotropic variance", "7.67 ± 0.13", "13.51", "<= 3.70 (3.69)"),
    ("DDPM, L_simple", "9.46 ± 0.11", "3.17", "<= 3.75 (3.72)"),
)

# Table 3, FID on LSUN 256x256: (model, Bedroom, Church, Cat). StyleGAN2's authors measured the starred numbers.
TABLE_3 = (
    ("ProgressiveGAN", "8.34", "6.42", "37.52"),
    ("StyleGAN", "2.65", "4.21*", "8.53*"),
    ("StyleGAN2", "", "3.86", "6.93"),
    ("DDPM, L_simple", "6.36", "7.89", "19.75"),
    ("DDPM, L_simple, large", "4.90", "", ""),
)

# What the paper reports for its own runs of a preset: the last rows of Tables 1 and 3.
RESULTS = {
    "cifar10": {
        "bits/dim, test": "<= 3.75",
        "bits/dim, train": "<= 3.72",
        "fid": TABLE_1[-1][2],
        "inception_score": TABLE_1[-1][1],
    },
    "lsun_bedroom": {"fid": TABLE_3[-2][1]},
    "lsun_church": {"fid": TABLE_3[-2][2]},
    "lsun_cat": {"fid": TABLE_3[-2][3]},
    "lsun_bedroom_large": {"fid": TABLE_3[-1][1]},
}

# Appendix B, on a TPU v3-8: (training batch, steps per second, sampling batch, seconds for all T steps).
_SPEED_256 = (64, 2.2, 128, 300.0)
SPEED_V3_8 = {
    "cifar10": (128, 21.0, 256, 17.0),
    "celebahq256": _SPEED_256,
    "lsun_church": _SPEED_256,
    "lsun_bedroom": _SPEED_256,
    "lsun_cat": _SPEED_256,
}
