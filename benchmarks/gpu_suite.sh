#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes, the most important first.
#
#   benchmarks/gpu_suite.sh                     # all parts, in order
#   benchmarks/gpu_suite.sh build kernels       # some
#   benchmarks/gpu_suite.sh --resume            # those that are not done, of the same sources; kernels row by row
#   benchmarks/gpu_suite.sh --from all.tgz      # the same, with the archive of another machine
#   benchmarks/gpu_suite.sh --list              # their names, time limits in seconds, and what they do
#   DSA_FAKE_CUDA=1 benchmarks/gpu_suite.sh     # dry, on a pretend GPU and at small sizes
#
# A part that fails or runs out of time does not stop the others. Each part gets its limit and ends before it by its own
# clock; what hangs is killed at it. Results are files in $OUT (default benchmarks/results) as soon as they exist:
#
#   gpu-suite.txt      the sources, and how each part went; --resume reads it
#   gpu-suite.log      the output of the parts
#   gpu-smoke.json gpu-kernels.json gpu-fps.json gpu-vae.json
#   all.tgz            all of these, packed after each part
#
# At most eight files, for machines that return no more. The table is printed last; the exit code is 1 if any part
# failed, 143 after SIGTERM. No network.
#
# $PYTHON is the interpreter, or several words that end in one; $KERNELS_ARGS, $FPS_ARGS, ... the options of the parts;
# $LIMITS other limits, as in LIMITS="kernels=300 fps=600".
set -u
cd "$(dirname "$0")/.." || exit 1
SELF=benchmarks/gpu_suite.sh

if [ -n "${DSA_FAKE_CUDA:-}" ]; then # sizes that a CPU computes; a sanitizer has nothing to look at
  PYTHON=${PYTHON:-python3 -m tests.support.fake_cuda --no-data 3000000} # the large GEMMs of the ceilings
  BUILD_ARGS=${BUILD_ARGS-"--dry-run"}
  SMOKE_ARGS=${SMOKE_ARGS-"--model shapes"}
  SMOKE_PARTS=${SMOKE_PARTS-"torch loop"} # the interpreter takes minutes for a chunk by Triton, and longer to time it
  KERNELS_ARGS=${KERNELS_ARGS-"--quick --inline --model shapes --ops modulate pool_frames --backends torch"}
  FPS_ARGS=${FPS_ARGS-"--model shapes --random-weights --quick --frames 6 --steady-chunks 2 --counts 2"}
  VAE_ARGS=${VAE_ARGS-"--check --inline --model shapes --height 16 --width 16"}
  TESTS_ARGS=${TESTS_ARGS-"--collect-only tests/ops tests/engine"}
  CHECK_ARGS=${CHECK_ARGS-"--model shapes --ops modulate"}
  SANITIZER=${SANITIZER-}
fi
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
BUILD_ARGS=${BUILD_ARGS-}
SMOKE_ARGS=${SMOKE_ARGS-}
SMOKE_PARTS=${SMOKE_PARTS-"torch triton loop cuda"} # csrc last: the most likely to hang
KERNELS_ARGS=${KERNELS_ARGS-"--quick"}
# Two clips of 7 chunks: the fewest in which 2.5 steps on average come out even.
FPS_ARGS=${FPS_ARGS-"--model wan2.1-t2v-1.3b --random-weights --quick --clips 2 --steady-chunks 8 --counts 2 4"}
VAE_ARGS=${VAE_ARGS-}
TESTS_ARGS=${TESTS_ARGS-"tests/ops tests/engine"}
# A chunk of 72 tokens of the real width: tiles that are not full.
CHECK_ARGS=${CHECK_ARGS-"--height 64 --width 96"}
SANITIZER=${SANITIZER-compute-sanitizer}
ABSENT=77      # exit code of a part whose tool is not there
UNFINISHED=75  # of one that left something out because its time was over
WITHOUT=78     # of a build without the CUDA kernels

