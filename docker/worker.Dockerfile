# The worker that trains and scores (with torch), on CPU or GPU; TensorBoard runs from it too.
FROM python:3.11.14-slim-bookworm AS wheel
WORKDIR /src
COPY docker/requirements-build.txt ./
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements-build.txt
COPY pyproject.toml README.md ./
COPY gun_detection ./gun_detection
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.11.14-slim-bookworm
ENV AIRFLOW_HOME=/opt/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/opt/gun-detection/dags \
    AIRFLOW__CORE__PLUGINS_FOLDER=/opt/gun-detection/plugins \
    GUN_DETECTION_HOME=/var/lib/gun-detection \
    PYTHONUNBUFFERED=1
COPY docker/requirements-worker.txt /opt/gun-detection/requirements.txt
RUN pip install --no-cache-dir --require-hashes --only-binary :all: \
        -r /opt/gun-detection/requirements.txt \
    && groupadd --gid 50000 airflow \
    && useradd --no-log-init --uid 50000 --gid 50000 --home-dir /opt/airflow airflow \
    && install -d -o airflow -g airflow /opt/airflow /opt/airflow/logs \
        /var/lib/gun-detection /var/lib/gun-detection/tensorboard
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps --no-index /tmp/wheels/*.whl && rm -r /tmp/wheels
# Root owns the code, so that a task cannot change it.
COPY --chmod=0555 dags /opt/gun-detection/dags
COPY --chmod=0555 plugins /opt/gun-detection/plugins
WORKDIR /opt/airflow
USER 50000:50000
CMD ["airflow", "celery", "worker"]
