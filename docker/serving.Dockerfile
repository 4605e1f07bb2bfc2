# The predict service. As it is, it runs on NVIDIA GPUs and on CPUs. For CPUs alone it gets several
# GB smaller with the index of PyTorch's CPU builds (docs/deployment.md says where to find its URL):
#   docker build -f docker/serving.Dockerfile --build-arg TORCH_CPU_INDEX=URL .
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /src
COPY docker/requirements-build.txt ./
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements-build.txt
COPY pyproject.toml README.md ./
COPY gun_detection ./gun_detection
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.11.14-slim-bookworm
# They stay readable in the image's history: no password in the URL.
ARG TORCH_CPU_INDEX=
ARG TORCH_SHA256=
ARG TORCHVISION_SHA256=
# Inside a container the service has to listen beyond loopback.
ENV GUN_DETECTION_HOME=/var/lib/gun-detection \
    GUN_DETECTION_LOG_FORMAT=json \
    GUN_DETECTION_SERVE_HOST=0.0.0.0 \
    GUN_DETECTION_SERVE_PORT=8000 \
    PYTHONUNBUFFERED=1
COPY docker/requirements-serving.txt docker/install-serving.sh /opt/gun-detection/
RUN sh /opt/gun-detection/install-serving.sh /opt/gun-detection/requirements-serving.txt \
    && groupadd --gid 50000 gun-detection \
    && useradd --no-log-init --uid 50000 --gid 50000 --home-dir /var/lib/gun-detection \
        gun-detection \
    && install -d -o gun-detection -g gun-detection /var/lib/gun-detection
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps --no-index /tmp/wheels/*.whl && rm -r /tmp/wheels
WORKDIR /var/lib/gun-detection
USER 50000:50000
# All that it writes to. Declared after they were made, so that a fresh volume belongs to its user;
# with these the root file system may be read-only.
VOLUME ["/tmp", "/var/lib/gun-detection"]
EXPOSE 8000
# Whether it lives, not whether it has a model (/ready): nothing gets better by a restart then.
HEALTHCHECK --interval=20s --timeout=10s --start-period=2m --retries=5 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
CMD ["gun-detection", "serve"]
