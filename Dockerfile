# One image for a person (`docker run beamsight build ...`), for Beam's workers (Flink, Dataflow) and for a pool of them; for
# CPUs and NVIDIA GPUs alike, since torch's wheels bring CUDA along. docs/container.md says how to build and run it.

# Both sides of a job need the same Python minor version and the same Beam: one argument each for base, boot and package.
ARG PYTHON_VERSION=3.11
ARG BEAM_VERSION=2.77.0
ARG BASE_IMAGE=docker.io/library/python:${PYTHON_VERSION}-slim
ARG BEAM_IMAGE=docker.io/apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION}

FROM ${BEAM_IMAGE} AS beam

# Wheels are made in stages of their own and mounted where they are installed: in the image they take no room, nor does what
# made them.
FROM ${BASE_IMAGE} AS dependencies
ARG BEAM_VERSION
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# setup.py alone, and nothing of the README that it reads: another line of either code fetches no torch.
COPY setup.py ./
RUN touch README.md \
 && pip wheel --wheel-dir /wheels ".[dataflow,tagging]" "apache-beam==${BEAM_VERSION}" \
 && rm /wheels/beamsight-*.whl \
 && ls /wheels > /dependencies.txt

FROM ${BASE_IMAGE} AS code
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels . \
 && sha256sum /wheels/*.whl > /code.sha256

FROM ${BASE_IMAGE}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY --from=beam /opt/apache/beam/boot /opt/apache/beam/LICENSE /opt/apache/beam/
# What is mounted does not count for Podman 4 when it looks for a layer that it has already; what is copied does.
COPY --from=dependencies /dependencies.txt /opt/beamsight/
# Three layers of two to four gigabytes: they are pulled at once, and an engine that packs a layer needs thrice its room.
# hadolint ignore=DL3059
RUN --mount=type=bind,from=dependencies,source=/wheels,target=/wheels \
    pip install --no-index --no-deps /wheels/nvidia_*.whl
# hadolint ignore=DL3059
RUN --mount=type=bind,from=dependencies,source=/wheels,target=/wheels \
    pip install --no-index --no-deps /wheels/torch-*.whl /wheels/triton-*.whl
# hadolint ignore=DL3059
RUN --mount=type=bind,from=dependencies,source=/wheels,target=/wheels \
    pip install --no-index --no-deps /wheels/*.whl
COPY --from=code /code.sha256 /opt/beamsight/
RUN --mount=type=bind,from=code,source=/wheels,target=/wheels \
    pip install --no-index --no-deps /wheels/*.whl
COPY --chmod=0755 container/entrypoint.sh /usr/local/bin/entrypoint

# RUN_PYTHON_...: boot would make an environment for each worker, for which the root must be writable.
# HOME: the one place where any user may write, also below a read-only root.
# LD_LIBRARY_PATH: where Google's clusters mount the driver.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    HOME=/tmp \
    BEAMSIGHT_CACHE=/opt/beamsight/cache \
    ORT_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
RUN useradd --uid 1000 --home-dir /tmp --no-create-home beamsight \
 && install --directory --owner=beamsight /opt/beamsight/cache
USER 1000
WORKDIR /tmp

# What the first run of a command would prepare. An image that cannot do these is not made.
RUN python -c "from PIL import Image; Image.linear_gradient('L').convert('RGB').save('photo.jpg')" \
 && beamsight build --input photo.jpg --catalog catalog --ops default,tagging \
 && beamsight tag catalog \
 && beamsight search catalog "a photo" \
 && rm -rf /tmp/* /tmp/.[!.]*

ARG BASE_IMAGE
ARG BEAM_VERSION
ARG PYTHON_VERSION
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Beamsight" \
      org.opencontainers.image.description="From a corpus of images to a catalog that text and images can search" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.apache.beam.version="${BEAM_VERSION}" \
      org.python.version="${PYTHON_VERSION}"
ENTRYPOINT ["entrypoint"]
CMD ["--help"]
