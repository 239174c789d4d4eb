# shellcheck shell=sh
# What the test scripts share. Sourced; a script that needs to clean up more defines its own clean() behind it. A test is
# a line `ok NAME`, `not ok NAME: COMMAND` or `skip NAME: REASON`, which summary() counts.
SUITE_SECONDS=900       # of one suite, should it hang
label=                  # goes before the names of tests

tmp=$(mktemp -d)
chmod 755 "$tmp"        # tests run as other users, too
: >"$tmp/lines"
pid=

clean() {
    if [ -n "$pid" ]; then
        kill "$pid" 2>/dev/null || :
        wait "$pid" || :
    fi
    rm -rf "$tmp"
}
trap clean EXIT
trap 'exit 1' HUP INT TERM

line() {
    echo "$*" | tee -a "$tmp/lines"
}

# require NAME COMMAND...: a command that is one test, and fails when that does. Note that set -e is off within COMMAND:
# a function that makes several checks joins them by && or ends with `|| return 1`.
require() {
    name=$label$1
    shift
    if "$@" >"$tmp/output" 2>&1; then
        line "ok $name"
    else
        sed 's/^/    /' "$tmp/output" | cut -c 1-300
        line "not ok $name: $*"
        return 1
    fi
}

# check NAME COMMAND...: the same, and goes on.
check() {
    require "$@" || :
}

# run_suite NAME COMMAND...: runs a command that prints a line for each of its tests, into $tmp/output. One that fails
# without such a line is a failed test itself.
run_suite() {
    name=$1
    shift
    status=0
    timeout "$SUITE_SECONDS" "$@" >"$tmp/output" 2>&1 &
    pid=$!
    wait "$pid" || status=$?
    pid=
    if [ "$status" -ne 0 ] && ! grep -aq '^not ok ' "$tmp/output"; then
        echo "not ok $name: exit status $status" >>"$tmp/output"
    elif [ "$status" -eq 0 ] && ! grep -aq '^ok ' "$tmp/output"; then
        echo "not ok $name: no test ran" >>"$tmp/output"
    fi
}

# suite NAME COMMAND...: runs it, shows what it printed, and counts its tests.
suite() {
    echo "== $1"
    run_suite "$@"
    tee -a "$tmp/lines" <"$tmp/output"
}

# fails COMMAND...
fails() {
    ! "$@"
}

# says STATUS PATTERN COMMAND...: it ends so, and says so.
says() {
    status=0 wanted=$1 pattern=$2
    shift 2
    "$@" >"$tmp/says" 2>&1 || status=$?
    cat "$tmp/says"
    [ "$status" -eq "$wanted" ] && grep -q -e "$pattern" "$tmp/says"
}

# soon COMMAND...: it succeeds within ten seconds.
soon() {
    for _ in $(seq 100); do
        "$@" && return
        sleep 0.1
    done
    return 1
}

# silent COMMAND...: it succeeds, and says nothing.
silent() {
    "$@" >"$tmp/said" 2>&1 || { cat "$tmp/said"; return 1; }
    cat "$tmp/said"
    [ ! -s "$tmp/said" ]
}

count() {
    grep -c "^$1 " "$tmp/lines" || :
}

# The last line; fails when a test did, or none ran.
summary() {
    passed=$(count ok) failed=$(count 'not ok') skipped=$(count skip)
    if [ "$skipped" -gt 0 ]; then
        echo "$passed passed, $failed failed, $skipped skipped"
    else
        echo "$passed passed, $failed failed"
    fi
    [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
}
