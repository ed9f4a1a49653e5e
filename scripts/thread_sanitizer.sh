#!/usr/bin/env bash
# Run the kernels of the compiled core under ThreadSanitizer, and show that it reports a planted race. OpenMP's
# threads are unknown to it, so the loops of this build use std::thread.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for source in csrc/{fisher,losses,triplet}_cpu.cpp tests/loku_kernels/parallel/races.cpp; do
  g++ -std=c++17 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -fsanitize=thread -DLOKU_STD_THREADS -DLOKU_NO_TARGET_CLONES \
    -ffp-contract=off -c "$source" -o "$work/$(basename "$source").o"
done
g++ -fsanitize=thread "$work"/*.o -o "$work/races"
export TSAN_OPTIONS="halt_on_error=1 exitcode=66"
# The sanitizer needs the usual layout of addresses, which some kernels of Linux randomise too far.
run() { setarch "$(uname -m)" -R "$work/races" "$@"; }
run
status=0
run planted > /dev/null 2> "$work/report" || status=$?
if [ "$status" != 66 ] || ! grep -q "data race" "$work/report"; then
  cat "$work/report"
  echo "the planted race was not reported (status $status)" && exit 1
fi
echo "the planted race was reported"
