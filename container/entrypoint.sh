#!/bin/sh
# A person names a command. Beam gives flags alone (https://s.apache.org/beam-fn-api-container-contract), which end at its
# boot, as Dataflow demands of an entrypoint.
set -eu
case "${1:-}" in
-h | --help | --version)
    exec beamsight "$@"
    ;;
--worker_pool)
    # As boot would start it, but its workers come through here.
    shift
    for flag in "$@"; do
        case "$flag" in
        --service_port=*) ;;
        *)
            echo "beamsight: a worker pool knows --service_port=PORT alone, got $flag" >&2
            exit 2
            ;;
        esac
    done
    trap 'kill "$pool"; wait "$pool"' TERM INT # the first process of a container ignores signals that it does not trap
    python -m apache_beam.runners.worker.worker_pool_main --service_port=50000 --container_executable="$0" "$@" &
    pool=$!
    wait "$pool"
    ;;
-*)
    # A worker in a folder of its own: boot writes the options of its job, and what is staged for it, by fixed names.
    cd "$(mktemp -d)"
    exec /opt/apache/beam/boot --semi_persist_dir="$PWD" "$@"
    ;;
*)
    exec beamsight "$@"
    ;;
esac
