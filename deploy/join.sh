#!/bin/sh
# Joins the head as this machine's site and runs it: `join.sh [options of pilot join and pilot node]`.
#   PILOT_HEAD              name or address of the head, :PORT if its port for joining is not 8001
#   PILOT_SITE              the site's name (default: this machine's)
#   PILOT_JOIN_TOKEN_FILE   a file with the token, needed the first time only
#   PILOT_WATCH             aws, gcp, azure, slurm or a file: who says that this machine will be taken away
# The token goes from the file into the environment: on a command line everybody on the machine could read it.
set -eu
: "${PILOT_HEAD:?set PILOT_HEAD to the name or address of the head}"
site=${PILOT_SITE:-$(hostname)}
if [ -n "${PILOT_JOIN_TOKEN_FILE:-}" ] && [ -s "$PILOT_JOIN_TOKEN_FILE" ]; then
  PILOT_JOIN_TOKEN=$(cat "$PILOT_JOIN_TOKEN_FILE")
  export PILOT_JOIN_TOKEN
fi
if [ -n "${PILOT_WATCH:-}" ]; then
  set -- --watch "$PILOT_WATCH" "$@"
fi
exec pilot join "$PILOT_HEAD" --name "$site" "$@"
