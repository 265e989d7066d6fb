#!/usr/bin/env bash
# The former place of scripts/compilers.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/compilers.sh" "$@"
