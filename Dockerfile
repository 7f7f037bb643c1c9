# An image with the package, fairseq and the recipes.
#
#   docker build -t fairseq-evomoe .                                                                       CPU
#   docker build -t fairseq-evomoe --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 .                 GPUs
#   docker run --rm -it -v "$PWD/work:/opt/fairseq_evomoe/work" fairseq-evomoe bash recipes/quickstart/run.sh
#
# For GPUs add --gpus all to docker run. --build-arg PIP_INDEX_URL=... takes packages from another index, for example
# one with builds of torch for CPUs alone, which are smaller.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git xz-utils \
    && (command -v python3 || apt-get install -y --no-install-recommends python3 python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/fairseq_evomoe
COPY . .
ENV EVOMOE_VENV=/opt/venv PIP_NO_CACHE_DIR=1
# the sets of extras that the recipes ask for
RUN bash -c 'set -e; for set in plots plots,langid hub,plots; do extras=$set; . recipes/lib/environment.sh; done'
ENV PATH=/opt/venv/bin:$PATH
CMD ["bash"]
