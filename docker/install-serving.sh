#!/bin/sh
# Installs the packages of a lock with all their hashes checked: install-serving.sh LOCK
#
# PyPI's torch brings several GB of CUDA. Where TORCH_CPU_INDEX names an index of CPU builds, torch
# and torchvision come from there instead, both in the versions of the lock, and the CUDA packages
# are left out. The lock knows no hashes of those two: TORCH_SHA256 and TORCHVISION_SHA256 do, or
# the build prints the ones that it got, for the next time.
set -eu
lock=$1
work=$(mktemp -d)
install() {
    pip install --no-cache-dir --only-binary :all: "$@"
}

if [ -z "${TORCH_CPU_INDEX:-}" ]; then
    install --require-hashes -r "$lock"
else
    awk '/^[a-z]/ { cuda = /^((torch|torchvision|triton)=|(nvidia|cuda)-)/ } !cuda' "$lock" \
        >"$work/rest.txt"
    # `+cpu` exists only on PyTorch's own indexes: with a wrong URL nothing is found.
    for name in torch torchvision; do
        version=$(sed -n "s/^$name==\([^ ]*\).*/\1/p" "$lock")
        case $name in
            torch) sha256=${TORCH_SHA256:-} ;;
            *) sha256=${TORCHVISION_SHA256:-} ;;
        esac
        # With one hash in the file pip asks for both.
        echo "$name==$version+cpu${sha256:+ --hash=sha256:$sha256}"
    done >"$work/torch.txt"
    install --require-hashes --no-deps -r "$work/rest.txt"
    install --no-deps --index-url "$TORCH_CPU_INDEX" --report "$work/report.json" \
        -r "$work/torch.txt"
    python - "$work/report.json" <<'PYTHON'
import json, sys

for package in json.load(open(sys.argv[1]))["install"]:
    name = package["metadata"]["name"].upper()
    sha256 = package["download_info"]["archive_info"]["hashes"]["sha256"]
    print(f"{name}_SHA256={sha256}")
PYTHON
fi
rm -r "$work"
# Finds what --no-deps could have missed.
pip check
