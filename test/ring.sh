#!/bin/bash
# deploy/kmsplugin-ring, killed before each of its commands: is the ring then the old one or the new, whole, and does the
# same command come to its end afterwards? On a full disk, twice, by two at once; what it refuses; and that a KEK is
# neither an argument nor on a terminal. Sealed too, as root where systemd-creds is. Prints the table of the kill points,
# and a line `ok`, `not ok` or `skip` for each test.
#
# (bash, for its DEBUG trap, which stops before a command. The tool itself runs in sh where nothing kills it.)
set -eu
cd "$(dirname "$0")/.."
[ ! -w /dev/shm ] || export TMPDIR=/dev/shm # where a sync takes no time
# shellcheck source=test/lib.sh
. test/lib.sh
label='ring: '
program=$(realpath "${KMSPLUGIN:-./kmsplugin}")
export KMSPLUGIN="$program"
tool=$PWD/deploy/kmsplugin-ring

# Killed before the commands of these functions themselves; ALL=1 for every command, in minutes.
steps='lock|put|settled|restart'
[ -z "${ALL:-}" ] || steps='*'

# Whatever is mounted, and systemd-creds' own key, is gone with the namespace.
if [ "${1:-}" != inside ] && unshare --mount true 2>/dev/null; then
    rm -rf "$tmp"
    exec unshare --mount bash "$0" inside
fi

umask 077
id() { KMS_KEK_FILE=$1 "$program" keyid | cut -d ' ' -f 1; }
for name in old new third; do
    "$program" genkey >"$tmp/$name"
done
old=$(id "$tmp/old") new=$(id "$tmp/new")
stranger=00000000000000000000000000000000
folder=$tmp/etc
offer=$tmp/run/kek
none=unix://$tmp/none.sock

ring() { sh "$tool" --file "$file" --offer "$offer" --endpoint "$none" "$@"; }
# join NAME...: a ring's text
join() { cat "${@/#/$tmp/}" | paste -sd ,; }
# The ring is made of these, as the tool itself writes it.
start() {
    rm -rf "$folder" "$tmp/run"
    mkdir "$folder" "$tmp/run"
    if [ "$kind" = sealed ]; then
        # shellcheck disable=SC2086 # options
        join "$@" | systemd-creds encrypt --name=kek $KMSPLUGIN_SEAL - "$file"
    else
        join "$@" >"$file"
    fi
}
holds() {
    if [ "$kind" = sealed ]; then systemd-creds decrypt --name=kek "$1" -; else cat "$1"; fi
}
is() { # NAME...
    [ "$(holds "$file")" = "$(join "$@")" ]
}
clean_folder() { # what lies there
    [ "$(cd "$folder" && echo *)" = "$1" ] || { ls -A "$folder"; return 1; }
}
says() { # PATTERN COMMAND...: fails, and says so
    pattern=$1
    shift
    ! "$@" >"$tmp/said" 2>&1 || { cat "$tmp/said"; return 1; }
    cat "$tmp/said"
    grep -q "$pattern" "$tmp/said"
}

