#!/usr/bin/env bash
# All wheels of distseg and what it needs, for a site with no internet. Run it from anywhere on a machine that has one,
# with the Python, the system and the processor of that site:
#   deploy/offline/make_wheelhouse.sh OUT [EXTRA]      EXTRA: cpu (default) or gpu
# PYTHON=python3.11 chooses the interpreter, TORCH_INDEX=https://download.pytorch.org/whl/cpu a torch without CUDA.
# Carry OUT over, then there:
#   sh OUT/install.sh VENV
set -euo pipefail

out=${1:?usage: make_wheelhouse.sh OUT [cpu|gpu]}
extra=${2:-cpu}
case $extra in cpu | gpu) ;; *) echo "EXTRA: $extra is neither cpu nor gpu" >&2; exit 2 ;; esac
python=${PYTHON:-python3.11}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)

cp "$root/constraints.txt" "$out/constraints.txt"
extras=$extra,io,remote # readers of patches and DICOM, and s3:// for what the guides show
index=()
[ -z "${TORCH_INDEX:-}" ] || index=(--extra-index-url "$TORCH_INDEX")
"$python" -m pip wheel --quiet "${index[@]}" --constraint "$out/constraints.txt" --wheel-dir "$out" "${root}[$extras]"

cat > "$out/install.sh" << INSTALL
#!/bin/sh
# usage: sh install.sh VENV    makes VENV with $("$python" --version) and installs distseg[$extras] from this folder alone
set -eu
here=\$(cd "\$(dirname "\$0")" && pwd)
(cd "\$here" && sha256sum --check --quiet SHA256SUMS)
"\${PYTHON:-python3.11}" -m venv "\${1:?usage: sh install.sh VENV}"
# an index or a folder that this site's pip is told of elsewhere is not asked
PIP_CONFIG_FILE=/dev/null "\$1/bin/python" -m pip --isolated install --quiet --no-index --find-links "\$here" --constraint "\$here/constraints.txt" 'distseg[$extras]'
"\$1/bin/distseg" doctor launcher=local storage="\$1"
INSTALL
(cd "$out" && sha256sum -- *.whl constraints.txt install.sh > SHA256SUMS)
du -sh "$out"
