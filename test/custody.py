"""Does kmsplugin-ring lose a KEK? Three machines and two media, real plugins, right and wrong verbs in any order.

    custody.py [SECONDS [SEED]]     one world after another, 60 s unless told otherwise
    custody.py mutants [NAME]       that it notices each of MUTANTS, a tool with one safeguard less

A world begins as the page of doc/operate.md has it, with misreadings; whoever follows it has to end with one sealing KEK
on all machines. Then anything happens: verbs at random, operators who clear up, lost and cut files, TPMs that are gone
and come back, reboots. Half of all verbs are killed before one of their commands. After each, all files are opened that
lie on machines and media, sealed ones too: no KEK may be gone from where it was, and none may be in a ring that never was
on a medium.

A machine is a folder for --root. systemctl and systemd-creds are stand-ins (FAKES); the plugins are real.
"""
import base64
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

if os.access('/dev/shm', os.W_OK):
    os.environ['TMPDIR'] = '/dev/shm'       # where a sync takes no time
import sealed
from plugin import BINARY, ROOT, TMP, key_id

TOOL = ROOT + '/deploy/kmsplugin-ring'
SHELLS = [shell for shell in ('dash', 'bash', 'mksh', 'busybox sh') if shutil.which(shell.split()[0])]
VERB_SECONDS = 60       # a verb that takes longer hangs
STEPS_MAX = 12          # tries of a step of the page, of which the last ones are not killed
EVENTS = 40             # of a world, after the page
MUTANT_SEED = 6         # worlds in which each is noticed early
MUTANT_VERBS = 3000     # a mutant that is not noticed in so many is not noticed: some 100 are the rule
UNIT = 'kmsplugin.service'

# What systemd does: it reads the unit when it is told to, and gives the service a copy of the KEK.
FAKES = {
    'systemctl': r'''
        show() { cat "$MACHINE/unit" "$MACHINE/etc/systemd/system/kmsplugin.service.d/"*.conf 2>/dev/null; }
        while [ "${1#-}" != "$1" ]; do shift; done
        credentials=$MACHINE/run/credentials/kmsplugin.service
        case $1 in
        cat) show ;;
        daemon-reload) show >"$MACHINE/loaded" ;;
        is-active) [ -s "$MACHINE/pid" ] ;;
        enable | restart | stop)
            [ "$1" != enable ] || show >"$MACHINE/loaded"
            [ "$1" != enable ] || [ ! -s "$MACHINE/pid" ] || exit 0
            if [ -s "$MACHINE/pid" ]; then kill "$(cat "$MACHINE/pid")"; fi
            rm -rf "$MACHINE/pid" "$credentials" "$MACHINE/run/kmsplugin/kms.sock"
            [ "$1" != stop ] || exit 0
            from=$MACHINE$(sed -n 's/^LoadCredential.*=kek://p' "$MACHINE/loaded" | tail -n 1)
            mkdir -p "$credentials"
            case $from in
            *.cred) systemd-creds decrypt --name=kek "$from" - >"$credentials/kek" ;;
            *) cat "$from" >"$credentials/kek" ;;
            esac 2>/dev/null && chmod 400 "$credentials/kek" || { rm -rf "$credentials"; exit 1; }
            KMS_KEK_FILE=$credentials/kek "$KMSPLUGIN" serve --listen "unix://$MACHINE/run/kmsplugin/kms.sock" \
                </dev/null >/dev/null 2>"$MACHINE/log" & pid=$!
            until grep -q msg=ready "$MACHINE/log"; do
                kill -0 "$pid" 2>/dev/null || { rm -rf "$credentials"; exit 1; }
                sleep 0.01
            done
            echo "$pid" >"$MACHINE/pid" ;;
        *) exit 1 ;;
        esac''',
    'systemd-creds': r'''
        case $1 in
        encrypt)
            case $* in *--with-key=host*) key=$MACHINE/hostkey ;; *--with-key=tpm2*) key=$MACHINE/tpm ;; esac
            [ -s "$key" ] || exit 1
            for out; do :; done
            { cat "$key"; tr A-Za-z N-ZA-Mn-za-m; } >"$out" ;;
        decrypt)
            read -r key <"$3" && cat "$MACHINE/hostkey" "$MACHINE/tpm" 2>/dev/null | grep -qx "$key" || exit 1
            tail -n +2 "$3" | tr A-Za-z N-ZA-Mn-za-m ;;
        esac''',
}
# Killed before the Nth command, or the Nth of those that change something.
KILLER = r'''
set -T
killer() {
    case $CHANGES:$1 in 1:mv* | 1:rm* | 1:sync* | 1:shred* | 1:systemctl* | 1:echo*\>* | 0:*) ;; *) return 0 ;; esac
    read -r n <"$COUNT"
    echo $((n - 1)) >"$COUNT"
    [ "$n" -ne 0 ] || kill -KILL $$
}
trap 'killer "$BASH_COMMAND"' DEBUG
'''
# What each lets pass, and the text of the tool that it changes.
MUTANTS = {
    'no copy on the medium': ('    keep "$1" "$new" "$new_ids"\n', ''),
    'the retired KEK is not kept': ('        store "$kek" "$file.retired-$1"\n', ''),
    'the running plugin is not asked': ('    held "$memory" "$found $*" "$file" ||', '    true ||'),
    'rm before rename': ('mv -f "$part" "$2" &&', 'rm -f "$2" && mv -f "$part" "$2" &&'),
    'store() replaces anything': ('        held "$before" "$wanted" "$2" ||', '        true ||'),
    'new passes over a KEK that waits': ('        held "$waits" "$found" "$file" ||', '        true ||'),
}