# ---- killed before each command
# The count is a file, for subshells count too.
cat >"$tmp/killer" <<END
set -T
killer() {
    case \${FUNCNAME[1]} in $steps) ;; *) return 0 ;; esac
    read -r n <"\$COUNT"
    echo \$((n + 1)) >"\$COUNT"
    [ "\$n" -ne "\$KILL_AT" ] || { echo "\$1 \${2%%\$'\n'*}" >"\$POINT"; kill -KILL \$\$; }
}
trap 'killer "\$LINENO" "\$BASH_COMMAND"' DEBUG
END
# killed N ARGUMENT...: status 137 when it was
killed() {
    at=$1
    shift
    echo 0 >"$tmp/count"
    rm -f "$tmp/point"
    COUNT=$tmp/count POINT=$tmp/point KILL_AT=$at BASH_ENV=$tmp/killer \
        bash "$tool" --file "$file" --offer "$offer" --endpoint "$none" "$@" >"$tmp/said" 2>&1
}
# Old or new and nothing else, with the mode that it had; what stays for later is whole, too.
whole() { # BEFORE AFTER
    now=$(holds "$file" 2>/dev/null || echo broken)
    found=neither
    # shellcheck disable=SC2086 # names
    was=$(join $1) becomes=$(join $2)
    [ "$now" != "$was" ] || found=old
    [ "$now" != "$becomes" ] || found=new
    [ $found != neither ] && [ "$(stat -c %a "$file")" = 600 ] &&
        { [ ! -e "$file.prev" ] || [ "$(holds "$file.prev")" = "$was" ]; } &&
        { [ ! -e "$offer" ] || cmp "$offer" "$tmp/new"; }
}
# survives TITLE BEFORE AFTER OFFER ARGUMENT...
survives() {
    title=$1 before=$2 after=$3 input=$4
    shift 4
    : >"$tmp/table"
    at=0
    while :; do
        # shellcheck disable=SC2086 # names
        start $before
        [ "$input" != offer ] || cp "$tmp/new" "$offer"
        status=0
        killed $at "$@" </dev/null 2>/dev/null || status=$?
        [ "$status" -eq 137 ] || break
        whole "$before" "$after" || { echo "before: $(cat "$tmp/point")"; ls -l "$folder"; return 1; }
        echo "$found $(cat "$tmp/point")" >>"$tmp/table"
        flock "$folder" true # a child of the dead one may still hold it
        ring "$@" </dev/null >"$tmp/said" 2>&1 || { echo "not done again after $(cat "$tmp/point")"; cat "$tmp/said"; return 1; }
        # shellcheck disable=SC2086
        is $after || { echo "done again, it is another ring: $(cat "$tmp/point")"; return 1; }
        case $(cd "$folder" && echo *) in "${file##*/}" | "${file##*/} ${file##*/}.prev") ;; *) ls -A "$folder"; return 1 ;; esac
        at=$((at + 1))
    done
    [ "$status" -eq 0 ] && [ $at -gt 20 ] && grep -q '^old ' "$tmp/table" && grep -q '^new ' "$tmp/table"
}
# What the ring was when the tool was killed before a line of put(), and how often otherwise.
table() {
    [ -s "$tmp/table" ] || return 0
    awk -v title="$kind, $title" -v first="$(grep -n '^put() {' "$tool" | cut -d : -f 1)" '
        { n[$1]++ }
        title ~ / add$/ && $2 > first && $2 < first + 40 && $0 != last { lines[++count] = $0; last = $0 }
        END {
            printf "# %s: killed before %d commands: %d times the old ring, %d times the new\n", title, NR, n["old"], n["new"]
            for (i = 1; i <= count; i++) print "#     " lines[i]
        }' "$tmp/table"
}
kills() {
    check "$kind, killed at each point: add" survives add old 'old new' offer add "$new"
    table
    [ $kind = plain ] || [ "${ALL:-}" ] || return 0
    check "$kind, killed at each point: seal-with" survives seal-with 'old new' 'new old' '' seal-with "$new"
    table
    check "$kind, killed at each point: retire" survives retire 'new old' new '' retire --without-audit "$old"
    table
}

