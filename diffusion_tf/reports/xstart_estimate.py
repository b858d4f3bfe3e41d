"""The estimate of x_0 that figures of progressive generation show."""

import numpy as np


class XstartEstimate:
    """The estimate of x_0 from the network's predictions at K times that has the least squared error.

    At time k it is mean_k(x_0) + weight_k (prediction - mean_k(prediction)), by linear regression over N images.

    Eq. 15 multiplies the network's error in eps by sqrt((1 - alphas_cumprod) / alphas_cumprod), which is 157 at t = T
    for the paper's schedule. Near T the prediction of a small network is that error, clipped to black and white, where
    the conditional mean of x_0 is close to the mean of all images. The regression gives it the weight that it deserves:
    nearly 0 there, and nearly 1 where x_t shows x_0.

    Args:
      predictions: predictions of x_0, float32 [K, N, H, W, C].
      x_start: the x_0 of the same images, float32 [N, H, W, C]. One image gives no regression: the weights are 1.

    Attributes:
      weights: float64 [K], in [0, 1].
    """

    def __init__(self, predictions: np.ndarray, x_start: np.ndarray):
        self._mean, self._prediction_mean = x_start.mean(axis=0), predictions.mean(axis=1, keepdims=True)
        deviations = (predictions - self._prediction_mean).astype(np.float64)
        axes = (1, 2, 3, 4)
        covariance, variance = (deviations * (x_start - self._mean)).sum(axes), np.square(deviations).sum(axes)
        self.weights = np.ones(len(predictions))
        if len(x_start) > 1:
            self.weights = np.clip(covariance / np.maximum(variance, np.finfo(float).tiny), 0.0, 1.0)
        else:
            self._prediction_mean = self._mean = np.zeros_like(self._mean)

    def __call__(self, predictions: np.ndarray) -> np.ndarray:
        """The estimates float32 [K, N, H, W, C] from predictions of the same shape."""
        weights = self.weights.astype(np.float32)[:, None, None, None, None]
        return self._mean + weights * (predictions - self._prediction_mean)
