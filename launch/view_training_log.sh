#!/usr/bin/env bash
# Shows a training log: the state of the run, then the log in colours by severity, as it grows.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<END
usage: $0 [FILE …]

Shows a training log: a summary line, then its last lines in colours by severity, following it as
it grows (Ctrl-C stops). Given several FILEs it shows the newest; without FILE, the newest in logs/.

In a pipe or redirected to a file, it prints the whole log without colours, then the summary, and exits.
NO_COLOR=1 disables the colours.
END
}

# Prints the files that match a name or pattern, here or else in the project's folder: inside
# launch/ the shell does not expand logs/training_*.log.
matches() {
  if [[ -e $1 ]]; then
    printf '%s\n' "$1"
  else
    compgen -G "$root/$1" || compgen -G "$1" || {
      echo "error: no log $1; logs are in $root/logs once a run has started" >&2
      return 2
    }
  fi
}

# Prints one line: step, loss, tokens/s, time left, last evaluation.
summary() {
  local step evaluation line="no step yet"
  step=$(grep -aE ' step [0-9]+/[0-9]+  ' "$1" | tail -n 1 || true)
  evaluation=$(grep -aE ' step [0-9]+: eval ' "$1" | tail -n 1 || true)
  if [[ $step =~ step\ ([0-9]+/[0-9]+)\ .*(loss\ [^\ ]+)\ .*\ ([^\ ]+\ tokens/s)\ .*(ETA\ .*) ]]; then
    line="step ${BASH_REMATCH[1]}, ${BASH_REMATCH[2]}, ${BASH_REMATCH[3]}, ${BASH_REMATCH[4]}"
  fi
  if [[ $evaluation =~ step\ ([0-9]+):\ (eval\ loss\ [^,]+) ]]; then
    line+=", ${BASH_REMATCH[2]} at step ${BASH_REMATCH[1]}"
  fi
  echo "$1: $line"
}

# Copies standard input and colours the lines that need it.
paint() {
  local line colour traceback="" off=$'\e[0m'
  local red=$'\e[1;31m' yellow=$'\e[33m' green=$'\e[32m' cyan=$'\e[36m'
  shopt -s nocasematch
  while IFS= read -r line || [[ -n $line ]]; do
    colour=""
    if [[ $line == Traceback* ]]; then
      colour=$red traceback=yes
    elif [[ -n $traceback ]]; then
      colour=$red
      [[ $line == " "* || -z $line ]] || traceback="" # the line that names the exception
    elif [[ $line =~ ended\ with\ exit\ status\ 75 ]]; then
      colour=$yellow
    elif [[ $line =~ error|exception|diverged|killed|ended\ with\ exit\ status\ [1-9] ]]; then
      colour=$red
    elif [[ $line =~ warning|spike|skipped|starting\ again|finishing\ the\ step ]]; then
      colour=$yellow
    elif [[ $line =~ step\ [0-9]+:\ eval ]]; then
      colour=$cyan
    elif [[ $line =~ saved|:\ done ]]; then
      colour=$green
    fi
    printf '%s\n' "$colour$line${colour:+$off}"
  done
}

for argument in "$@"; do
  case $argument in
    -h | --help) usage && exit ;;
    -*) echo "error: unknown flag $argument (see --help)" >&2 && exit 2 ;;
  esac
done
if (($#)); then
  found=$(for argument in "$@"; do matches "$argument" || exit; done) || exit
else
  found=$(matches "logs/training_*.log") || exit
fi
newest=""
while IFS= read -r file; do
  [[ -z $newest || $file -nt $newest ]] && newest=$file
done <<<"$found"
if [[ ! -f $newest || ! -r $newest ]]; then
  echo "error: $newest is not a readable file" >&2
  exit 2
fi

if [[ ! -t 1 ]]; then
  cat -- "$newest"
  summary "$newest"
elif [[ -n ${NO_COLOR:-} || ${TERM:-dumb} == dumb ]]; then
  summary "$newest"
  exec tail -n 40 -F -- "$newest"
else
  printf '\e[1m%s\e[0m\n' "$(summary "$newest")"
  tail -n 40 -F -- "$newest" | paint
fi
