# syntax=docker/dockerfile:1
# Two targets, the same but for torch: `cuda` (the last one, so the default) and `cpu`. torch's wheels bring CUDA's
# libraries along, so the host's driver is all that a GPU needs and no CUDA image is.
# Secrets are never built in: see docs/cloud.md. The digest is that of python:3.12-slim-bookworm.
ARG PYTHON=python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY requirements.lock requirements-cloud.lock pyproject.toml README.md LICENSE ./

FROM build AS build-cpu
RUN pip install --index-url https://download.pytorch.org/whl/cpu --constraint requirements.lock --constraint requirements-cloud.lock torch
COPY src src
RUN pip install --constraint requirements.lock --constraint requirements-cloud.lock ".[tensorboard,wandb,quantisation,secrets]"

FROM build AS build-cuda
RUN pip install --constraint requirements.lock --constraint requirements-cloud.lock torch
COPY src src
RUN pip install --constraint requirements.lock --constraint requirements-cloud.lock ".[tensorboard,wandb,quantisation,secrets]"

FROM ${PYTHON} AS runtime
# tini passes SIGTERM on to training, and a process with number 1 and no handler would not hear it
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
