# kdcache with everything it needs. The RUN lines are the installation steps of README.md, word for word (a test compares).
#
#   docker build -t kdcache .                                                                       for the CPU
#   docker build -t kdcache --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .        for NVIDIA GPUs (CUDA 13)
#   docker run --rm -v "$PWD:/data" -w /data kdcache run sst2.toml

FROM python:3.11-slim

# pip looks here as well, and prefers the build that it finds here to the default one
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=$TORCH_INDEX

WORKDIR /kdcache
COPY . .

RUN python3 -m venv .venv
RUN .venv/bin/python -m pip install -c constraints.txt pip
RUN .venv/bin/python -m pip install -c constraints.txt torch
RUN .venv/bin/python -m pip install -c constraints.txt -e .

ENTRYPOINT ["/kdcache/.venv/bin/kdcache"]
CMD ["--help"]
