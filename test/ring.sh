#!/bin/bash
# deploy/kmsplugin-ring, what test/custody.py leaves out (there: no verb loses a KEK): the same output in every shell that
# is a /bin/sh, what it refuses and in which words, what a medium is, full disks; and that a KEK is no argument, in no
# environment but kmsplugin's, on no terminal and in no trace. Prints a line `ok`, `not ok` or `skip` for each test.
# shellcheck disable=SC2016,SC2086,SC2317 # a shell of two words; functions that check calls
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=test/lib.sh
. test/lib.sh
label='ring: '
program=$(realpath "${KMSPLUGIN:-./kmsplugin}")
tool=$PWD/deploy/kmsplugin-ring

# Whatever is mounted is gone with the namespace.
if [ "${1:-}" != inside ] && unshare --mount true 2>/dev/null; then
    rm -rf "$tmp"
    exec unshare --mount bash "$0" inside
fi
shells=()
for shell in dash bash mksh 'busybox sh'; do
    if command -v "${shell% *}" >/dev/null; then shells+=("$shell"); else line "skip ring: $shell: is not installed"; fi
done

umask 077
for name in old new third; do
    "$program" genkey >"$tmp/$name"
done
id() { KMS_KEK_FILE=$1 "$program" keyid | cut -d ' ' -f 1; }
old=$(id "$tmp/old") new=$(id "$tmp/new") third=$(id "$tmp/third")
stranger=00000000000000000000000000000000
join() { cat "${@/#/$tmp/}" | paste -sd ,; } # NAME...: a ring's text

# What etcdctl would print: NAME, and the KEKs of its values.
env PYTHONPATH=test TMPDIR="$tmp" /usr/bin/python3 - "$tmp" <<'END'
import base64, sys
import sealed
tmp = sys.argv[1]
keks = {name: base64.b64decode(open(f'{tmp}/{name}').read()) for name in ('old', 'new')}
for dump in ('new new', 'new', 'old new'):
    entries = [(b'/registry/secrets/default/%d' % n, sealed.etcd_v2(keks[name], b'/registry/secrets/default/%d' % n, b'k8s\0x'))
               for n, name in enumerate(dump.split())]
    open(f'{tmp}/{dump.replace(" ", "-")}.dump', 'wb').write(sealed.range_response(*entries))
END

# genkey as expected: the names in $tmp/next, one after the other. probe, if there is such a file, as a false plugin.
cat >"$tmp/kmsplugin" <<END
#!/bin/sh
case \$1 in
genkey) name=\$(head -n 1 $tmp/next); sed -i 1d $tmp/next; exec cat "$tmp/\$name" ;;
probe)  [ ! -e $tmp/false ] || exec cat $tmp/false ;;
esac
exec $program "\$@"
END
chmod 755 "$tmp/kmsplugin"
export KMSPLUGIN="$tmp/kmsplugin"

