#!/bin/sh
# Gathers the wheels that a GPU machine without a network lacks beside torch, triton, torchvision, transformers and
# accelerate: x86-64 Linux, Python 3.12, nothing that reads or writes videos, under 15 MB in all.
#   sh studies/gpu/wheelhouse.sh [folder]
# There: python3 -m pip install --no-index --no-deps --target site wheelhouse/*.whl && PYTHONPATH=site make gpu
set -eu
folder=${1:-wheelhouse}
mkdir -p "$folder"
python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
    --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    diffusers==0.42.1 torchao==0.18.0 jvp-flash-attention==0.14.0
du -sk "$folder" | awk '{ if ($1 > 15000) { print "error: " $1 " kB is over 15 MB" > "/dev/stderr"; exit 1 } print $1 " kB" }'
