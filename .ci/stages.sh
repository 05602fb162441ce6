# The frame of a CI run: stages, each a function in a shell and an environment of its own. To be sourced.
# $work is a folder for what stages leave to each other; functions and variables that they use are exported.

results=() notices=() passed=0 failed=0 skipped=0
readonly SKIPPED=77 ALL_MINUTES=45
minute=60 # seconds

# stage NAME FUNCTION [MINUTES]: runs it. One with a slot of MINUTES is ended after them, which is a failure; where less is left
# of all there are, as on a slow machine, it is skipped, and that is told at the end.
stage() {
  local name=$1 function=$2 slot=${3:-} begin=$SECONDS status=0 result
  echo "== $name${slot:+ ($slot minutes at most)}"
  rm -f "$work/reason"
  if ((${slot:-0} * minute + begin > ALL_MINUTES * minute)); then
    echo "$((begin / minute)) of $ALL_MINUTES minutes are over, and it may take $slot" > "$work/reason"
    status=$SKIPPED
  else
    timeout --kill-after=10 $((${slot:-60} * minute)) bash -c "set -euo pipefail; $function" || status=$?
  fi
  case $status in
    0) result=passed passed=$((passed + 1)) ;;
    "$SKIPPED") result=skipped skipped=$((skipped + 1)); notices+=("SKIPPED $name: $(cat "$work/reason")") ;;
    124 | 137) result=failed failed=$((failed + 1)); notices+=("FAILED $name: not done after ${slot:-60} minutes") ;;
    *) result=failed failed=$((failed + 1)); notices+=("FAILED $name: status $status") ;;
  esac
  results+=("$(printf '%-24s %-8s %3d:%02d' "$name" "$result" $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)))")
}

# needs COMMAND...: an installation, in a stage with a slot. Where it fails, the stage is skipped, and that is told at the end.
needs() {
  "$@" && return
  echo "this machine cannot have what \`$*\` installs" > "$work/reason"
  exit "$SKIPPED"
}

# environment NAME: makes a fresh virtual environment, whose commands come first from then on.
environment() {
  python3 -m venv "$work/$1"
  export PATH="$work/$1/bin:$PATH"
}

# in_turn NAME MINUTES...: stages of a slot, each with the function of its name. Which one is first depends on the sources, so that
# on a machine that cannot do all of them in time none is left out by every change.
in_turn() {
  local first count=$(($# / 2)) index
  first=$(($(find . -name '*.py' -not -path './.*' -print0 | LC_ALL=C sort -z | xargs -0 cat | cksum | cut -d ' ' -f 1) % count))
  for ((index = first; index < first + count; index++)); do
    stage "${@:index % count * 2 + 1:1}" "${@:index % count * 2 + 1:1}" "${@:index % count * 2 + 2:1}"
  done
}

# summary: what came of all stages. Its status is 1 where one failed.
summary() {
  printf '\n== Stages, minutes:seconds\n'
  printf '%s\n' "${results[@]}" "${notices[@]}"
  echo "stages: $passed passed, $failed failed, $skipped skipped"
  ((failed == 0))
}

export -f needs environment
export SKIPPED
