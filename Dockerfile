# docker build -t diffusion-tf .
# docker run --rm -v "$PWD/runs:/runs" diffusion-tf demo --workdir=/runs/digits
FROM python:3.12-slim

# tensorflow for a CPU; build with --build-arg EXTRA=gpu for one with CUDA (and run with --gpus=all).
ARG EXTRA=cpu

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir ".[${EXTRA}]" && rm -rf /src/*

WORKDIR /
ENTRYPOINT ["diffusion-tf"]
CMD ["--help"]