shell='sh'
ring() { $shell "$tool" --root "$tmp/root" --same-disk "$@"; }
says() { # PATTERN COMMAND...: fails, and says so
    pattern=$1
    shift
    ! "$@" >"$tmp/said" 2>&1 || { cat "$tmp/said"; return 1; }
    cat "$tmp/said"
    grep -q -- "$pattern" "$tmp/said"
}
begin() { # a ring of these, and a medium that has them
    rm -rf "$tmp/root" "$tmp/usb" "$tmp/two"
    mkdir -p "$tmp/root/etc/kmsplugin" "$tmp/usb" "$tmp/two"
    [ $# -eq 0 ] || join "$@" >"$tmp/root/etc/kmsplugin/kek"
    for each; do cp "$tmp/$each" "$tmp/usb/kek-$(id "$tmp/$each")"; done
    file=$tmp/root/etc/kmsplugin/kek
    rm -f "$tmp/false"
    echo third >"$tmp/next"
}
serve() { # NAME...: a plugin that has these
    mkdir -p "$tmp/root/run/kmsplugin"
    : >"$tmp/log"
    KMS_KEK=$(join "$@") "$program" serve --listen "unix://$tmp/root/run/kmsplugin/kms.sock" 2>"$tmp/log" &
    pid=$!
    soon grep -q msg=ready "$tmp/log"
}
stop() {
    kill "$pid"
    wait "$pid" || :
    pid=
}

# ---- a whole life, in each shell
life() {
    echo 'old' >"$tmp/next"
    rm -rf "$tmp/root" "$tmp/usb" "$tmp/false"
    mkdir -p "$tmp/root/etc" "$tmp/usb" "$tmp/two"
    usb=$tmp/usb
    run() { echo "\$ $*"; ring "$@" </dev/null || echo "exit $?"; }
    pipe() { echo "\$ $2 ..."; ring "${@:2}" <"$1" || echo "exit $?"; }
    run show; run new "$usb"; run new "$usb"; run show; run print; run print "$old"; run run keyid; run copy "$usb"
    run init "$usb/kek-$old"; run init "$usb"; run init "$usb/kek-$new"; run add "$usb/kek-$old" "$new"
    pipe "$tmp/new" init -; pipe "$tmp/new" add - "$stranger"; pipe /dev/null add - ; pipe "$tmp/kmsplugin" add -
    cp "$tmp/third" "$usb/kek-$stranger"; run add "$usb/kek-$stranger"; run add "$usb"; rm "$usb/kek-$stranger"
    printf 'a\0b' >"$usb/kek-nul"; run add "$usb"; rm "$usb/kek-nul"
    echo new >"$tmp/next"; run add "$usb"; run add "$usb"; run add "$usb/kek-$new"
    run seal-with "$third"; run seal-with "$new"; run seal-with "$new"; run retire "$new"; run retire "$old"
    serve new old
    run show; run retire "$old"; pipe "$tmp/old-new.dump" retire "$old"; pipe "$tmp/new.dump" retire "$old"
    pipe "$tmp/new-new.dump" retire "$old"; run retire "$old"; run seal-with "$old"; run add "$usb/kek-$old"; run seal-with "$old"
    pipe "$tmp/new.dump" retire --one-value "$old"
    run show
    mv "$tmp/root/etc/kmsplugin/kek" "$tmp/root/etc/kmsplugin/gone"
    run show; run new "$tmp/two"; run init "$usb/kek-$old"; run init "$usb/kek-$new"
    head -c 20 "$tmp/new" >"$tmp/root/etc/kmsplugin/kek"; run show; run init "$usb/kek-$new"
    stop
    rm "$tmp/root/etc/kmsplugin/kek"; run new "$tmp/two"; run init "$usb/kek-$old"; rm "$tmp/root/etc/kmsplugin/kek.retired-$old"
    touch -d '1 hour ago' "$usb/kek-$old"; run init "$usb/kek-$old"; run init "$usb/kek-$old" "$old"
    run add "$usb"; run add "$usb/kek-$new"
    chmod 644 "$tmp/root/etc/kmsplugin/kek"; run show; run new "$tmp/two"; run init "$usb/kek-$new"
    run; run never; run show "$usb"; run --never show; run show --file; run retire 123; run seal "$usb" --with-key=null
    echo '$ --help'; ring --help
    find "$tmp/root" "$usb" -type f | sort | xargs sha256sum
}
same_output() { # SHELL
    shell=$1
    life 2>&1 | sed -E "s/time=[^ ]* //; s|$tool: [^ ]*: ||" >"$tmp/output-$1"
    shell='sh'
    grep -q 'audit does not say' "$tmp/output-$1" && grep -q 'DO NOT RESTART' "$tmp/output-$1" && diff "$tmp/output-${shells[0]}" "$tmp/output-$1"
}
for shell in "${shells[@]}"; do
    check "the same output in $shell" same_output "$shell"
done
shell='sh'
expected() { # COUNT PATTERN: so often in that output
    found=$(grep -c -- "$2" "$tmp/output-${shells[0]}") || :
    [ "$found" -eq "$1" ] || { echo "$found times $2"; grep -n -- "$2" "$tmp/output-${shells[0]}"; return 1; }
}
check 'show, without a ring' expected 2 "kek: there is no ring; nothing is changed"
check 'new and copy, done again, make no other KEK' expected 2 "kek-$old: a copy, written and read back"
check 'a copy under another name' expected 1 "kek-$stranger: has the key_id $third, not $stranger"
check 'the wrong KEY_ID' expected 1 "standard input: has the key_id $new, not $stranger"
check 'init where there is a ring' expected 1 'there is a ring already'
check 'add, done again, makes no other KEK' expected 1 "kek-$new: a copy, written and read back"
check 'retire: what seals' expected 1 "$new seals: seal-with another one first"
check 'retire: nothing runs' expected 1 "$old stays: the running plugin seals under nothing"
check 'retire: a value is under it' expected 2 "$old stays: audit does not say"
check 'retire: one value' expected 1 "$old stays: this is a single value"
check 'retire: what audit looked at' expected 4 '^looked at '
check 'seal-with says what to wait for' expected 2 "Wait 15 minutes, rewrite all Secrets, and then:    kmsplugin-ring retire $old"
check 'retire, too early: the way back' expected 2 "^kmsplugin-ring add .*kek.retired-$old"
check 'nothing comes from a pipe' expected 1 'standard input: is empty'
check 'what was retired does not seal again' expected 3 'was retired here'
check 'the ring is lost, and a plugin runs' expected 5 'DO NOT RESTART'
check 'the ring is lost: no new one' expected 1 "there was a ring here ($tmp/root/etc/kmsplugin/kek.retired-$old)"
check 'an older copy' expected 1 "is not newer than"
check 'the mode of the file is told of' expected 3 'mode 0644 lets others read it'
check 'a new cluster is no advice where there was a ring' expected 1 'kmsplugin-ring new DIR'
check 'a NUL in a copy' expected 1 "kek-nul: is no KEK"
check 'wrong calls' expected 6 'exit 2'
check 'seal without a key' expected 1 '--with-key=null: no such option of seal'
check '--help names the man page' expected 1 'man kmsplugin-ring'
man_page() {
    ring --help | sed -nE 's/^(--)?([a-z-]+) +[^ ].*/\1\2/p' | grep -v '^kmsplugin' | sort -u >"$tmp/words"
    [ "$(wc -l <"$tmp/words")" -eq 17 ] || { cat "$tmp/words"; return 1; }
    while read -r word; do
        case $word in --*) said="Fl ${word#-}" ;; *) said="Cm $word" ;; esac
        grep -qE -- "^\.It $said( |$)" doc/kmsplugin-ring.8 || { echo "$word"; return 1; }
    done <"$tmp/words"
}
check 'the man page has each verb and option' man_page
if command -v mandoc >/dev/null; then
    check 'the man page is clean' fails grep -v 'lacks\|referenced manual not found' <(mandoc -T lint doc/kmsplugin-ring.8 2>&1)
