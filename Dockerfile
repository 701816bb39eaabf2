# cosyq in a container, with cosyq-mini in it to begin with:
#
#     docker build -t cosyq .                                       # for a CPU
#     docker build -t cosyq:cuda --build-arg DEVICE=cuda .          # for NVIDIA GPUs: docker run --gpus all
#     docker run -p 8000:8000 -e COSYQ_API_KEY=SECRET cosyq         # speech over HTTP
#     docker run cosyq synth "Hello." > hello.wav
#     docker run -v "$PWD/artifacts:/home/cosyq/artifacts" cosyq    # the newest of your own artifacts
ARG DEVICE=cpu
ARG PYTHON=python:3.12.11-slim-bookworm

FROM ${PYTHON} AS wheel
RUN pip install --no-cache-dir build==1.3.0
WORKDIR /source
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY recipes recipes
COPY training/mini/model training/mini/model
COPY cosyq cosyq
RUN python -m build --wheel --outdir /wheels

FROM ${PYTHON} AS torch-cpu
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0

# The package index has torch with CUDA's libraries; the driver is the host's. Triton's kernels need a C compiler.
FROM ${PYTHON} AS torch-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# The base image's release decides the compiler's version.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch==2.13.0

# One of the two stages above.
# hadolint ignore=DL3006
FROM torch-${DEVICE}
COPY --from=wheel /wheels /wheels
# The wheel has a version of its own.
# hadolint ignore=DL3013
RUN for wheel in /wheels/*.whl; do pip install --no-cache-dir "${wheel}[serve]"; done \
    && useradd --create-home --uid 1000 cosyq
USER 1000
WORKDIR /home/cosyq
# Threads that wait sleep: spinning, they slow down whatever runs beside them.
ENV OMP_WAIT_POLICY=PASSIVE COSYQ_HOST=0.0.0.0
RUN cosyq quantize mini --device cpu
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=5)"]
ENTRYPOINT ["cosyq"]
CMD ["serve"]