PARTS=(build smoke kernels fps vae tests memcheck racecheck)
declare -A LIMIT=(
  [build]=75 [smoke]=75 [kernels]=80 [fps]=160 [vae]=40 [tests]=55 [memcheck]=25 [racecheck]=20
)
declare -A ABOUT=(
  [build]="the package with its CUDA kernels, from this machine's nvcc; without them where that fails"
  [smoke]="benchmarks/smoke.py: two chunks of the 1.3B by torch, Triton and csrc agree; one loop on the device"
  [kernels]="benchmarks/kernels.py: every op, every backend"
  [fps]="benchmarks/fps.py: whole chunks"
  [vae]="benchmarks/kernels.py --ops vae_decode: a chunk's decode, three ways"
  [tests]="pytest -m gpu on tests/ops and tests/engine"
  [memcheck]="compute-sanitizer on small shapes: accesses out of bounds"
  [racecheck]="compute-sanitizer on small shapes: races in shared memory"
)
for one in ${LIMITS-}; do LIMIT[${one%%=*}]=${one#*=}; done

STATE=$OUT/gpu-suite.txt
LOG=$OUT/gpu-suite.log

# ---- the parts; $1: seconds that one has by its own clock. $PYTHON and *_ARGS are several words on purpose.
# shellcheck disable=SC2086

# within SECONDS COMMAND...: the command has a process group of its own, and ends with this shell.
within() {
  local seconds=$(($1 > 1 ? $1 : 1))
  shift
  timeout --kill-after=2 "$seconds" "$@" &
  trap "kill -TERM $! 2>/dev/null; exit 143" TERM
  wait $!
}

part_build() {
  local pip="-m pip install --no-build-isolation --no-deps --no-index $BUILD_ARGS -e ."
  DSA_BUILD_CUDA=1 within $(($1 * 3 / 4)) $PYTHON $pip && return
  printf '\n!!!!!!!! The CUDA kernels (csrc) were NOT built, see above. !!!!!!!!\n'
  printf '!!!!!!!! Installing WITHOUT them: what follows knows Triton and plain torch alone. !!!!!!!!\n\n'
  DSA_BUILD_CUDA=0 within $(($1 - SECONDS)) $PYTHON $pip && return "$WITHOUT"
}

part_smoke() {
  local one code left worst=0 work
  work=$(mktemp -d) && trap "rm -rf '$work'" EXIT
  for one in $SMOKE_PARTS; do
    left=$(($1 - SECONDS))
    [ "$left" -gt 0 ] || { echo "no time left for $one" && return "$UNFINISHED"; }
    within $((left < $1 / 2 ? left : $1 / 2)) $PYTHON benchmarks/smoke.py "$one" $SMOKE_ARGS --work "$work" --save "$OUT/gpu-smoke.json"
    code=$?
    case $code in
      0) ;;
      "$ABSENT") echo "smoke: $one is absent" ;;
      124 | 137) echo "smoke: $one hung or had no time left" && worst=$UNFINISHED ;;
      *) [ "$worst" -eq "$UNFINISHED" ] || worst=1 ;;
    esac
  done
  return "$worst"
}

part_kernels() {
  $PYTHON benchmarks/kernels.py $KERNELS_ARGS --limit "$1" ${RESUME:+--resume} --save "$OUT/gpu-kernels.json"
}

part_fps() { $PYTHON benchmarks/fps.py $FPS_ARGS --limit "$1" --save "$OUT/gpu-fps.json"; }

part_vae() {
  $PYTHON benchmarks/kernels.py --ops vae_decode $VAE_ARGS --limit "$1" ${RESUME:+--resume} --save "$OUT/gpu-vae.json"
}

part_tests() {
  $PYTHON -m pytest -q -m gpu -x --durations=10 -p no:cacheprovider --limit "$1" $TESTS_ARGS
  local code=$?
  [ "$code" -eq 5 ] && return "$ABSENT" # pytest found no such test
  return "$code"
}

sanitize() {
  local tool="" backends="triton cuda"
  grep -q "WITHOUT csrc" "$STATE" 2>/dev/null && backends=triton
  if [ -n "$SANITIZER" ]; then
    command -v $SANITIZER >/dev/null || return "$ABSENT"
    tool="$SANITIZER --tool $1 --error-exitcode 9 --print-limit 20"
  else
    backends=triton
  fi
  # Without torch's caching allocator every tensor has bounds of its own to run over.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_MODULE_LOADING=LAZY \
    $tool $PYTHON benchmarks/kernels.py --check --inline $CHECK_ARGS --backends $backends --limit "$2"
}

part_memcheck() { sanitize memcheck "$1"; }

part_racecheck() { sanitize racecheck "$1"; }

# ---- what runs them

list() {
  local part
  for part in "${PARTS[@]}"; do
    printf '%-10s %4d s  %s\n' "$part" "${LIMIT[$part]}" "${ABOUT[$part]}"
  done
}

check_part() {
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
    "$UNFINISHED") echo unfinished ;;
    "$WITHOUT") echo "ok, but WITHOUT csrc" ;;
    124 | 137) echo "out of time" ;;
    *) echo "FAILED, code $1" ;;
  esac
}