fi
check 'no KEK in all that' fails grep -F -f <(cut -c 1-20 "$tmp/old" "$tmp/new" "$tmp/third") <(grep -v '^[A-Za-z0-9+/,=]*$' "$tmp/output-${shells[0]}")

# ---- no KEK where others see it
# A shell may trace, and export everything; variables may be there that the tool uses.
traced() { # SHELL
    begin
    export ring=1 kek=1 others=1 rest=1 new=1 longer=1 content=1 back=1 one=1 before=1 wanted=1
    echo 'old' >"$tmp/next"
    verb() {
        strace -f -qq -v -s 4096 -e trace=execve -A -o "$tmp/trace" env KMSPLUGIN="$program" SHELLOPTS=xtrace:verbose:allexport:noglob \
            $1 -afvx "$tool" --root "$tmp/root" --same-disk "${@:2}" 2>>"$tmp/stderr"
    }
    rm -f "$tmp/trace" "$tmp/stderr"
    verb "$1" new "$tmp/usb" && verb "$1" add "$tmp/usb" && verb "$1" print >"$tmp/ring" || return 1
    ids=$(KMS_KEK=$(cat "$tmp/ring") "$program" keyid | cut -d ' ' -f 1 | paste -sd ' ')
    verb "$1" seal-with "${ids#* }" && verb "$1" print "${ids#* }" >"$tmp/one" && verb "$1" add - <"$tmp/third" && verb "$1" copy "$tmp/two" &&
        verb "$1" init - "${ids#* }" <"$file" || return 1
    tr , '\n' <"$file" | cut -c 1-20 >"$tmp/keks"
    [ "$(wc -l <"$tmp/keks")" -eq 3 ] || return 1
    grep -q '^[0-9]* *execve.*kmsplugin", \["[^"]*", "keyid"\].*KMS_KEK=' "$tmp/trace" || return 1 # it sees environments
    ! sed 's/\], \[.*//' "$tmp/trace" | grep -F -f "$tmp/keks" &&
        ! grep -v "execve(\"$program\"" "$tmp/trace" | grep -F -f "$tmp/keks" && ! grep -F -f "$tmp/keks" "$tmp/stderr"
}
if strace -o /dev/null true 2>/dev/null; then
    for each in "${shells[@]}"; do
        check "no KEK in an argument, another environment or a trace: $each" traced "$each"
    done
else
    line 'skip ring: no KEK is an argument: needs strace, and to be allowed to trace'
