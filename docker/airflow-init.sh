#!/bin/sh
# Brings both databases to the version of this image and makes the buckets; safe to run again.
set -eu

airflow db migrate
gun-detection db upgrade
python -c '
from gun_detection.settings import load_settings
from gun_detection.storage import Storage

settings = load_settings()
for bucket in (settings.data_bucket, settings.uploads_bucket):
    Storage(settings).ensure_bucket(bucket)
'
# A pool that an operator has resized stays as it is.
airflow pools get gpu >/dev/null 2>&1 ||
    airflow pools set gpu 1 "Work that needs the GPU, or the memory of a training, for itself"
