#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes: builds, tests, memory checks, kernel and FPS figures.
#
#   benchmarks/gpu_suite.sh                    # all parts, in order
#   benchmarks/gpu_suite.sh build kernels      # some
#   benchmarks/gpu_suite.sh --list             # their names, time limits in seconds, and what they do
#
# A part that fails or runs out of time does not stop the others. Logs and JSON go to $OUT (default benchmarks/results),
# a short table is printed last; the exit code is 1 if any part failed. No network.
#
# $PYTHON is the interpreter, $KERNELS_ARGS and $FPS_ARGS what the two benchmarks are asked for.
set -u
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
KERNELS_ARGS=${KERNELS_ARGS:-"--quick --limit 70"}
FPS_ARGS=${FPS_ARGS:-"--model wan2.1-t2v-1.3b --random-weights --quick --clips 2 --steady-chunks 16"}
ABSENT=77 # exit code of a part whose tool or file is not there

PARTS=(build kernels fps notes tests memcheck racecheck) # the figures first, in case the time is cut short
declare -A LIMIT=([build]=75 [kernels]=90 [fps]=210 [notes]=10 [tests]=70 [memcheck]=40 [racecheck]=40)
declare -A ABOUT=(
  [build]="the package with its CUDA kernels, from this machine's nvcc"
  [tests]="pytest -m gpu on tests/ops and tests/engine"
  [memcheck]="compute-sanitizer on small shapes: accesses out of bounds"
  [racecheck]="compute-sanitizer on small shapes: races in shared memory"
  [kernels]="benchmarks/kernels.py: every op, every backend"
  [fps]="benchmarks/fps.py: whole chunks, and the targets"
  [notes]="benchmarks/notes.py: floors, predictions and what was measured, part by part"
)

part_build() {
  # The kernels are what this is about, so a build without them is a failure.
  DSA_BUILD_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e .
}

part_tests() {
  "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/ops tests/engine
  local code=$?
  [ "$code" -eq 5 ] && return "$ABSENT" # pytest found no such test
  return "$code"
}

sanitize() {
  command -v compute-sanitizer >/dev/null || return "$ABSENT"
  # A chunk of 72 tokens of the real width: tiles that are not full. Without torch's caching allocator every tensor has
  # bounds of its own to run over.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_MODULE_LOADING=LAZY \
    compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
    "$PYTHON" benchmarks/kernels.py --check --inline --height 64 --width 96 --backends triton cuda
}

part_memcheck() { sanitize memcheck; }

part_racecheck() { sanitize racecheck; }

part_kernels() {
  # shellcheck disable=SC2086 # several words on purpose
  "$PYTHON" benchmarks/kernels.py $KERNELS_ARGS --save "$OUT/gpu-kernels.json"
}

part_fps() {
  [ -f benchmarks/fps.py ] || return "$ABSENT"
  # Two clips of 7 chunks: the least in which 2.5 steps on average come out even.
  # shellcheck disable=SC2086 # several words on purpose
  "$PYTHON" benchmarks/fps.py $FPS_ARGS --save "$OUT/gpu-fps.json"
}

part_notes() {
  "$PYTHON" benchmarks/notes.py --kernels "$OUT/gpu-kernels.json" --fps "$OUT/gpu-fps.json" --to "$OUT/gpu-NOTES.md"
}

list() {
  local part
  for part in "${PARTS[@]}"; do
    printf '%-10s %4d s  %s\n' "$part" "${LIMIT[$part]}" "${ABOUT[$part]}"
  done
}

known() {
  local part
  for part in "${PARTS[@]}"; do
    [ "$part" = "$1" ] && return 0
  done
  echo "gpu_suite.sh: no part '$1'; there are ${PARTS[*]}" >&2
  return 1
}

verdict() {
  case $1 in
    0) echo ok ;;
    "$ABSENT") echo absent ;;
    124 | 137) echo "out of time" ;;
    *) echo "FAILED, code $1" ;;
  esac
}

# Runs one part in a shell of its own, which `timeout` can end with all that it started.
run_part() {
  local part=$1 start=$SECONDS code
  echo "== $part: ${ABOUT[$part]}"
  timeout --kill-after=5 "${LIMIT[$part]}" bash "$0" --inside "$part" >"$OUT/gpu-$part.log" 2>&1
  code=$?
  tail -n 40 "$OUT/gpu-$part.log" | cut -c -200 # the JSON lines are long; whole they are in the log
  TABLE+=("$(printf '%-10s %4d s  %s' "$part" $((SECONDS - start)) "$(verdict "$code")")")
  [ "$code" -eq 0 ] || [ "$code" -eq "$ABSENT" ]
}

main() {
  local part failed=0
  local -a chosen=("$@")
  [ $# -eq 0 ] && chosen=("${PARTS[@]}")
  for part in "${chosen[@]}"; do
    known "$part" || exit 2
  done
  mkdir -p "$OUT" || exit 1
  export PYTHONUNBUFFERED=1 OUT PYTHON KERNELS_ARGS FPS_ARGS
  TABLE=()
  for part in "${chosen[@]}"; do
    run_part "$part" || failed=1
  done
  printf '\n'
  printf '%s\n' "${TABLE[@]}" | tee "$OUT/gpu-suite.txt"
  exit "$failed"
}

case ${1:-} in
  --list) list ;;
  --inside) "part_$2" ;;
  *) main "$@" ;;
esac