fi
unset -v ring kek others rest longer content back one before wanted
new=$(id "$tmp/new")
begin old new
after_restore() { # the medium has what was retired elsewhere, and is older: it does not come back; what waits does
    begin new
    cp "$tmp/old" "$tmp/usb/kek-$old" && touch -d '1 hour ago' "$tmp/usb/kek-$old" && touch "$tmp/usb/kek-$new"
    rm "$file" && ring init "$tmp/usb/kek-$new" && ring add "$tmp/usb" >"$tmp/said" && [ "$(cat "$file")" = "$(join new third)" ] || return 1
    grep -q "seal-with $third" "$tmp/said" && join new >"$file" && cp "$tmp/third" "$file.retired-$third" && ring copy "$tmp/usb" || return 1
    rm "$file.retired-$third" && touch -r "$tmp/usb/kek-$new" "$tmp/usb/kek-$old" && echo third >"$tmp/next" || return 1
    says "kek-$old: waits on the medium" ring add "$tmp/usb" && sh -euc "$(grep '^touch ' "$tmp/said")" && ring add "$tmp/usb"
}
check 'add after a restore takes nothing retired' after_restore
newest() { # what add makes is, whatever the clock said; of what cp has copied, and in whatever order, none is
    begin new
    touch -d '1 year' "$tmp/usb/kek-$new" && ring add "$tmp/usb" && rm "$file" && cp "$tmp/usb"/kek-* "$tmp/two" || return 1
    for each in "usb/kek-$new" "two/kek-$new" "two/kek-$third"; do says 'is not newer than' ring init "$tmp/$each" || return 1; done
    ring init "$tmp/usb/kek-$third"
}
check 'init knows the newest copy, or asks' newest
moved() { # what cannot be read is moved away as it says, and nothing that was moved is overwritten; a moved KEK is still one that was left
    begin new
    for each in 1 2; do
        cp "$file" "$tmp/good" && echo $each >"$file" && says 'no ring can be read' ring show && sh -euc "$(grep '^mv ' "$tmp/said")" && mv "$tmp/good" "$file" || return 1
    done
    [ "$(cat "$file".lost*)" = "$(printf '1\n2')" ] && cp "$tmp/old" "$file.retired-$old.lost" && ring copy "$tmp/two" && ring add - <"$tmp/old" &&
        says 'was retired here' ring seal-with "$old" && : >"$tmp/two/kek-$new" && says "kek-$new: move it away" ring copy "$tmp/two"
}
check 'what is moved away' moved
printed() { (umask 022; ring print >"$tmp/printed") && [ "$(stat -c %a "$tmp/printed")" = 600 ] && [ "$(cat "$tmp/printed")" = "$(cat "$file")" ]; }
check 'print into a file: for root alone' printed
whole() { # of two KEKs, one was there
    begin old
    join old new | ring add - >"$tmp/said" && [ "$(grep -c seal-with "$tmp/said")" -eq 1 ] && grep -q "seal-with $new" "$tmp/said"
}
check 'add names what came' whole
begin
cp "$tmp/new" "$tmp/usb/typed"
check 'a name without a KEY_ID' says 'its name says no KEY_ID' ring init "$tmp/usb/typed"
check 'it is given' ring init "$tmp/usb/typed" "$new"
check 'another medium' says 'is the medium mounted' ring add "$tmp/two"
check 'print refuses a terminal' says 'is a terminal' script -qec "sh $tool --root $tmp/root print" /dev/null
check 'so does standard input' says 'is a terminal' script -qec "sh $tool --root $tmp/root add -" /dev/null

# ---- a false plugin does not write to the terminal
# shellcheck disable=SC2028 # what an echo would make of it
printf 'x\nkey_id %s version \033]0;\\033[2J\a\\c\x9b1m\n' "$old" >"$tmp/false"
falsely() {
    ring show >"$tmp/said" 2>&1 || :
    cat "$tmp/said"
    grep -qF "the running plugin: key_id $old version ]0;\\033[2J\\c1m" "$tmp/said" && ! LC_ALL=C grep '[^ -~]' "$tmp/said"
}
check 'what a false plugin says is not raw' falsely
rm "$tmp/false"

# ---- whoever can only read does not hold the lock
begin old
locked() { flock "$tmp/root/etc/kmsplugin/.lock" env -u SHELLOPTS sh "$tool" --root "$tmp/root" seal-with "$old"; }
ring seal-with "$old" >/dev/null
check 'one at a time' says 'another kmsplugin-ring is changing' locked
check 'the lock is for root' test "$(stat -c %a "$tmp/root/etc/kmsplugin/.lock")" = 600
check 'a lock on the folder is nothing' flock "$tmp/root/etc/kmsplugin" sh "$tool" --root "$tmp/root" seal-with "$old"
crowd() {
    crowd='' ended=0
    for _ in 1 2 3 4 5 6; do ring add - <"$tmp/new" >/dev/null 2>>"$tmp/crowd" & crowd="$crowd $!"; done
    for one in $crowd; do wait "$one" && ended=$((ended + 1)); done
    [ $ended -gt 0 ] && [ "$(cat "$file")" = "$(join old new)" ] && [ "$(grep -vc 'another kmsplugin-ring' "$tmp/crowd")" -eq 0 ]
}
check 'six at once' crowd