# ---- a whole life, and what is refused
life() {
    rm -rf "$folder" "$tmp/run"
    check "$kind: no folder, no ring" says 'there is no such folder' ring add
    check "$kind: create offers a KEK" ring create
    cp "$tmp/output" "$tmp/said"
    cp "$offer" "$tmp/first"
    check "$kind: the offer is for its owner alone" test "$(stat -c '%a' "$offer" "$tmp/run" | tr '\n' ' ')" = '600 700 '
    check "$kind: which waits for its copy" grep -qF "A new KEK waits in $offer" "$tmp/said"
    check "$kind: its key_id is not told before" fails grep -E '[0-9a-f]{32}' "$tmp/said"
    check "$kind: offered twice, it is the same" ring create
    check "$kind: the same" cmp "$offer" "$tmp/first"
    check "$kind: no ring yet" fails test -e "$file"
    first=$(id "$tmp/first")
    check "$kind: another key_id is no proof" says 'not the KEK with the key_id' ring create "$stranger"
    check "$kind: the key_id of the copy is" ring create "$first"
    check "$kind: the ring is that KEK" is first
    check "$kind: for root alone" test "$(stat -c '%a' "$file")" = 600
    check "$kind: nothing is on offer any more" fails test -e "$offer"
    check "$kind: again, it changes nothing" ring create "$first"
    check "$kind: no second ring" says 'there is a ring already' ring create
    check "$kind: no third by standard input" says 'there is a ring already' ring create "$new" - <"$tmp/new"
    check "$kind: seal-with before add" says 'add comes first' ring seal-with "$new"
    check "$kind: add, with a KEK of another key_id" says 'not the KEK' ring add "$new" - <"$tmp/third"
    check "$kind: add, with nothing" says 'no KEK; nothing is changed' ring add "$new" - </dev/null
    check "$kind: add, with a ring" says 'more than one KEK' ring add "$new" - < <(join new third)
    check "$kind: add, before one is on offer" says 'no KEK is on offer' ring add "$new"
    check "$kind: still the ring" is first
    check "$kind: add" ring add "$new" - <"$tmp/new"
    check "$kind: it comes last" is first new
    check "$kind: the one before is kept" test "$(holds "$file.prev")" = "$(join first)"
    check "$kind: again" ring add "$new" - <"$tmp/new"
    check "$kind: the same" is first new
    check "$kind: a second rotation waits" says 'the ring has 2 KEKs' ring add
    check "$kind: the one that seals does not retire" says 'seal-with another one first' ring retire "$first" </dev/null
    check "$kind: seal-with" ring seal-with "$new"
    check "$kind: it is in front" is new first
    check "$kind: again" ring seal-with "$new"
    check "$kind: retire with nothing audited" says 'audit does not say' ring retire "$first" </dev/null
    check "$kind: retire of a stranger" says 'no KEK of the ring' ring retire "$stranger" </dev/null
    check "$kind: run keyid" test "$(ring run keyid | cut -d ' ' -f 1 | tr '\n' ' ')" = "$new $first "
    check "$kind: print" test "$(ring print)" = "$(join new first)"
    check "$kind: print of one" test "$(ring print "$first")" = "$(join first)"
    values "$first"
    check "$kind: retire, and a value is under it" says "$first.*=1" ring retire "$first" <"$tmp/values"
    check "$kind: the ring stays" is new first
    values "$new"
    check "$kind: retire, and none is" ring retire "$first" <"$tmp/values"
    check "$kind: it is gone" is new
    check "$kind: again" ring retire "$first" </dev/null
    check "$kind: nothing but the ring and the one before lies there" clean_folder "${file##*/} ${file##*/}.prev"
    rm "$file"
    check "$kind: the ring lost: not a new one in its place" says 'look at that first' ring create
}
# values KEY_ID: what etcdctl would print of one Secret under that KEK of the ring.
values() {
    ring print "$1" >"$tmp/kek"
    env PYTHONPATH=test /usr/bin/python3 - "$tmp/kek" >"$tmp/values" <<'END'
import base64, sys
import sealed
key = b'/registry/secrets/default/a'
value = sealed.etcd_v2(base64.b64decode(open(sys.argv[1]).read()), key, b'k8s\0object')
sys.stdout.buffer.write(sealed.range_response((key, value)))
END
}

