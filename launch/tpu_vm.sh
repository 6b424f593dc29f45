#!/usr/bin/env bash
# Trains on Cloud TPU VMs: makes a queued resource, waits until it is there, runs a command on all its workers.
#
#   launch/tpu_vm.sh run NAME --zone=us-east5-b --type=v6e-16 --runtime=v2-alpha-tpuv6e [--slices=2] [--spot] \
#       [--setup='git clone URL lm; pip install -e "lm[tpu]"'] -- lm train --experiment=... --workdir=gs://...
#   launch/tpu_vm.sh create NAME (the same options)
#   launch/tpu_vm.sh status|delete NAME --zone=...
#
# What is suspended (a spot preemption) or has failed is deleted and made again. `run` starts the command again, after
# --setup, where it ends with 75 (saved, wants a restart) or where its machines went away; any other exit code is its
# own. LM_LAUNCH is the same in all its starts: `lm train` gives up with code 1 where three of them ended without a
# newer checkpoint. LM_POLL_S is the time between two looks at the state (30).

set -uo pipefail
POLL_S=${LM_POLL_S:-30}
TRIES=5  # Of making the resource, and of reaching its machines, in a row.

usage() {
  echo "tpu_vm.sh: $1" >&2
  sed -n 's/^#   //p' "$0" >&2
  exit 2
}

say() { echo "launch: $*" >&2; }

resource() {
  local verb=$1
  shift
  gcloud alpha compute tpus queued-resources "$verb" "$name" --zone="$zone" "$@"
}

# Nothing where there is no such resource.
state() { resource describe --format='value(state.state)' 2>/dev/null; }

make() {
  local nodes=(--node-id="$name")
  if [ "$slices" -gt 1 ]; then nodes=(--node-count="$slices" --node-prefix="$name"); fi
  resource create --accelerator-type="$type" --runtime-version="$runtime" "${nodes[@]}" ${spot:+--spot} --quiet
}

remove() { resource delete --force --quiet; }

wait_until_active() {
  local now tries=0
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      "" | SUSPENDED | FAILED)
        if [ "$now" = FAILED ] || [ -z "$now" ]; then tries=$((tries + 1)); fi
        if [ $tries -gt $TRIES ]; then
          say "$name did not come into being in $TRIES tries: see gcloud alpha compute tpus queued-resources describe"
          exit 1
        fi
        if [ -n "$now" ]; then
          say "$name is $now: making it again"
          remove
        fi
        make ;;
    esac
    sleep "$POLL_S"
  done
}

run() {
  local code lost=0 command
  command=$(printf '%q ' env LM_NUM_PROCESSES=auto LM_LAUNCH="tpu-$name-$(date +%s)-$$" "$@")
  # Where the connection was lost and the command was not, the next one waits until it has ended.
  command="flock --close --timeout 120 --conflict-exit-code 75 /tmp/lm.lock $command"
  if [ -n "$setup" ]; then command="{ $setup; } && $command"; fi
  while true; do
    wait_until_active
    # A command waits for all its processes, so that all have to be started at once.
    resource ssh --node=all --worker=all --batch-size=all --command="$command"
    code=$?
    if [ $code -eq 0 ]; then exit 0; fi
    if [ $code -eq 75 ]; then
      lost=0
    else
      sleep "$POLL_S"  # A preemption shows in the state some time after the connections broke.
      if [ "$(state)" = ACTIVE ]; then
        lost=$((lost + 1))
        if [ $code -lt 128 ] || [ $lost -ge $TRIES ]; then exit $code; fi
      fi
    fi
    say "exit code $code: starting again"
  done
}

[ $# -ge 2 ] || usage "a verb and a name are missing"
verb=$1 name=$2
shift 2
zone="" type="" runtime="" slices=1 spot="" setup=""
while [ $# -gt 0 ]; do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --spot) spot=yes ;;
    --) shift; break ;;
    *) usage "there is no option $1" ;;
  esac
  shift
done
[ -n "$zone" ] || usage "--zone is missing"
case $verb in
  create | run) if [ -z "$type" ] || [ -z "$runtime" ]; then usage "--type and --runtime are missing"; fi ;;
esac
case $verb in
  create) wait_until_active ;;
  run)
    [ $# -gt 0 ] || usage "-- COMMAND is missing"
    run "$@" ;;
  status) now=$(state); echo "${now:-none}" ;;
  delete) remove ;;
  *) usage "there is no verb $verb" ;;
esac