# ---- tools
begin old
mkdir -p "$tmp/bin"
check 'PATH of sudo' env PATH=/usr/bin:/bin sh "$tool" --root "$tmp/root" print
cp "$tool" "$tmp/bin/"
ln -s "$program" "$tmp/bin/kmsplugin"
check 'its program is beside it' env -u KMSPLUGIN PATH=/usr/bin:/bin "$tmp/bin/kmsplugin-ring" --root "$tmp/root" run keyid
sed 's|^PATH=.*|PATH=$NONE|' "$tool" >"$tmp/bin/lacks"
for each in sh sed grep dirname tr cut; do ln -s "$(command -v $each)" "$tmp/bin/"; done
check 'a missing tool is named' says 'flock: not found' env NONE="$tmp/bin" "$tmp/bin/sh" "$tmp/bin/lacks" --root "$tmp/root" show
check 'a symbolic link' says 'is a symbolic link' ring --file "$tmp/bin/kmsplugin" show

if [ "$(command id -u)" -ne 0 ]; then
    line 'skip ring: other users, media, full disks: needs root'
    [ "$(count 'not ok')" -eq 0 ]
    exit
fi
chmod 755 "$tmp/root" "$tmp/root/etc"
check 'an ordinary user is told' says 'this is for root' \
    setpriv --reuid=12345 --regid=12345 --clear-groups env KMSPLUGIN=/bin/true sh -s -- --root "$tmp/root" show <"$tool"

# ---- a medium
begin
mkdir -p "$tmp/memory" "$tmp/disk" "$tmp/here"
plainly() { sh "$tool" --root "$tmp/root" "$@"; }
if mount --bind / "$tmp/here" 2>/dev/null; then # as $tmp may be memory
    check 'no medium: the same disk' says "is on this machine's disk; is the medium mounted?" \
        env KMSPLUGIN=/bin/false sh "$tool" --root "$tmp/here" --file "$tmp/root/etc/kmsplugin/kek" new "$tmp/here"
    umount "$tmp/here"
fi
if mount -t tmpfs tmpfs "$tmp/memory" 2>/dev/null; then
    check 'no medium: memory' says 'is memory; is the medium mounted?' plainly new "$tmp/memory"
fi
truncate -s 16M "$tmp/image"
if mkfs.ext4 -q "$tmp/image" 2>/dev/null && mount -o loop "$tmp/image" "$tmp/disk" 2>/dev/null; then
    echo third >"$tmp/next"
    check 'a medium' plainly new "$tmp/disk"
    check 'it has the KEK before it is unmounted' grep -qaF "$(cat "$tmp/third")" "$tmp/image"
    if strace -o /dev/null true 2>/dev/null; then
        check 'it is read past the page cache' sh -c "strace -f -e openat -o $tmp/trace sh $tool --root $tmp/root copy $tmp/disk &&
            grep 'disk/kek-$third.*O_DIRECT' $tmp/trace"
    fi
    umount "$tmp/disk"
else
    line 'skip ring: a medium: no loop device can be mounted here'
fi

# ---- full disks: the old ring and an error, or the new one
full() {
    good=0 bad=0
    for blocks in 1 2 3 4; do for inodes in 3 4 5 6; do
        mount -t tmpfs -o "size=$((blocks * 4))k,nr_inodes=$inodes,mode=700" tmpfs "$tmp/memory" || return 1
        cp "$tmp/old" "$tmp/memory/kek"
        status=0
        ring --file "$tmp/memory/kek" add - <"$tmp/new" >"$tmp/said" 2>&1 || status=$?
        now=$(cat "$tmp/memory/kek")
        umount "$tmp/memory"
        if [ "$now" = "$(join old)" ] && [ $status -ne 0 ]; then bad=$((bad + 1))
        elif [ "$now" = "$(join old new)" ] && [ $status -eq 0 ]; then good=$((good + 1))
        else cat "$tmp/said"; return 1; fi
    done; done
    [ $good -gt 0 ] && [ $bad -gt 0 ]
}
if umount "$tmp/memory" 2>/dev/null; then
    check 'full disks' full
else
    line 'skip ring: full disks: nothing can be mounted here'
fi
[ "$(count 'not ok')" -eq 0 ]
