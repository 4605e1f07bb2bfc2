#!/bin/sh
# Writes .env from .env.example with a new random value for every variable that is empty there, and
# the present time for SINCE.
set -eu
cd "$(dirname "$0")/.."

if [ -e .env ]; then
    echo ".env exists: its secrets open the existing data, so it is not replaced" >&2
    exit 1
fi
if ! command -v openssl >/dev/null; then
    echo "openssl, which makes the secrets, is not installed" >&2
    exit 1
fi
umask 077
trap 'rm -f .env.new' EXIT
while IFS= read -r line; do
    case "$line" in
        # Assignments of their own: elsewhere a failure of openssl would not end the script.
        FERNET_KEY=)
            secret=$(openssl rand -base64 32)
            secret=$(echo "$secret" | tr '+/' '-_')
            ;;
        SINCE=) secret=$(date -u +%Y-%m-%dT%H:%M:%SZ) ;;
        [A-Z]*=) secret=$(openssl rand -hex 32) ;;
        *) secret= ;;
    esac
    echo "$line$secret"
done <.env.example >.env.new
mv .env.new .env
