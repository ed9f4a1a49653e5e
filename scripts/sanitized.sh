#!/usr/bin/env bash
# Run a command with a compiled core under AddressSanitizer and UndefinedBehaviorSanitizer:
#   scripts/sanitized.sh python scripts/fuzz.py
# The core is built in a copy, first on PYTHONPATH, with the tests beside it. The installed package stays as it is.
# The environment must have the test requirements.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
cp -r csrc loku loku_kernels scripts tests setup.py pyproject.toml README.md LICENSE "$work"
rm -f "$work"/loku_kernels/_core*.so  # of the checkout: one for this Python alone would be imported first
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
# The cloned kernels are chosen by ifunc resolvers, which run before the sanitizers' runtime is ready.
(cd "$work" && LOKU_CUDA=0 CXX="g++ $flags -DLOKU_NO_TARGET_CLONES" python setup.py -q build_ext --inplace)
cd "$OLDPWD"
export PYTHONPATH="$work"
export OMP_NUM_THREADS=2  # the loops of the kernels have threads, on any machine
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
# Leaks are Python's own. A tensor larger than memory must raise torch's error, as without a sanitizer.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
"$@"
