"""doc/tour.md and the program: what is captured goes into marked regions of the document, or is compared with them.

    tour.py write       captures an exchange, and writes regions and pictures
    tour.py check       fails when document and program disagree: a line `ok` or `not ok` for each test

A region begins with a line `<!-- tour: NAME -->` and ends with `<!-- end -->`. All of it comes from build/tour/program
(test/tour/fixed.c), from ./kmsplugin, and from values that test/sealed.py makes as kube-apiserver does.
"""
import difflib
import os
import re
import subprocess
import sys
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import octets
import pictures
import sealed
from octets import HKDF, KUBERNETES, gcm_rows, message_rows, opened_rows, table
from plugin import BINARY, ROOT, WAIT, Server, fresh_dir, kms
from plugin import text as encoded
from raw import Raw, field
from watch import UID, Watch

PROGRAM = os.path.join(ROOT, 'build/tour/program')
DOCUMENT = os.path.join(ROOT, 'doc/tour.md')
SOURCE = os.path.join(ROOT, 'kmsplugin.c')
VALUES = 'build/tour/'          # where the document's commands find the values

# The octets of the example tell where they come from: all of them count up.
KEK = bytes(range(0x00, 0x20))
NONCE = bytes(range(0xa0, 0xb8))        # as fixed.c gives it out
SEED = bytes(range(0xc0, 0xe0))
INFO, GCM_NONCE = bytes(range(0x60, 0x80)), bytes(range(0x80, 0x8c))
ETCD_KEY = '/registry/secrets/default/db'

# A Secret as kube-apiserver encodes it: `kubectl create secret generic db --from-literal=password=hunter2`.
SECRET = field(1, field(1, b'db') + field(3, b'default')) + \
    field(2, field(1, b'password') + field(2, b'hunter2')) + field(3, b'Opaque')
OBJECT = b'k8s\0' + field(1, field(1, b'v1') + field(2, b'Secret')) + field(2, SECRET) + field(3, b'') + field(4, b'')

FUNCTION = r'^ {0,3}\d+  [0-9a-f ]{26} .{68}(\w+)$'     # the last column of a dump

# The sections of kmsplugin.c whose functions the list of calls shows; the others would hide the way.
SHOWN = ('Event loop', 'Connections', 'HTTP/2', 'HTTP requests', 'gRPC', 'KMS service', 'Sealing')
HIDDEN = {'is_name', 'is_value', 'field_name', 'stream_find', 'callback_result', 'out_append', 'rpc_uses_kek'}


