#!/bin/sh
# Gathers the wheels that a GPU machine without a network lacks beside torch, triton, torchvision, transformers and
# accelerate: x86-64 Linux, Python 3.12, nothing that reads or writes videos, under 15 MB in all. For `make gpu` and
# `make chain`.
#   sh studies/gpu/wheelhouse.sh [folder]
# There: python3 -m pip install --no-index --no-deps --target site wheelhouse/*.whl && PYTHONPATH=site make gpu
set -eu
folder=${1:-wheelhouse}
mkdir -p "$folder"
python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
    --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    diffusers==0.42.1 torchao==0.18.0 jvp-flash-attention==0.14.0 hydra-core==1.3.8 omegaconf==2.3.1 \
    webdataset==1.0.2 braceexpand==0.1.7
# Of this one there is only source, without anything to compile.
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" antlr4-python3-runtime==4.9.3
du -sk "$folder" | awk '{ if ($1 > 15000) { print "error: " $1 " kB is over 15 MB" > "/dev/stderr"; exit 1 } print $1 " kB" }'
