#!/usr/bin/env bash
# Runs a command beside a PostgreSQL server on a loopback port that is gone afterwards: scripts/with_postgres.sh make test
# Its URL is in WEFT_TEST_POSTGRES. Without PostgreSQL the command runs all the same, and the tests that need it say so.
# As root, where apt-get is there, Debian's package is installed (WEFT_INSTALL=0: not).
set -euo pipefail

find_binaries() {
    local folder
    for folder in "$(dirname "$(command -v initdb 2>/dev/null || echo /none/initdb)")" /usr/lib/postgresql/*/bin /usr/pgsql-*/bin; do
        [[ -x $folder/initdb && -x $folder/pg_ctl ]] && binaries=$folder
    done
    [[ -n ${binaries:-} ]]
}

if [[ -n ${WEFT_TEST_POSTGRES:-} ]]; then
    exec "$@"
fi
if ! find_binaries && [[ $(id -u) == 0 && ${WEFT_INSTALL:-1} != 0 ]] && command -v apt-get >/dev/null; then
    echo "postgres: installing Debian's package" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql; } >/dev/null 2>&1 ||
        echo "postgres: it can't be installed here" >&2
fi
if ! find_binaries; then
    echo "postgres: not here; its tests will be skipped" >&2
    exec "$@"
fi

data=$(mktemp -d)
as_user=()
if [[ $(id -u) == 0 ]]; then # the server refuses to run as root
    id postgres >/dev/null 2>&1 || useradd --system postgres
    chown postgres "$data"
    as_user=(runuser -u postgres --)
fi
stop() {
    "${as_user[@]}" "$binaries/pg_ctl" -D "$data/cluster" -m immediate stop >/dev/null 2>&1 || true
    rm -rf "$data"
}
trap stop EXIT
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cd "$data" # where the server's user may be
if "${as_user[@]}" "$binaries/initdb" -D "$data/cluster" -U weft --auth=trust -E UTF8 --locale=C.UTF-8 >"$data/log" 2>&1 &&
    "${as_user[@]}" "$binaries/pg_ctl" -D "$data/cluster" -w -l "$data/server.log" \
        -o "-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=60" start >>"$data/log" 2>&1; then
    export WEFT_TEST_POSTGRES="postgresql://weft@127.0.0.1:$port/postgres"
else
    echo "postgres: it doesn't start here; its tests will be skipped" >&2
    cat "$data/log" >&2
fi
cd "$OLDPWD"
"$@"