# The commit, which a copy of the tree may lack, and a checksum of all that runs.
sources() {
  local sum
  sum=$(find benchmarks csrc dsa_engine triton_kernels tests/ops tests/engine -type f \
    \( -name '*.py' -o -name '*.sh' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' \) -print0 |
    LC_ALL=C sort -z | xargs -0 cat | sha1sum | cut -c -12)
  echo "sources $(git rev-parse --short HEAD 2>/dev/null || echo no-git) $sum"
}

# The table, replaced atomically.
write_state() {
  local part
  {
    echo "$SOURCES"
    for part in "${PARTS[@]}"; do
      if [ -n "${STATUS[$part]-}" ]; then printf '%-10s %s\n' "$part" "${STATUS[$part]}"; fi
    done
  } >"$OUT/.gpu-suite.txt.part" && mv "$OUT/.gpu-suite.txt.part" "$STATE"
}

# The verdicts of an earlier run of these sources; results of other sources are removed, as they would pass for these.
read_state() {
  local part rest
  if [ "$(head -n 1 "$STATE" 2>/dev/null)" = "$SOURCES" ]; then
    while read -r part rest; do
      [ "$part" = sources ] || STATUS[$part]=$rest
    done <"$STATE"
    return
  fi
  [ -e "$STATE" ] && [ -n "$RESUME" ] && echo "nothing to resume: $STATE is of other sources, all parts run"
  RESUME=""
  rm -f "$STATE" "$LOG" "$OUT"/gpu-{smoke,kernels,fps,vae}.json "$OUT/all.tgz"
}

archive() {
  rm -f "$OUT"/.gpu-*.part
  (cd "$OUT" && tar czf .all.tgz.part gpu-suite.txt gpu-suite.log $(ls gpu-{smoke,kernels,fps,vae}.json 2>/dev/null) &&
    mv .all.tgz.part all.tgz)
}

finish() { # part, its begin, verdict
  STATUS[$1]=$(printf '%4d s  %s' $((SECONDS - $2)) "$3")
  write_state
  archive
}

# Runs one part in a shell of its own, which `timeout` can end with all that it started. By its own clock a part ends a
# tenth of the limit and two seconds before that. The build runs even when resumed: another machine has nothing.
run_part() {
  local part=$1 start=$SECONDS limit=${LIMIT[$1]} code before own
  own=$((limit - limit / 10 - 2))
  RUNNING=$part BEGUN=$start
  case ${STATUS[$part]-} in
    *" ok" | *" ok, but"*) 
      [ -n "$RESUME" ] && [ "$part" != build ] && echo "== $part: done before" && return
      ;;
  esac
  echo "== $part: ${ABOUT[$part]}"
  [ -n "$RESUME" ] || rm -f "$OUT/gpu-$part.json"
  echo "== $part" >>"$LOG"
  before=$(wc -l <"$LOG")
  timeout --kill-after=5 "$limit" bash "$SELF" --inside "$part" $((own > 1 ? own : 1)) >>"$LOG" 2>&1 &
  CHILD=$!
  wait "$CHILD"
  code=$?
  CHILD=""
  tail -n "+$((before + 1))" "$LOG" | tail -n 40 | cut -c -200 # the JSON lines are long; whole they are in the log
  finish "$part" "$start" "$(verdict "$code")"
}

stopped() {
  trap '' TERM INT HUP
  [ -n "$CHILD" ] && kill -TERM "$CHILD" 2>/dev/null && wait "$CHILD"
  [ -n "$RUNNING" ] && finish "$RUNNING" "$BEGUN" stopped
  exit 143
}

main() {
  local part
  local -a chosen=()
  RESUME=""
  while [ $# -gt 0 ]; do
    case $1 in
      --resume) RESUME=1 ;;
      --from) RESUME=1 && shift && mkdir -p "$OUT" && { tar xzf "${1-}" -C "$OUT" || exit 2; } ;;
      *) check_part "$1" && chosen+=("$1") || exit 2 ;;
    esac
    shift
  done
  [ ${#chosen[@]} -eq 0 ] && chosen=("${PARTS[@]}")
  mkdir -p "$OUT" || exit 1
  SOURCES=$(sources)
  declare -gA STATUS=()
  CHILD="" RUNNING=""
  read_state
  export PYTHONUNBUFFERED=1 OUT RESUME PYTHON SANITIZER
  export SMOKE_PARTS BUILD_ARGS SMOKE_ARGS KERNELS_ARGS FPS_ARGS VAE_ARGS TESTS_ARGS CHECK_ARGS
  trap stopped TERM INT HUP
  for part in "${chosen[@]}"; do
    run_part "$part"
  done
  RUNNING=""
  printf '\n'
  cat "$STATE"
  for part in "${chosen[@]}"; do
    case ${STATUS[$part]} in
      *" ok" | *" absent") ;;
      *) exit 1 ;;
    esac
  done
}

case ${1:-} in
  --list) list ;;
  --inside) "part_$2" "$3" ;;
  *) main "$@" ;;
esac
