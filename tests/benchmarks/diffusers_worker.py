"""Times diffusers' UNet2DModel for `bench.py` and `gpu.py`, in the configuration of a preset, on a CPU or a GPU.

It uses the fastest options that compute the same: channels_last, fused Adam, EMA by one foreach operation, bfloat16 by
autocast. The caller chooses whether to use torch.compile.
"""

import argparse
import contextlib
import json
from collections.abc import Callable

import timing
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import UNet2DModel

_SAMPLE_STEPS = 10
_CONVOLUTIONS = 20
_CIFAR10 = {"image_size": 32, "ch": 128, "ch_mult": [1, 2, 2, 2], "attn_resolutions": [16], "dropout": 0.1}


def make_network(preset: dict) -> UNet2DModel:
    """The network of diffusers that is equivalent to the preset's."""
    attention = [preset["image_size"] >> level in preset["attn_resolutions"] for level in range(len(preset["ch_mult"]))]
    return UNet2DModel(
        sample_size=preset["image_size"],
        in_channels=3,
        out_channels=3,
        block_out_channels=[preset["ch"] * mult for mult in preset["ch_mult"]],
        layers_per_block=2,
        down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=32,
        dropout=preset["dropout"],
    ).to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=["convolution", "forward", "train", "sample"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--precision", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--preset", type=json.loads, default=_CIFAR10, help="a preset's values as JSON")
    parser.add_argument("--steps", type=int, default=1, help="training steps in each call")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    network = make_network(args.preset).to(args.device)
    makers = {"convolution": _convolution, "forward": _forward, "train": _train, "sample": _sample}
    timing.serve(
        makers[args.what](network, args),
        steps_per_call={"convolution": _CONVOLUTIONS, "sample": _SAMPLE_STEPS, "train": args.steps}.get(args.what, 1),
        peak_bytes=torch.cuda.max_memory_allocated if args.device == "cuda" else None,
        params=sum(p.numel() for p in network.parameters()),
        version=torch.__version__,
    )


def _autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.precision == "bfloat16")


def _waits(args: argparse.Namespace) -> Callable[[], None]:
    return torch.cuda.synchronize if args.device == "cuda" else lambda: None


def _noise(network: UNet2DModel, batch: int) -> torch.Tensor:
    size, channels = network.config.sample_size, network.config.in_channels
    noise = torch.randn(batch, channels, size, size, device=network.device)
    return noise.contiguous(memory_format=torch.channels_last)


def _t(network: UNet2DModel, batch: int) -> torch.Tensor:
    return torch.randint(0, 1000, (batch,), device=network.device)


def _denoiser(network: UNet2DModel, args: argparse.Namespace) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    network.eval()
    denoise = lambda x, t: network(x, t, return_dict=False)[0]
    return torch.compile(denoise) if args.compile else denoise


def _convolution(network: UNet2DModel, args: argparse.Namespace) -> Callable[[], None]:
    """A chain of 3x3 convolutions, the network's most frequent operation, each with its own kernel."""
    size, channels = network.config.sample_size, network.config.block_out_channels[0]
    randn = lambda *shape: torch.randn(shape, dtype=getattr(torch, args.precision)).to(
        memory_format=torch.channels_last
    )
    kernels = [randn(channels, channels, 3, 3) / (9 * channels) ** 0.5 for _ in range(_CONVOLUTIONS)]

    def chain(x):
        for kernel in kernels:
            x = F.conv2d(x, kernel, padding=1)
        return x.sum()

    if args.compile:
        chain = torch.compile(chain)
    x = randn(args.batch, channels, size, size)

    def call():
        with torch.no_grad():
            chain(x)

    return call


def _forward(network: UNet2DModel, args: argparse.Namespace) -> Callable[[], None]:
    denoise = _denoiser(network, args)
    x, t = _noise(network, args.batch), _t(network, args.batch)

    def call():
        with torch.no_grad(), _autocast(args):
            denoise(x, t)

    return call


def _tables(network: UNet2DModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=network.device)
    return betas.float(), (1 - betas).float(), torch.cumprod(1 - betas, 0).float()


def _sample(network: UNet2DModel, args: argparse.Namespace) -> Callable[[], None]:
    """Algorithm 2 by its formulas: less work than diffusers' scheduler, and torch.compile includes it."""
    network.eval()
    tables = _tables(network)

    def step(x, t, noise):
        eps = network(x, t, return_dict=False)[0].float()
        # t is a vector: reading a scalar from the device would break the compiled graph.
        beta, alpha, alpha_cumprod = (table[t].view(-1, 1, 1, 1) for table in tables)
        x_start = ((x - (1 - alpha_cumprod).sqrt() * eps) / alpha_cumprod.sqrt()).clamp(-1, 1)
        previous = alpha_cumprod / alpha
        mean = previous.sqrt() * beta * x_start + alpha.sqrt() * (1 - previous) * x
        return mean / (1 - alpha_cumprod) + beta.sqrt() * noise

    if args.compile:
        step = torch.compile(step)
    wait = _waits(args)

    def call():
        x = _noise(network, args.batch)
        with torch.no_grad(), _autocast(args):
            for t in reversed(range(_SAMPLE_STEPS)):
                x = step(x, torch.full((args.batch,), t, device=x.device), torch.randn_like(x))
        wait()

    return call


def _train(network: UNet2DModel, args: argparse.Namespace) -> Callable[[], None]:
    network.train()
    params = list(network.parameters())
    optimizer = torch.optim.Adam(params, lr=2e-4, fused=True)
    ema = [p.detach().clone() for p in params]
    _, _, alphas_cumprod = _tables(network)
    x = _noise(network, args.batch)

    def loss_fn(x, t, noise):
        c = alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = c.sqrt() * x + (1 - c).sqrt() * noise
        return F.mse_loss(network(x_t, t, return_dict=False)[0].float(), noise)

    if args.compile:
        loss_fn = torch.compile(loss_fn)
    wait = _waits(args)

    def step():
        noise, t = torch.randn_like(x), _t(network, args.batch)
        with _autocast(args):
            loss = loss_fn(x, t, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - 0.9999)

    def call():
        for _ in range(args.steps):
            step()
        wait()

    return call


if __name__ == "__main__":
    main()