def read(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def sections():
    """The name of the section of each function of kmsplugin.c."""
    found, section = {}, ''
    for line in read(SOURCE).splitlines():
        if heading := re.match(r'/\* -{5,} (.*?)(?: \*/)?$', line):
            section = heading[1]
        elif (function := re.match(r'[A-Za-z_].*?\b([a-z_][a-z0-9_]*)\(', line)) and not line.endswith(';'):
            found[function[1]] = section
    return found


def call_lines(path):
    """The calls that one request makes, indented, of the sections that are shown; and the names of all of them."""
    symbols = {}
    for line in subprocess.run(['nm', PROGRAM], check=True, capture_output=True, text=True).stdout.splitlines():
        address, kind, name = line.rsplit(' ', 2)
        if kind in 'tT':
            symbols[name] = int(address, 16)
    names = {(address - symbols['main']) % 2**64: name for name, address in symbols.items()}
    where, lines, stack, ran = sections(), [], [], set()
    for line in read(path).splitlines():
        depth, distance = line.split()
        name = names[int(distance, 16)]
        ran.add(name)
        del stack[int(depth):]
        shown = where.get(name) in SHOWN and name not in HIDDEN
        stack.append(shown)
        row = '  ' * sum(stack[:-1]) + name
        if not shown:
            continue
        if lines and lines[-1][0] == row:
            lines[-1][2] += 1
        else:
            lines.append([row, where[name], 1])
    return [f'{row + (f" x {count}" if count > 1 else ""):42} {section}' for row, section, count in lines], ran


def capture():
    """One Encrypt: the flights, the response, and the calls inside of the server. What the flights name has run."""
    calls = os.path.join(fresh_dir(), 'calls')
    server = Server(kek=KEK, binary=PROGRAM, env={'TOUR_CALLS': calls})
    watch = Watch(server.path)
    watch.greet()
    answer = watch.call('Encrypt', kms.EncryptRequest(plaintext=SEED, uid=UID))
    flights = list(watch.flights)
    watch.call('Status', kms.StatusRequest())   # by then the turn of the call is over
    watch.close()
    server.stop()
    assert answer.ciphertext[17:41] == NONCE
    lines, ran = call_lines(calls)
    named = {match[1] for _, flight in flights[2:] for line in flight if (match := re.search(FUNCTION, line))}
    assert named - {'nghttp2', 'kek_init'} <= ran, f'did not run: {named - ran}'    # kek_init has, at the start
    return flights, answer, lines


def values(ciphertext):
    """What kube-apiserver stores: as KMS v2 with the seed of the exchange, and as KMS v1."""
    name = ETCD_KEY.encode()
    with mock.patch('os.urandom', side_effect=[SEED, GCM_NONCE, INFO, NONCE]):
        v2 = sealed.etcd_v2(KEK, name, OBJECT)
    with mock.patch('os.urandom', side_effect=[SEED, GCM_NONCE, NONCE]):
        v1 = sealed.etcd_v1(KEK, name, OBJECT)
    assert ciphertext in v2, 'the program and test/sealed.py seal differently'
    return v2, v1


def v2_rows(value):
    head = value[:value.index(b'name:') + 5]
    def data(stored):
        return [(stored[:32], 'info: makes the data key, with the seed', HKDF, 'value_open_data'),
                *gcm_rows(stored[32:], 'value_open_data')]
    return [(head, f'prefix: {head.decode()}', KUBERNETES, 'value_open'),
            *message_rows(value[len(head):], kms.Etcd.EncryptedObject.DESCRIPTOR, 'value_open_v2',
                          {'encrypted_data': data, 'encrypted_dek_source': opened_rows})]


def v1_rows(value):
    head = value[:value.index(b'name:') + 5]
    begin = len(head) + 2
    length = octets.number(value[len(head):begin])
    return [(head, f'prefix: {head.decode()}', KUBERNETES, 'value_open'),
            (value[len(head):begin], f'length of the sealed data key: {length}', KUBERNETES, 'value_open_v1'),
            *opened_rows(value[begin:begin + length]), *gcm_rows(value[begin + length:], 'value_open_data')]


def numbers(ciphertext):
    """What lies between the KEK and the ciphertext, by name."""
    first = sealed.aes(KEK, bytes(16))
    doubled = int.from_bytes(first, 'big') << 1
    k1 = (doubled ^ (doubled >> 128) * (1 << 128 | 0x87)).to_bytes(16, 'big')
    blocks = [bytes([0, n, 0x58, 0]) + NONCE[:12] for n in (1, 2)]
    key = b''.join(sealed.aes(KEK, bytes(a ^ b for a, b in zip(block, k1))) for block in blocks)
    assert key == sealed.derive(KEK, NONCE)
    rows = [('KEK', KEK), ('L = AES(KEK, 0)', first), ('K1, from L', k1),
            ('M1', blocks[0]), ('M2', blocks[1]), ('key = AES(M1 ^ K1) AES(M2 ^ K1)', key),
            ('nonce of AES-GCM', NONCE[12:]), ('associated data', ciphertext[:17] + b'\x02'),
            ('plaintext', SEED), ('ciphertext', ciphertext[41:-16]), ('tag', ciphertext[-16:])]
    lines = []
    for name, value in rows:
        for at in range(0, len(value), 16):
            lines.append(f'{name if at == 0 else "":32} {value[at:at + 16].hex(" ")}')
    return lines


PYTHON = '''\
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
kek = bytes.fromhex('{kek}')
sealed = bytes.fromhex({sealed})
number = lambda octets: int.from_bytes(octets, 'big')
aes = lambda block: Cipher(algorithms.AES(kek), modes.ECB()).encryptor().update(block)
l = number(aes(bytes(16)))
k1 = l << 1 ^ (l >> 127) * (1 << 128 | 0x87)
m = [number(bytes([0, n, 0x58, 0]) + sealed[17:29]) for n in (1, 2)]
key = b''.join(aes((block ^ k1).to_bytes(16, 'big')) for block in m)
print(AESGCM(key).decrypt(sealed[29:41], sealed[41:], sealed[:17] + b'\\x02').hex(' ', 4))'''


def python_lines(ciphertext):
    digits = ciphertext.hex()
    pieces = [f"'{digits[at:at + 90]}'" for at in range(0, len(digits), 90)]
    return PYTHON.format(kek=KEK.hex(), sealed=('\n' + 23 * ' ').join(pieces)).splitlines()


def shell(*commands):
    """What commands of the document print, as a terminal would show it."""
    real = '\n'.join(commands).replace('./kmsplugin', BINARY)
    done = subprocess.run(['sh', '-c', real], cwd=ROOT, timeout=WAIT, check=False, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT, env={'PATH': os.environ['PATH'], 'KMS_KEK': encoded(KEK)})
    return [*(f'$ {line}' for line in commands), *done.stdout.splitlines()]


def save(name, value):
    with open(os.path.join(ROOT, VALUES, name), 'wb') as file:
        file.write(value)


def fenced(lines, language=''):
    return ['```' + language, *lines, '```']


def regions():
    """Name and lines of every region."""
    flights, answer, calls = capture()
    v2, v1 = values(answer.ciphertext)
    save('v2', v2)
    save('v1', v1)
    code = python_lines(answer.ciphertext)
    shown = subprocess.run(['/usr/bin/python3', '-c', '\n'.join(code)], check=True, capture_output=True, text=True).stdout
    found = {f'flight {n}': fenced(lines) for n, (_, lines) in enumerate(flights, 1)}
    assert [side for side, _ in flights] == ['client', 'server', 'client', 'server']
    found |= {
        'numbers': fenced(numbers(answer.ciphertext)),
        'python': [*fenced(code, 'python'), '', 'It prints the seed:', '', *fenced(shown.splitlines())],
        'v2': fenced(table(v2_rows(v2))),
        'v1': fenced(table(v1_rows(v1))),
        'unseal': fenced(shell(f'export KMS_KEK={encoded(KEK)}',
                               f"./kmsplugin unseal {ETCD_KEY} <{VALUES}v2 | tr -c '[:print:]' '[.*]'; echo")),
        'calls': fenced(calls),
        'changed': fenced(shell(f'cp {VALUES}v2 {VALUES}changed',
                                f'printf X | dd of={VALUES}changed bs=1 seek=100 conv=notrunc status=none',
                                f'./kmsplugin unseal {ETCD_KEY} <{VALUES}changed')),
        'stolen': fenced(shell(f'KMS_KEK=$(./kmsplugin genkey) ./kmsplugin unseal {ETCD_KEY} <{VALUES}v2')),
    }
    return found


def fill(document, found):
    """The document with its regions as they are to be. Every region has its place, and every place its region."""
    names = re.findall(r'^<!-- tour: (.*) -->$', document, re.M)
    assert sorted(names) == sorted(found), f'regions {sorted(found)}, places {sorted(names)}'
    for name, lines in found.items():
        begin, end = f'<!-- tour: {name} -->\n', '<!-- end -->'
        before, rest = document.split(begin)
        document = before + begin + '\n' + '\n'.join(lines) + '\n\n' + end + rest.split(end, 1)[1]
    return document


def check_octets():
    document = read(DOCUMENT)
    fresh = fill(document, regions())
    diff = list(difflib.unified_diff(document.splitlines(), fresh.splitlines(), 'doc/tour.md', 'the program', lineterm=''))
    assert not diff, '\n'.join(['make tour writes it anew', *diff])


def check_pictures():
    for path, svg in pictures.all_pictures():
        assert read(path) == svg, f'{path} is not what pictures.py makes'


def check_names():
    """Functions, constants, fields of messages and files that the document, its dumps and its pictures name are there."""
    document, source = read(DOCUMENT), read(SOURCE) + read(os.path.join(ROOT, 'kms.proto'))
    code = set(re.findall(r'\w+', re.sub(r'/\*.*?\*/', '', source, flags=re.S)))
    named = set(re.findall(r'`([a-z]\w*_\w+|[A-Z][A-Z0-9]*_[A-Z0-9_]+)`', document))
    named |= set(re.findall(r'\b[a-z]+_\w+', read(pictures.SOURCE)))
    assert len(named) > 30, named
    rows = {match[1] for match in re.finditer(FUNCTION, document, re.M)} - {'nghttp2'}
    assert len(rows) > 10, rows
    missing = (named | rows) - code - set(re.findall(r'\w+', read(os.path.join(HERE, 'metric.sed'))))
    assert not missing, f'not in kmsplugin.c: {sorted(missing)}'
    functions = rows - set(sections())
    assert not functions, f'not a function of kmsplugin.c: {sorted(functions)}'
    for path in re.findall(r'`((?:test|doc|deploy|build)/[\w/.]+)`|\]\(([\w/.]+)\)', document):
        real = os.path.join(ROOT, path[0]) if path[0] else os.path.join(ROOT, 'doc', path[1])
        assert os.path.exists(real), f'{path}: no such file'


def check_commands():
    """The tests that the document says replay something are there."""
    document, found = read(DOCUMENT), 0
    for script, name in re.findall(r'^ +(?:sudo )?/usr/bin/python3 test/(run|hostile)\.py (\S+)$', document, re.M):
        found += 1
        if script == 'hostile':
            assert f'\ndef {name}(' in read(os.path.join(ROOT, 'test/hostile.py')), f'hostile.py has no {name}'
            continue
        module, case, test = name.split('.')
        body = read(os.path.join(ROOT, 'test', module + '.py'))
        assert re.search(rf'^class {case}\(.*?^    def {test}\(', body, re.M | re.S), f'run.py has no {name}'
    assert found >= 5, found


def check_watch():
    """The view of a live server: its calls, and nothing but the client's own secret."""
    server = Server(binary=BINARY)
    shown = subprocess.run([sys.executable, os.path.join(HERE, 'watch.py'), 'unix://' + server.path], check=True,
                           timeout=WAIT, capture_output=True, text=True).stdout
    server.stop()
    assert shown.count('client says') == 4 and shown.count('grpc-status') == 3, shown
    assert 'field 3, key_id' in shown and 'dynamic entry' in shown, shown
    secrets = re.findall(r'plaintext: 32 octets follow.*\n((?:.*\n){4})', shown)
    first, second = (re.findall(r'\b[0-9a-f]{2}\b', lines[lines.index('  '):].split('its')[0]) for lines in secrets)
    assert first == second, 'what was encrypted does not decrypt to the same octets'


def check_metric():
    """The answer to the exercise: a metric that counts turns."""
    subprocess.run(['make', '-s', 'build/tour/metric'], cwd=ROOT, check=True)
    server = Server(binary=os.path.join(ROOT, 'build/tour/metric'))
    counts = []
    for _ in range(2):
        with Raw(server.path) as raw:
            page = raw.get('/metrics').data.decode()
        counts.append(int(re.search(r'^kmsplugin_turns_total (\d+)$', page, re.M)[1]))
    server.stop()
    assert 0 < counts[0] < counts[1], counts


CHECKS = [check_octets, check_pictures, check_names, check_commands, check_watch, check_metric]


def check():
    failed = 0
    for test in CHECKS:
        name = test.__name__.removeprefix('check_')
        try:
            test()
            print(f'ok tour {name}')
        except (AssertionError, subprocess.CalledProcessError, OSError, KeyError, ValueError) as error:
            failed += 1
            lines = f'{type(error).__name__}: {error}'.splitlines()
            print('\n'.join('    ' + line for line in lines))
            print(f'not ok tour {name}: {lines[0]}')
    return 1 if failed else 0


def write():
    for path, svg in pictures.all_pictures():
        with open(path, 'w', encoding='utf-8') as file:
            file.write(svg)
    document = fill(read(DOCUMENT), regions())
    with open(DOCUMENT, 'w', encoding='utf-8') as file:
        file.write(document)
    return 0


if __name__ == '__main__':
    if sys.argv[1:] not in (['write'], ['check']):
        sys.exit(__doc__)
    sys.exit(write() if sys.argv[1] == 'write' else check())
