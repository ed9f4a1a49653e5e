#!/usr/bin/env bash
# Run the kernels of the compiled core under ThreadSanitizer, and show that it reports a planted race. OpenMP's
# threads are unknown to it, so the loops of this build use std::thread.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags="-std=c++17 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -fsanitize=thread -DLOKU_STD_THREADS -DLOKU_NO_TARGET_CLONES"
tests=tests/loku_kernels/parallel
g++ $flags $tests/loops.cpp -o "$work/loops"
g++ $flags $tests/kernels.cpp csrc/{fisher,losses,triplet}_cpu.cpp -o "$work/kernels"
export TSAN_OPTIONS="halt_on_error=1 exitcode=66"
# The sanitizer needs the usual layout of addresses, which some kernels of Linux randomise too far. Some containers
# do not let a process ask for it.
fixed=(setarch "$(uname -m)" -R)
"${fixed[@]}" true 2> /dev/null || fixed=()
run() { "${fixed[@]}" "$work/$1" "${@:2}"; }
run loops
run kernels
status=0
run loops planted > /dev/null 2> "$work/report" || status=$?
if [ "$status" != 66 ] || ! grep -q "data race" "$work/report"; then
  cat "$work/report"
  echo "the planted race was not reported (status $status)" && exit 1
fi
echo "the planted race was reported"
