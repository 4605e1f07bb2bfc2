#!/bin/sh
# Writes .env from .env.example with a new random value for every variable that is empty there.
set -eu
cd "$(dirname "$0")/.."

if [ -e .env ]; then
    echo ".env exists: its secrets open the existing data, so it is not replaced" >&2
    exit 1
fi
umask 077
while IFS= read -r line; do
    case "$line" in
        FERNET_KEY=) echo "$line$(openssl rand -base64 32 | tr '+/' '-_')" ;;
        [A-Z]*=) echo "$line$(openssl rand -hex 32)" ;;
        *) echo "$line" ;;
    esac
done <.env.example >.env.new
mv .env.new .env