# ---- full disks
full() {
    mkdir -p "$tmp/small"
    good=0 bad=0
    for blocks in 1 2 3 4; do for inodes in 3 4 5 6; do
        mount -t tmpfs -o "size=$((blocks * 4))k,nr_inodes=$inodes,mode=700" tmpfs "$tmp/small" || return 77
        folder=$tmp/small file=$tmp/small/${file##*/}
        cp "$tmp/ring" "$file"
        status=0
        ring add "$new" - <"$tmp/new" >"$tmp/said" 2>&1 || status=$?
        if is old && [ $status -ne 0 ]; then bad=$((bad + 1)); elif is old new && [ $status -eq 0 ]; then good=$((good + 1)); else
            echo "$blocks blocks, $inodes files, status $status:"
            cat "$tmp/said"
            ls -l "$folder"
            umount "$tmp/small"
            return 1
        fi
        umount "$tmp/small"
    done; done
    folder=$tmp/etc file=$tmp/etc/${file##*/}
    echo "# $kind, disks of 4 to 16 KiB and 3 to 6 files: $bad times an error and the old ring, $good times the new one" | tee "$tmp/figure"
    [ $good -gt 0 ] && [ $bad -gt 0 ]
}
fulls() {
    start old
    cp "$file" "$tmp/ring"
    if mount -t tmpfs tmpfs "$folder" 2>/dev/null && umount "$folder"; then
        check "$kind: a full disk" full
        cat "$tmp/figure" 2>/dev/null || :
    else
        line "skip ring: $kind, a full disk: nothing can be mounted here (needs root)"
    fi
}

# ---- two at once
locked() {
    exec 8<"$folder"
    flock 8
    says 'another kmsplugin-ring is changing' ring add "$new" - <"$tmp/new"
    status=$?
    exec 8<&-
    return $status
}
crowd() {
    crowd=''
    for _ in 1 2 3 4 5 6; do
        ring add "$new" - <"$tmp/new" >/dev/null 2>>"$tmp/crowd" &
        crowd="$crowd $!"
    done
    done=0
    for one in $crowd; do
        wait "$one" && done=$((done + 1))
    done
    echo "$done of 6 came to their end"
    [ $done -gt 0 ] && is old new && [ "$(grep -vc 'another kmsplugin-ring is changing' "$tmp/crowd")" -eq 0 ]
}

# ---- a plugin that runs
running() {
    KMS_KEK_FILE=$file "$program" serve --listen "unix://$tmp/kms.sock" 2>"$tmp/log" &
    pid=$!
    soon grep -q msg=ready "$tmp/log"
    none=unix://$tmp/kms.sock
    check 'running: show' ring show
    cp "$tmp/output" "$tmp/said"
    check 'running: its key_id' grep -q "^the running plugin: key_id $old " "$tmp/said"
    check 'running: add says how it is restarted' ring add "$new" - <"$tmp/new"
    cp "$tmp/output" "$tmp/said"
    check 'running: it does' grep -q crictl "$tmp/said"
    check 'running: seal-with' ring seal-with "$new"
    check 'running: show tells that it seals under another' says "$old" ring show
    none=unix://$tmp/none.sock
    kill "$pid"
    wait "$pid"
    pid=
}

# ---- no KEK where others see it
arguments() {
    strace -f -qq -e trace=execve -s 4096 -o "$tmp/trace" sh "$tool" --file "$file" --offer "$offer" --endpoint "$none" add "$new" - <"$tmp/new" &&
        strace -f -qq -e trace=execve -s 4096 -A -o "$tmp/trace" sh "$tool" --file "$file" --offer "$offer" --endpoint "$none" seal-with "$new" &&
        strace -f -qq -e trace=execve -s 4096 -A -o "$tmp/trace" sh "$tool" --file "$file" --offer "$offer" --endpoint "$none" retire --without-audit "$old" &&
        grep -q keyid "$tmp/trace" && ! grep -F -f <(cut -c 1-20 "$tmp/old" "$tmp/new") "$tmp/trace"
}
terminal() {
    script -qec "sh $tool --file $file print" /dev/null >"$tmp/said" && return 1
    ! grep -F -f <(cut -c 1-20 "$tmp/old" "$tmp/new") "$tmp/said" && grep 'is a terminal' "$tmp/said"
}

file=$folder/kek kind=plain
life
kills
fulls
start old
check 'one at a time' locked
check 'six at once' crowd
start old
running
start old new
check 'print refuses a terminal' terminal
if strace -o /dev/null true 2>/dev/null; then
    start old
    check 'no KEK is an argument' arguments
else
    line 'skip ring: no KEK is an argument: needs strace, and to be allowed to trace'
fi

if command -v systemd-creds >/dev/null && mount -t tmpfs tmpfs /var/lib/systemd 2>/dev/null && systemd-creds setup 2>/dev/null; then
    export KMSPLUGIN_SEAL=--with-key=host
    file=$folder/kek.cred kind=sealed
    life
    kills
    fulls
    start old
    check 'sealed: no KEK lies there in plain' fails grep -rF -f <(cut -c 1-20 "$tmp/old") "$folder"
else
    line 'skip ring: sealed: needs root, and systemd-creds of systemd 250'
fi
[ "$(count 'not ok')" -eq 0 ]