class Violation(Exception):
    pass


def keks(path):
    """The KEKs in a file by key_id, as one who can open everything has them."""
    try:
        with open(path, encoding='latin-1') as file:
            text = file.read()
    except OSError:
        return {}
    if text.startswith('KEY '):
        text = text.partition('\n')[2].translate(str.maketrans(
            'NOPQRSTUVWXYZABCDEFGHIJKLMnopqrstuvwxyzabcdefghijklm', 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'))
    found = {}
    for word in text.split(','):
        try:
            kek = base64.b64decode(word.strip(), validate=True)
        except ValueError:
            continue
        if len(kek) == 32:
            found[key_id(kek)] = kek
    return found


def spoil(chance, path):
    """A file is lost, or cut."""
    if os.path.isfile(path):
        if chance.random() < 0.5:
            os.remove(path)
        else:
            os.truncate(path, chance.randrange(os.path.getsize(path) + 1))


class Machine:
    def __init__(self, world, name):
        self.world, self.root = world, f'{world.dir}/{name}'
        self.folder = self.root + '/etc/kmsplugin'
        os.makedirs(self.root + '/run/systemd/system')
        os.makedirs(self.root + '/run/kmsplugin')
        self.write('unit', 'LoadCredential=kek:/etc/kmsplugin/kek\n')
        self.write('hostkey', f'KEY host {name}\n')
        self.write('tpm', f'KEY tpm {name}\n')
        self.env = {**os.environ, 'MACHINE': self.root, 'PATH': f'{world.bin}:{os.environ["PATH"]}', 'KMSPLUGIN': BINARY}

    def write(self, name, text):
        with open(f'{self.root}/{name}', 'w', encoding='ascii') as file:
            file.write(text)

    def systemctl(self, verb):
        subprocess.run(['systemctl', verb], env=self.env, check=False, stderr=subprocess.DEVNULL, timeout=VERB_SECONDS)

    def files(self):
        return [path for path in glob.glob(self.folder + '/*') if os.path.isfile(path)]

    def memory(self):
        """What the running plugin has, the sealing one first."""
        return keks(f'{self.root}/run/credentials/{UNIT}/kek') if os.path.exists(self.root + '/pid') else {}

    def seals(self):
        return next(iter(self.memory()), None)

    def sealed(self):
        return os.path.exists(f'{self.root}/etc/systemd/system/{UNIT}.d/sealed-kek.conf')

    def plain_by_hand(self):
        """As the page has it where the TPM is gone."""
        spare = f'{self.root}/etc/systemd/system/{UNIT}.d/sealed-kek.conf'
        if os.path.exists(spare):
            os.remove(spare)
            self.systemctl('daemon-reload')

    def reboot(self):
        self.systemctl('stop')
        self.systemctl('daemon-reload')
        self.systemctl('restart')


class World:
    def __init__(self, chance, tool, tally):
        self.chance, self.tally = chance, tally
        self.dir = f'{TMP}/world'
        os.makedirs(self.dir)
        self.bin, self.tool = self.dir + '/bin', self.dir + '/bin/kmsplugin-ring'
        os.mkdir(self.bin)
        for name, text in {**FAKES, 'killer': KILLER}.items():
            with open(f'{self.bin}/{name}', 'w', encoding='ascii') as file:
                file.write('#!/bin/sh\n' + text)
            os.chmod(f'{self.bin}/{name}', 0o755)
        with open(self.tool, 'w', encoding='utf-8') as file:
            file.write(tool)
        self.machines = [Machine(self, name) for name in ('cp-1', 'cp-2', 'cp-3')]
        self.media = [self.dir + '/usb-1', self.dir + '/usb-2']
        for medium in self.media:
            os.mkdir(medium)
        self.secrets = {}       # names of Secrets, and the KEK that each is under
        self.known = {}         # all KEKs ever seen
        self.copied = set()     # those that were on a medium
        self.trace = []

    def end(self):
        for machine in self.machines:
            machine.systemctl('stop')
        shutil.rmtree(self.dir)

    # ---- what lies where

    def look(self):
        """The KEKs by place, on disk and in memory."""
        disk = {m.root: {i: k for path in m.files() for i, k in keks(path).items()} for m in self.machines}
        disk.update({medium: {i: k for path in glob.glob(medium + '/kek-*') for i, k in keks(path).items()}
                     for medium in self.media})
        return disk, {m.root: m.memory() for m in self.machines}

    def judge(self, before, after):
        for place, had in before[0].items():
            now = {**after[0][place], **after[1].get(place, {})}
            memory = before[1].get(place, {})
            gone = [i for i in had if i not in after[0][place]] + [i for i in memory if i not in now]
            if gone:
                raise Violation(f'{gone[0]} is gone from {os.path.basename(place)}')
        for place, has in after[0].items():
            self.known.update(has)
            if place in self.media:
                self.copied.update(has)
        stray = [i for has in after[0].values() for i in has if i not in self.copied]
        if stray:
            raise Violation(f'{stray[0]} was never on a medium')

    def write(self, machine):
        """An API server writes a Secret."""
        if machine.seals():
            self.secrets[f'/registry/secrets/default/s{self.chance.randrange(4)}'] = machine.seals()

    def dump(self, names=None):
        entries = [(name.encode(), sealed.etcd_v2(self.known[self.secrets[name]], name.encode(), b'k8s\0object'))
                   for name in sorted(names or self.secrets)]
        return sealed.range_response(*entries) if entries else b''

    # ---- verbs

    def verb(self, machine, *words, stdin=b'', kill=None):
        """Runs one, killed before a command if told so. Gives its exit status and what it said."""
        if kill is None:
            kill = self.chance.random() < 0.5
        options = ['--same-disk', '--root', machine.root]
        self.chance.shuffle(words_first := [0, 1])
        line = [*options, *words] if words_first[0] else [words[0], *options, *words[1:]] if words[0] != 'run' else [*options, *words]
        env, shell = machine.env, self.chance.choice(SHELLS).split()
        if kill:
            changes = self.chance.random() < 0.7
            machine.write('count', str(self.chance.randrange(12 if changes else 400)) + '\n')
            shell = ['bash']
            env = {**env, 'BASH_ENV': self.bin + '/killer', 'COUNT': machine.root + '/count', 'CHANGES': str(int(changes))}
        before = self.look()
        done = subprocess.run([*shell, self.tool, *line], env=env, input=stdin, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=VERB_SECONDS, check=False)
        said = done.stdout.decode('utf-8', 'replace')
        self.tally['verbs'] += 1
        self.tally['kills'] += done.returncode == -signal.SIGKILL
        self.trace.append(f'{os.path.basename(machine.root)} {" ".join(words)}: {done.returncode} {said.strip()[:400]}')
        if os.path.exists(machine.folder + '/.lock'):       # a child of the dead one may still hold it
            subprocess.run(['flock', '-w', '20', machine.folder + '/.lock', 'true'], check=True)
        if words[0] != 'print' and any(base64.b64encode(k).decode()[:20] in said for k in self.known.values()):
            raise Violation('a KEK is in what it said')
        self.judge(before, self.look())
        self.write(machine)
        return done.returncode, said

    def ring(self, machine, *words):
        done = subprocess.run(['sh', self.tool, '--root', machine.root, 'print', *words], env=machine.env, check=False,
                              capture_output=True, timeout=VERB_SECONDS)
        return done.stdout if done.returncode == 0 else b''

    def step(self, machine, *words, stdin=b''):
        """One of the page, done again until it ends well; whoever follows the page does what it says."""
        for turn in range(STEPS_MAX):
            status, said = self.verb(machine, *words, stdin=stdin, kill=None if turn < STEPS_MAX - 4 else False)
            if status == 0:
                return said
            advice = re.search(r'^(?:memory: +)?kmsplugin-ring (init|add) (\S+)(?: ([0-9a-f]{32}))?(?: <(\S+))?$', said, re.M)
            if status == 1 and advice:
                words = [word for word in advice.groups()[:3] if word]
                if advice[4]:       # standard input
                    with open(advice[4], 'rb') as file:
                        stdin = file.read()
        raise Violation(f'the page does not go on: {words}: {said}')

    def refused(self, machine, *words, stdin=b''):
        if self.verb(machine, *words, stdin=stdin, kill=False)[0] == 0:
            raise Violation(f'not refused: {words}')

    # ---- the page, as somebody follows it who misreads a line here and there

    def page(self):
        first, *others = self.chance.sample(self.machines, 3)
        usb, misreads = self.media[0], lambda: self.chance.random() < 0.5
        self.step(first, 'new', usb)
        if misreads():
            self.refused(others[0], 'new', usb)
        if misreads():
            self.refused(others[1], 'add', usb)
        old = first.seals()
        for machine in others:
            self.step(machine, 'init', '-', old, stdin=self.ring(first))
        self.agreed(old)
        for machine in self.machines:
            if misreads():
                self.step(machine, 'seal', usb, *self.chance.choice([[], ['--with-key=host']]))
        if misreads():
            self.rotate(first, others, usb, old, misreads)
        if misreads():
            self.restore(others[0], usb)

    def agreed(self, kek):
        """All serve, and under one KEK."""
        if {machine.seals() for machine in self.machines} != {kek}:
            raise Violation('the page was followed, and the machines seal under ' +
                            ' '.join(str(machine.seals()) for machine in self.machines))
        for machine in self.machines:
            if self.verb(machine, 'show', kill=False)[0] != 0:
                raise Violation('the page was followed, and show does not agree')

    def rotate(self, first, others, usb, old, misreads):
        self.step(first, 'add', usb)
        new = next(i for i in first.memory() if i != old)
        if misreads():
            self.refused(others[0], 'add', usb)
        for machine in others:
            self.step(machine, 'add', '-', new, stdin=self.ring(first, new))
        for machine in self.machines:
            self.step(machine, 'seal-with', new)
        self.agreed(new)
        if misreads() and old in self.secrets.values():
            self.refused(first, 'retire', old, stdin=self.dump())
        self.secrets = {f'/registry/secrets/default/s{n}': new for n in range(3)}
        if misreads():
            self.refused(first, 'retire', old, stdin=self.dump(list(self.secrets)[:1]))
        for machine in self.machines:
            self.step(machine, 'retire', old, stdin=self.dump())
            if misreads():
                self.refused(machine, 'seal-with', old)
        self.agreed(new)

    def restore(self, machine, usb):
        """Its ring is lost; the plugin still runs, or not. show is asked first."""
        kek = machine.seals()
        for path in machine.files():
            if 'retired' not in path:
                os.remove(path)
        if self.chance.random() < 0.5:
            machine.reboot()
        if machine.seals():
            self.refused(machine, 'new', self.media[1])
        said = self.verb(machine, 'show', kill=False)[1]
        if ('DO NOT RESTART' in said) != bool(machine.seals()):
            raise Violation('what show says of a lost ring: ' + said)
        self.step(machine, 'init', f'{usb}/kek-{kek}', kek)
        self.agreed(kek)

    # ---- anything

    def event(self):
        chance = self.chance
        machine, medium = chance.choice(self.machines), chance.choice(self.media[:1] + self.media)
        other = chance.choice(self.machines)
        ids = [i for path in machine.files() for i in keks(path)]
        some = chance.choice([*ids, *ids, *self.known])
        copies = glob.glob(medium + '/kek-*') + glob.glob(machine.folder + '/*retired*')
        copy = chance.choice(copies or [medium + '/kek-none'])
        named = chance.choice([[], [copy[-32:] if re.search('[0-9a-f]{32}$', copy) else some]])
        happening = chance.choices(
            ['new', 'init', 'init -', 'add', 'add FILE', 'add -', 'seal-with', 'retire', 'copy', 'seal', 'unseal', 'show',
             'rewrite', 'by hand', 'spoil', 'spoil medium', 'tpm', 'reboot', 'clear up'],
            [4, 6, 4, 9, 5, 4, 8, 8, 4, 8, 4, 2, 6, 6, 2, 1, 2, 3, 2])[0]
        self.trace.append(happening)
        if happening in ('new', 'add', 'copy'):
            self.verb(machine, happening, medium)
        elif happening in ('init', 'add FILE'):
            self.verb(machine, happening.split()[0], copy, *named)
        elif happening in ('init -', 'add -'):
            self.verb(machine, happening[:-2], '-', stdin=self.ring(other, *chance.choice([[], [some]])))
        elif happening == 'seal-with':
            self.verb(machine, 'seal-with', some)
        elif happening == 'retire':
            names = None if chance.random() < 0.8 else chance.sample(sorted(self.secrets), min(1, len(self.secrets)))
            self.verb(machine, 'retire', *chance.choice([[], ['--one-value']]), some, stdin=self.dump(names))
        elif happening == 'seal':
            where = chance.choice([medium, copy])
            self.verb(machine, 'seal', where, *chance.choice([[], ['--with-key=host'], ['--with-key=host']]))
        elif happening in ('unseal', 'show'):
            self.verb(machine, happening)
        elif happening == 'rewrite' and machine.seals():
            self.secrets = {name: machine.seals() for name in self.secrets}
        elif happening == 'by hand':    # the TPM fails at boot: back to plain with one copy, and sealed again later
            mine = [path for path in glob.glob(medium + '/kek-*') if path[-32:] in ids]
            if mine and machine.sealed():
                if chance.random() < 0.5:
                    self.verb(machine, 'add', medium, kill=False)
                if chance.random() < 0.7:
                    machine.systemctl('stop')
                machine.plain_by_hand()
                copy = chance.choice(mine)
                self.verb(machine, 'init', copy, copy[-32:], kill=False)
                self.verb(machine, 'seal', medium, '--with-key=host', kill=False)
        elif happening == 'spoil':
            spoil(chance, chance.choice(machine.files() or ['']))
        elif happening == 'spoil medium':
            spoil(chance, chance.choice(glob.glob(medium + '/*') or ['']))
        elif happening == 'tpm':        # gone, another one, or back
            machine.write('tpm', chance.choice(['', 'KEY tpm another\n', f'KEY tpm {os.path.basename(machine.root)}\n']))
        elif happening == 'reboot':
            machine.reboot()
        elif happening == 'clear up':   # what cannot be read is moved away, as the tool says
            for path in machine.files():
                if not keks(path):
                    os.rename(path, path + '.lost')


def worlds(tool, over, seed):
    """World after world, until it is over or one has lost a KEK."""
    tally = {'worlds': 0, 'verbs': 0, 'kills': 0}
    while not over(tally):
        world = World(random.Random(f'{seed} {tally["worlds"]}'), tool, tally)
        try:
            world.page()
            for _ in range(EVENTS):
                world.event()
                if over(tally):
                    break
        except Violation as why:
            return f'seed {seed}, world {tally["worlds"]}: {why}', tally, world.trace
        finally:
            world.end()
        tally['worlds'] += 1
    return None, tally, []


def mutants(tool, which, seed=MUTANT_SEED):
    """Each has to be noticed."""
    failed = 0
    for name, (text, other) in MUTANTS.items():
        if which not in name:
            continue
        assert tool.count(text) == 1, f'{name}: the tool has {tool.count(text)} times {text!r}'
        start = time.monotonic()
        why, tally, _ = worlds(tool.replace(text, other), lambda tally: tally['verbs'] > MUTANT_VERBS, seed)
        failed += why is None
        print(f'{"not ok" if why is None else "ok"} custody, a mutant is noticed: {name}: {str(why).splitlines()[0][:150]} '
              f'({tally["verbs"]} verbs, {time.monotonic() - start:.0f} s)', flush=True)
    return failed


def main(words):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with open(TOOL, encoding='utf-8') as file:
        tool = file.read()
    if words[:1] == ['mutants']:
        return 1 if mutants(tool, ' '.join(words[1:])) else 0
    seconds, seed = int(words[0]) if words else 60, words[1] if len(words) > 1 else str(time.time_ns())
    start = time.monotonic()
    why, tally, trace = worlds(tool, lambda _: time.monotonic() > start + seconds, seed)
    if why:
        print('\n'.join('    ' + line.replace('\n', '\n        ') for line in trace[-40:]))
    print(f'{"not ok" if why else "ok"} custody: ' + (f'{why}; ' if why else '') +
          f'{tally["worlds"]} worlds, {tally["verbs"]} verbs, {tally["kills"]} kills, {int(bool(why))} losses, '
          f'{time.monotonic() - start:.0f} s, seed {seed}')
    return 1 if why else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
